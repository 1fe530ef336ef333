"""Two evaluations in pairs: differences and flips by hand, refusals, and a page that shows the images."""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundus_jax.evaluation import compare as module
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.compare import compare, evaluations, flip_test, read
from fundus_jax.evaluation.items import Selection
from fundus_jax.evaluation.report import evaluate
from fundus_jax.evaluation.results import write
from fundus_jax.records import ConfigError, DataError
from tests.evaluation.samples import answered, example, stage

OCT = {"modality": "OCT", "labels": ("AMD",), "answer": "AMD"}
SAYS = {  # example -> what run A and run B say; e0 to e3 are CFP and Normal, e4 and e5 OCT and AMD
    "e0": ("Normal", "Normal"),
    "e1": ("Normal", "Glaucoma"),
    "e2": ("AMD", "Normal"),
    "e3": ("AMD", "Normal"),
    "e4": ("AMD", "AMD"),
    "e5": ("<script>alert(1)</script>", "Normal"),
}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    examples = [example(k, **(OCT if k > 3 else {})) for k in range(6)]
    source = stage(tmp_path / "examples", examples)
    benchmark = PhantomBenchmark(source, Selection())
    for side in range(2):
        answers = [answered(one, SAYS[one.id][side], f"<b>{one.id}</b> drusen") for one in benchmark.items]
        report: dict[str, Any] = evaluate(answers)
        report["benchmark"] = {
            "flags": {"benchmark": "phantom", "source": str(source), "tasks": [], "limit": 0}
        }
        write(tmp_path / "AB"[side], answers, report)
    return tmp_path / "A", tmp_path / "B"


def test_differences_and_flips_by_hand(runs: tuple[Path, Path]) -> None:
    found = compare(*(read(run) for run in runs))
    everything = found["all"]
    assert [everything[name]["value"] for name in ("first", "second", "difference")] == (
        pytest.approx([3 / 6, 4 / 6, 1 / 6])
    )
    assert everything["difference"]["n"] == 6
    assert everything["difference"]["low"] < 1 / 6 < everything["difference"]["high"]
    assert (everything["gained"], everything["lost"]) == (2, 1)
    assert found["flips"] == {"gained": ["e2", "e3"], "lost": ["e1"]}
    assert found["by_modality"]["OCT"]["difference"]["value"] == 0
    assert found["by_modality"]["CFP"]["difference"]["value"] == 0.25
    assert set(found["by_disease"]) == {"Normal", "AMD"}
    assert set(found["by_level"]) == {"L4"}


def test_samples_of_a_question_count_with_their_mean(runs: tuple[Path, Path]) -> None:
    first, second = (read(run) for run in runs)
    twice = [*second, *({**one, "sample": 1, "correct": False} for one in second)]
    found = compare(first, twice)
    assert found["all"]["second"]["value"] == pytest.approx(2 / 6)
    assert found["flips"]["gained"] == []  # a half is no majority


def test_flips_of_single_questions_are_tested_as_mcnemar_does() -> None:
    for gained in range(9):
        for lost in range(9):
            flips = gained + lost
            tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1)) / 2**flips
            assert flip_test([1] * gained + [-1] * lost + [0] * 3) == pytest.approx(min(1.0, 2 * tail))
    assert flip_test([1] * 5) == 0.0625


def test_flips_of_one_patient_are_one_piece_of_evidence() -> None:
    """Against all choices of signs, written out."""
    random = np.random.default_rng(0)
    for _ in range(20):
        nets = random.integers(-4, 5, random.integers(0, 9)).tolist()
        sums = [sum(map(operator.mul, signs, nets)) for signs in itertools.product((1, -1), repeat=len(nets))]
        far = sum(abs(one) >= abs(sum(nets)) for one in sums) / len(sums)
        assert flip_test(nets) == pytest.approx(far)
    assert flip_test([10, 10]) == 0.5, "twenty questions of two patients"


def test_patients_are_the_units_of_the_test(runs: tuple[Path, Path]) -> None:
    first, second = (read(run) for run in runs)
    together = [[{**one, "unit": "one patient"} for one in side] for side in (first, second)]
    assert compare(*together)["all"]["p"] == 1.0
    assert compare(first, second)["all"]["p"] <= 1.0


def test_what_can_not_be_compared_is_refused(runs: tuple[Path, Path]) -> None:
    first, second = (read(run) for run in runs)
    with pytest.raises(ConfigError, match="1 questions were asked on one side only .* such as e5"):
        compare(first, second[:-1])
    with pytest.raises(ConfigError, match="1 in other words, such as e0"):
        compare(first, [{**second[0], "prompt": "?"}, *second[1:]])
    with pytest.raises(ConfigError, match="no predictions.jsonl"):
        evaluations(runs[0].parent)
    (runs[0] / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match="predictions.jsonl:1 is no prediction"):
        read(runs[0])
    before = {name: value for name, value in first[0].items() if name != "images"}  # an old line
    (runs[0] / "predictions.jsonl").write_text(json.dumps(before) + "\n")
    with pytest.raises(DataError, match="1 is no prediction: 'images'; evaluate again"):
        read(runs[0])


def test_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    text = module.run(*runs, tmp_path / "out")
    assert "2 gained, 1 lost" in text
    assert re.search(r"modality CFP +25\.0 ", text)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    assert page.index("Lost: 1 question<") < page.index("Gained: 2 questions")
    assert "<b>e1</b>" not in page
    assert "&lt;b&gt;e1&lt;/b&gt;" in page
    assert "<script" not in page
    facts = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert facts["runs"][""]["flips"]["lost"] == ["e1"]


def test_an_image_that_is_gone_is_said(runs: tuple[Path, Path], tmp_path: Path) -> None:
    lines = [read(run) for run in runs]
    report = compare(*lines)

    def gone(key: str) -> Any:
        raise DataError("it was moved")

    found = module.flips(*lines, report, gone)
    assert [one.pictures[0][0] for one in found] == ["", "", ""]
    page = module.render("A", "B", [("", report, found)])
    assert page.count("it was moved") == 3


def test_workdirs_are_compared_by_stage(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for side, run in zip("ab", runs, strict=True):
        for stage_name in ("sft-greedy", "grpo-greedy") if side == "b" else ("sft-greedy",):
            target = tmp_path / side / "evaluation" / stage_name
            target.mkdir(parents=True)
            (target / "predictions.jsonl").write_text((run / "predictions.jsonl").read_text())
    assert module.run(tmp_path / "a", tmp_path / "b", None).startswith("sft-greedy: 2 gained, 1 lost")
    with pytest.raises(ConfigError, match="nothing to compare"):
        module.run(tmp_path / "a", runs[1], None)
