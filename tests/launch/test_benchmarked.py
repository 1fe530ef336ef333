"""Set-ups and the published benchmarks: what the evaluation command wrote beside a run joins the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.setups import f_sft_grpo_traces, g_fundus_r1
from fundus_jax.evaluation import run
from fundus_jax.evaluation.funbench import FILES
from fundus_jax.evaluation.gmai import FILE
from fundus_jax.evaluation.scores import PAPER_GROUPS
from fundus_jax.records import ConfigError
from fundus_jax.workdir import Workdir
from launch.comparison import NOT_ASKED, tabulate
from launch.config import as_json
from tests.chat_server import Body, Reply, Server
from tests.evaluation import test_funbench, test_gmai, test_omnimedvqa
from tests.evaluation.readers import encode
from tests.evaluation.samples import command_flags
from tests.launch.test_comparison import make
from tests.models import tiny

OMNI = {"MR": "Modality Recognition", "AI": "Anatomy Identification", "LG": "Lesion Grading"}
OMNI |= {"DD": "Disease Diagnosis"}
EYES = ("Left eye", "Right eye")


def funbench(root: Path) -> dict[str, Any]:
    """Two questions in a file of each level: A is right once, and B once."""
    for number, level in enumerate(("L1", "L2", "L3", "L4")):
        file = next(name for name in FILES if name.startswith(level))
        (root / "tree" / file).parent.mkdir(parents=True)
        questions = {}
        for letter, eye in zip("AB", EYES, strict=True):
            key = f"OIA-ODIR/{number}{letter}.jpg"
            raw = {"options": list(EYES), "question": "Which eye?", "gt": eye}
            questions[key] = test_funbench.question(gt=letter, raw_data=raw)
            (root / key).parent.mkdir(exist_ok=True)
            (root / key).write_bytes(encode(size=(28, 28)))
        told = {"number of images": len(questions)}
        (root / "tree" / file).write_text(json.dumps({"info": told, "data": questions}))
    return {"benchmark": "funbench", "source": root / "tree", "images": root}


def omnimedvqa(root: Path) -> dict[str, Any]:
    """Two questions of each task; in the second of MR and AI the option A is right, else B."""
    path = Path("Images") / "OLIVES" / "a.tif"
    (root / path).parent.mkdir(parents=True)
    (root / path).write_bytes(encode(size=(28, 28)))
    questions = [
        test_omnimedvqa.question(
            question_id=f"{task}{number}",
            question_type=title,
            image_path=str(path),
            gt_answer="Right eye." if number and task in ("MR", "AI") else "Left eye.",
        )
        for task, title in OMNI.items()
        for number in range(2)
    ]
    return {"benchmark": "omnimedvqa", "source": test_omnimedvqa.source(root, questions)}


def gmai(root: Path) -> dict[str, Any]:
    """One question of each task, whose right answer is B."""
    rows = [test_gmai.row(number, task) for number, task in enumerate(test_gmai.TASKS)]
    root.mkdir()
    return {"benchmark": "gmai", "source": test_gmai.table(root / FILE, rows)}


MAKE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "FunBench": funbench,
    "Omni-Fundus": omnimedvqa,
    "GMAI-Fundus": gmai,
}


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Asks a benchmark by the command, of a server whose every answer is `letter`; returns the report."""
    values = command_flags(monkeypatch)
    policy = tmp_path / "policy"
    tiny.tiny_config().save_pretrained(tiny.write_processor_files(policy))
    given = {name: make(tmp_path / name) for name, make in MAKE.items()}

    def asked(workdir: Path, name: str, letter: str, **more: Any) -> Path:
        def reply(body: Body, number: int) -> Reply:
            return Reply(texts=[f"<answer>{letter}</answer>"])

        out = workdir / "evaluation" / given[name]["benchmark"]
        with Server(reply) as server:
            flags = {"model": policy, "out": out, "server": server.address, "served_model": "m"}
            flags |= {"server_logprobs": False, "allow_partial": True, **given[name], **more}
            values.unparse_flags()
            values(["run", *(f"--{flag}={value}" for flag, value in flags.items())])
            run.main(["run"])
        return out / "report.json"

    return asked


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """Letter -> cells of the table below a heading."""
    lines = page[page.index(f"## {heading}") :].splitlines()[1:]
    end = next((i for i, line in enumerate(lines) if line.startswith("## ")), len(lines))
    table = [line.strip("| ").split(" | ") for line in lines[:end] if line.startswith("| ")]
    return {cells[0]: cells[2:] for cells in table}


def test_published_scores_stand_in_a_table_of_their_own(ask: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make(root / "f", f_sft_grpo_traces.get_config("quick"), {"d0"})
    Workdir(root / "g", as_json(g_fundus_r1.get_config("quick"))).close()  # whose own questions are not asked
    assert NOT_ASKED in tabulate(root)
    paths = {name: ask(root / "g", name, "B") for name in MAKE}
    ask(root / "f", "Omni-Fundus", "A")
    page = tabulate(root)
    facts = json.loads((root / "setups.json").read_text())["setups"]
    found = {name: figure for name, figure in facts["G"]["published"].items() if figure}
    for name, path in paths.items():
        published = json.loads(path.read_text())["published"]
        assert found.pop(f"Overall {name}") == published["score"]
        for group in PAPER_GROUPS[name]:
            assert found.pop(f"{name} {group}") == published["groups"][group]
    average = found.pop("Overall Avg")
    # B: FunBench's first label is never said; half of MR and AI, all of LG and DD; all of GMAI's
    assert average["value"] == pytest.approx((0 + 0.75 + 1) / 3)
    assert not found
    assert not any(facts["G"]["held_out"].values())

    published, held_out = (
        rows_of(page, heading) for heading in ("The published benchmarks", "Held-out questions of the runs")
    )
    assert published["G"][:2] == ["58.3", "0.0 [0.0, 0.0]"]
    assert published["F"][:2] == ["–", "–"]
    assert published["F"][2].startswith("25.0 [")
    assert published["A"][0] == "not run"
    assert held_out["F"][2] == "–"
    assert held_out["F"][11].startswith("95.0 [")
    assert set(held_out["G"]) == {"–"}
    assert "* G, GMAI-Fundus: extraction tail, 0 answers named no option; PARTIAL: GMAI-MMBench_VAL" in page


def test_runs_that_were_asked_in_different_ways_are_refused(ask: Callable[..., Path], tmp_path: Path) -> None:
    for letter, module in (("f", f_sft_grpo_traces), ("g", g_fundus_r1)):
        Workdir(tmp_path / letter, as_json(module.get_config("quick"))).close()
    ask(tmp_path / "f", "FunBench", "A", side=28)
    path = ask(tmp_path / "g", "FunBench", "A", extraction="anywhere", side=56)
    differ = "extraction tail and anywhere, side 28 and 56"
    with pytest.raises(ConfigError, match=f"F and G were asked FunBench in different ways .{differ}"):
        tabulate(tmp_path)
    (tmp_path / "g" / "evaluation" / "gmai").mkdir()
    path.rename(tmp_path / "g" / "evaluation" / "gmai" / "report.json")
    with pytest.raises(ConfigError, match=r"gmai/report.json is no report of GMAI-Fundus"):
        tabulate(tmp_path)
