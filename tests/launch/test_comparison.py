"""The table of set-ups, from made-up runs: each column from its place, pairs over the same questions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs.setups import b_sft, f_sft_grpo_traces, g_fundus_r1
from fundus_jax.evaluation.report import evaluate
from fundus_jax.evaluation.results import write
from fundus_jax.records import ConfigError
from fundus_jax.workdir import Workdir
from launch.comparison import COLUMNS, MORE, PAIRS, SETUPS, compared, tabulate
from launch.config import RunConfig, as_json
from tests.conftest import ROOT
from tests.evaluation.samples import answered, item

KINDS = ("Colour fundus photograph", "OCT")
ITEMS = [item(f"d{i}", "PDR" if i % 2 else "AMD") for i in range(20)] + [
    item(f"m{i}", KINDS[i % 2], level="L1", task="modality", part="modality", options=KINDS)
    for i in range(10)
]


def make(workdir: Path, config: RunConfig, wrong: set[str], items=ITEMS) -> None:
    """A run whose greedy and sampled answers are right but for those of `wrong`."""
    Workdir(workdir, as_json(config)).close()
    stage = config.stages.split(",")[-1] or "base"
    summary = {}
    for kind, samples in (("greedy", 1), ("sampled", 2)):
        answers = [
            answered(one, "none" if one.id in wrong and sample == 0 else one.answer, sample=sample)
            for one in items
            for sample in range(samples)
        ]
        summary[kind] = evaluate(answers)
        write(workdir / "evaluation" / f"{stage}-{kind}", answers, summary[kind])
    (workdir / "evaluation" / "summary.json").write_text(json.dumps({"stages": {stage: summary}}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """B, F and G have finished; H has begun."""
    make(tmp_path / "b", b_sft.get_config("quick"), {"d0", "d1", "d2", "m0", "m1"})
    make(tmp_path / "f", f_sft_grpo_traces.get_config("quick"), {"d0", "d1", "m0"})
    make(tmp_path / "g", g_fundus_r1.get_config("quick"), {"d2"})
    Workdir(tmp_path / "h", as_json(g_fundus_r1.get_config("quick"))).close()
    return tmp_path


def test_the_rows_are_the_papers() -> None:
    assert list(SETUPS) == list("ABCDEFGHIJ")
    for letter, setup in SETUPS.items():
        assert (ROOT / "configs" / "setups" / f"{setup.recipe}.py").is_file()
        assert setup.recipe[0] == letter.lower()
        assert not setup.parent or list(SETUPS).index(setup.parent) < list(SETUPS).index(letter)
    assert all(first in SETUPS and second in SETUPS for first, second, _ in PAIRS)


def test_each_column_comes_from_its_place(root: Path) -> None:
    tabulate(root)
    facts = json.loads((root / "setups.json").read_text())
    assert list(facts["setups"]) == ["B", "F", "G"]
    row = facts["setups"]["F"]
    filled = {name: (one["value"], one["n"]) for name, one in row["held_out"].items() if one}
    assert filled["Omni-Fundus DD"] == filled["GMAI-Fundus DD"] == (18 / 20, 20)
    assert filled["Omni-Fundus MR"] == (9 / 10, 10)
    # L4: AMD is right 9 of 10 times, PDR too, and no other answer claims them: 2 * .9 * 1 / 1.9
    assert filled["FunBench L4"][0] == pytest.approx(2 * 0.9 / 1.9)
    # L1 has two labels, and the first one's score counts: sensitivity .8, and nothing is mistaken for it
    assert filled["FunBench L1"][0] == pytest.approx(2 * 0.8 / 1.8)
    assert set(filled) == {"FunBench L1", "FunBench L4"} | {  # and no mean of two levels of four
        "Omni-Fundus MR", "Omni-Fundus DD", "GMAI-Fundus DD",
    }  # fmt: skip
    assert row["more"]["all questions"]["value"] == 27 / 30
    assert row["more"]["sampled"]["value"] == 57 / 60
    assert (row["after"], facts["setups"]["B"]["after"]) == ("grpo", "sft")


def test_differences_are_paired(root: Path) -> None:
    tabulate(root)
    facts = json.loads((root / "setups.json").read_text())
    assert [(one["first"], one["second"]) for one in facts["differences"]] == [("G", "F")]
    found = facts["differences"][0]["differences"]
    assert found["greedy, all questions"]["value"] == pytest.approx(2 / 30)  # d0, d1, m0 gained, d2 lost
    assert found["greedy diagnosis"] == found["greedy diagnosis"] | {"value": pytest.approx(1 / 20), "n": 20}
    assert found["sampled answers"]["value"] == pytest.approx(1 / 30)
    low, high = (found["greedy, all questions"][end] for end in ("low", "high"))
    deviation = np.std([1, 1, 1, -1] + [0] * 26) / np.sqrt(30)
    assert low == pytest.approx(2 / 30 - 1.96 * deviation, abs=0.02)
    assert high == pytest.approx(2 / 30 + 1.96 * deviation, abs=0.02)


def test_the_page_says_what_is_missing(root: Path) -> None:
    page = tabulate(root)
    assert page == (root / "setups.md").read_text()
    lines = page.splitlines()
    width = len(COLUMNS) + 2
    table = [line for line in lines[: lines.index("## Beside the paper's columns")] if line.startswith("|")]
    assert {line.count("|") for line in table} == {width + 1}
    assert any(line.startswith("| A | Base | not run |") for line in table)
    assert any(line.startswith("| H | Using the VF item only | not run |") for line in table)
    row = next(line for line in table if line.startswith("| G |")).split(" | ")
    assert row[2] == "–"  # Avg
    assert row[-2].startswith("95.0 [")  # GMAI's DD
    assert table[-1].split(" | ")[-2] == "20"
    assert len([line for line in lines if line.startswith("| G − ")]) == 1
    assert len(MORE) == 4
    assert "no language" in page


def test_the_questions_of_a_patient_are_compared_together(tmp_path: Path) -> None:
    """Asked three times over, they tell no more."""
    ends = []
    for copies in (1, 3):
        items = [
            dataclasses.replace(one, id=f"{one.id}-{k}", unit=one.id) for one in ITEMS for k in range(copies)
        ]
        wrong = {one.id for one in items if one.unit in ("d1", "d2", "d3")}
        for name, missed in (("a", set()), ("b", wrong)):
            make(tmp_path / f"{name}{copies}", g_fundus_r1.get_config("quick"), missed, items)
        found = compared(tmp_path / f"a{copies}", tmp_path / f"b{copies}")["differences"]
        ends.append({name: (one["value"], one["low"], one["high"]) for name, one in found.items()})
    assert all(low < high for _, low, high in ends[0].values())
    assert ends[0] == {name: pytest.approx(three) for name, three in ends[1].items()}


def test_runs_with_other_questions_are_not_compared(root: Path) -> None:
    items = [dataclasses.replace(one, id=f"{one.id}x") for one in ITEMS]
    (root / "g" / "config.json").unlink()
    make(root / "g", g_fundus_r1.get_config("quick"), set(), items)
    with pytest.raises(ConfigError, match="asked other questions"):
        tabulate(root)
