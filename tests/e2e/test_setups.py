"""The ten set-ups by one command, at budgets that only prove that they run; it is killed once on its way."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from launch.comparison import SETUPS
from tests.e2e.conftest import environment, run
from tests.e2e.test_run import kill_when, metrics, seen

STAGES = {"a": ("base",), "b": ("base", "sft"), "c": ("base", "grpo"), "e": ("base", "sft")}
ALL = ("base", "sft", "grpo")


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The workdir of all ten, and page.txt, what the command printed; killed while D does its GRPO."""
    root, env = tmp_path_factory.mktemp("setups") / "runs", environment(cache)
    words = [sys.executable, "launch/setups.py", "--size=quick", f"--workdir={root}"]
    kill_when(words, env, lambda: ("grpo", 1) in seen(root / "d"))
    done = run(words, env, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "page.txt").write_text(done.stdout)
    return root


def summary(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "evaluation" / "summary.json").read_text())


@pytest.mark.timeout(900)
def test_every_setup_goes_through_its_stages_and_no_other(ten: Path) -> None:
    for letter in "abcdefghij":
        workdir, stages = ten / letter, STAGES.get(letter, ALL)
        assert tuple(dict.fromkeys(line["stage"] for line in metrics(workdir))) == stages, letter
        assert tuple(summary(workdir)["stages"]) == stages
        assert (workdir / "hf" / "model.safetensors").is_file()
        assert "sampled" in summary(workdir)["stages"][stages[-1]]
        page = (workdir / "report.html").read_text()
        assert 'class="missing"' not in page, (letter, re.findall('class="missing">([^<]*)', page))
        assert "not been measured yet" not in page


def test_what_is_shared_is_what_a_run_of_its_own_gives(ten: Path, tmp_path: Path, cache: Path) -> None:
    """J took data, base and SFT over from E, which took data and base from A."""
    words = [sys.executable, "launch/run.py", "--config=configs/setups/j_sum.py:quick"]
    alone = tmp_path / "alone"
    done = run([*words, f"--workdir={alone}"], environment(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    shared = ten / "j"
    origins = [
        json.loads(line).get("from", "")[-1:] for line in (shared / "timeline.jsonl").read_text().splitlines()
    ]
    assert origins[:4] == ["e", "e", "e", ""]
    assert metrics(shared) == metrics(alone)
    assert summary(shared) == summary(alone)
    for step in ("4", "44", "47"):
        a, b = (
            json.loads((path / "checkpoints" / step / "bundle.json").read_text()) for path in (shared, alone)
        )
        assert a == b
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (shared, alone))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    for line in (shared / "rollouts" / "000003.jsonl").read_text().splitlines():
        for one in json.loads(line)["rollouts"]:
            assert [verdict["reference"] for verdict in one["verdicts"]] == ["findings", "knowledge"]
    assert (shared / "rollouts" / "000003.jsonl").read_bytes() == (
        alone / "rollouts" / "000003.jsonl"
    ).read_bytes()


def test_the_page_has_ten_rows_and_every_number_is_a_runs_own(ten: Path) -> None:
    page = (ten / "page.txt").read_text()
    assert page.strip() == (ten / "setups.md").read_text().strip()
    facts = json.loads((ten / "setups.json").read_text())
    assert list(facts["setups"]) == list(SETUPS)
    assert len(facts["differences"]) == 8
    assert "not run" not in page
    for letter, row in facts["setups"].items():
        stage = STAGES.get(letter.lower(), ALL)[-1]
        entry = summary(ten / letter.lower())["stages"][stage]
        assert row["held_out"]["FunBench L4"] == entry["greedy"]["by_level"]["L4"]["funbench"]
        assert row["held_out"]["Omni-Fundus DD"] == entry["greedy"]["by_task"]["disease"]["accuracy"]
        assert row["more"]["sampled"] == entry["sampled"]["accuracy"]
        assert (row["more"]["finding F1"] is None) == (letter in "ABCD")  # no trace is asked for
        assert f"| {letter} | {row['title']} | – |" in page
