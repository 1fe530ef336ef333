"""Answers about one patient are not independent: asking the same thing again adds nothing to what is known,
and no interval of whatever is told becomes narrower. And what nobody looked for counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fundus_jax.dialog import render_boxes
from fundus_jax.evaluation import by_server, scores
from fundus_jax.evaluation import compare as runs
from fundus_jax.evaluation.consistency import evaluate_reports
from fundus_jax.evaluation.faithfulness import Trace, evaluate_faithfulness
from fundus_jax.evaluation.report import Prediction, compare, compare_places, evaluate, outcome_of
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.rewards import assess
from fundus_jax.records import Box
from tests.evaluation import samples
from tests.evaluation.samples import answered, item

PATIENTS = 24
SIGNS = ("haemorrhage", "microaneurysm")
PLACE = Box(finding="haemorrhage", x1=100, y1=100, x2=400, y2=400)


def intervals(told: Any, at: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every figure in a report, by its place: value and the ends of its interval."""
    if isinstance(told, dict):
        if {"value", "low", "high"} <= told.keys():
            yield at, tuple(told[name] for name in ("value", "low", "high"))
        for name, inner in told.items():
            yield from intervals(inner, f"{at}/{name}")
    elif isinstance(told, list):
        for number, inner in enumerate(told):
            yield from intervals(inner, f"{at}/{number}")


def answers(copies: int, seed: int = 0, repeats: int = 2, **changes: Any) -> list[Prediction]:
    """What is said of each patient, `copies` times, of questions of every kind that a report tells apart."""
    rng, found = np.random.default_rng(seed), []
    for patient in range(PATIENTS):
        modality, sick = ("CFP", "OCT", "UWF")[patient % 3], patient % 2
        there = SIGNS[: 1 + patient // 2 % 2] if sick else ()
        fields: dict[str, Any] = {
            "unit": f"p{patient}", "modality": modality, "findings": there,
            "boxes": (PLACE,) if there else (), "multiple": patient % 8 == 7,
        }  # fmt: skip
        said = []
        for _ in range(repeats):
            answer = "PDR" if rng.random() < 0.6 else "AMD"
            moved = replace(PLACE, x2=int(rng.integers(300, 500)), finding=SIGNS[int(rng.integers(2))])
            denied = "No haemorrhages are seen. " if rng.random() < 0.3 else ""
            said.append((answer, f"{denied}The image shows {moved.finding}. {render_boxes([moved])}"))
        for copy in range(copies):
            one = item(f"q{patient}-{copy}", answer="PDR" if sick else "AMD", **(fields | changes))
            found += [answered(one, answer, think, sample=k) for k, (answer, think) in enumerate(said)]
    return found


def same(once: Any, thrice: Any, least: int = 1) -> None:
    """Whether two reports tell the same figures, of which `least` have an interval of some width."""
    told = dict(intervals(once))
    assert sum(low is not None and low < high for _, low, high in told.values()) >= least
    other = dict(intervals(thrice))
    assert other.keys() == told.keys()
    odd = {name: (told[name], other[name]) for name in told if told[name] != pytest.approx(other[name])}
    assert not odd


def third(unit: str) -> bool:
    """Whether it is one of the patients 0, 3, 6, ..."""
    return int(unit[1:]) % 3 == 0


def test_no_figure_of_a_report_is_surer_for_the_same_question_asked_again() -> None:
    same(evaluate(answers(1)), evaluate(answers(3)), least=60)


@pytest.mark.parametrize("paired", [compare, compare_places])
def test_nor_a_difference_of_two_runs(paired: Any) -> None:
    same(*(paired(answers(copies), answers(copies, seed=1)) for copies in (1, 3)))


def test_nor_a_comparison_of_two_evaluations() -> None:
    def compared(copies: int) -> dict[str, Any]:
        sides = []
        for seed in (0, 1):
            said = answers(copies, seed=seed, multiple=False)
            sides.append([line(one, outcome_of(one)) for one in said])
        found = runs.compare(*sides)
        counts = found["all"]["gained"], found["all"]["lost"]
        assert counts == tuple(len(found["flips"][kind]) for kind in ("gained", "lost"))
        return found

    same(compared(1), compared(3), least=9)


def line(one: Prediction, outcome: Any) -> dict[str, Any]:
    """As predictions.jsonl has it."""
    names = ("id", "unit", "prompt", "answers", "images", "modality", "level", "task", "part", "options")
    told = {name: getattr(one.item, name) for name in (*names, "multiple")}
    return told | {"correct": outcome.correct, "extracted": outcome.extracted, "response": one.response}


def test_nor_what_models_read() -> None:
    def read(copies: int) -> dict[str, Any]:
        items = [one.item for one in answers(copies, repeats=1)]
        said = [("PDR",) if third(one.unit) else ("AMD",) for one in items]
        return by_server.evaluate_choices(items, said, [("PDR",)] * len(items))

    same(read(1), read(3), least=2)


def test_nor_reports_and_traces() -> None:
    def reports(copies: int) -> list[Prediction]:  # they stand where answers do
        return [
            answered(one.item, one.response.partition(". ")[0].rpartition("<think>")[2], sample=one.sample)
            for one in answers(copies)
            if one.item.findings
        ]

    same(*(evaluate_reports(reports(copies)) for copies in (1, 3)), least=4)

    def traces(copies: int) -> list[Trace]:
        return [
            Trace(one.response, frozenset(one.item.findings or ()), True, unit=one.item.unit)
            for one in answers(copies)
        ]

    same(*(evaluate_faithfulness(traces(copies)) for copies in (1, 3)), least=4)


def test_nor_the_groups_of_a_published_score() -> None:
    def figures(copies: int) -> dict[str, Any]:
        said = answers(copies, repeats=1)
        groups = ["L1" if third(one.item.unit) else "L2" for one in said]
        right = [one.response.count("PDR") > 0 for one in said]
        full = [*groups, "L3", "L4"], [*right, True, False]
        units = [*(one.item.unit for one in said), "c", "d"]
        found = scores.group_figures("FunBench", *full, units=units)
        return {name: found[name].as_dict() for name in ("L1", "L2")}

    same(figures(1), figures(3), least=2)


# ---- what nobody looked for --------------------------------------------------------------------------------


def searched(extra: str) -> list[Prediction]:
    """Images in which only haemorrhages were looked for, and traces that claim and place `extra` too."""
    marks = "Hard exudates are seen. <ref>Hard exudates</ref><box>[[1, 1, 9, 9]]</box>" if extra else ""
    denial = " No cotton-wool spots are seen." if extra else ""
    return [
        answered(
            item(f"q{k}", findings=("haemorrhage",), searched=("haemorrhage",), boxes=(PLACE,)),
            "PDR",
            f"The image shows haemorrhages.{denial} {render_boxes([PLACE])} {marks}",
        )
        for k in range(4)
    ]


def test_what_nobody_looked_for_counts_neither_way() -> None:
    plain, more = searched(""), searched("more")
    for name in ("findings", "localisation"):
        told = [evaluate(said)[name] for said in (plain, more)]
        assert told[0] == told[1]
    said = ("Haemorrhages are seen.", "Haemorrhages and hard exudates are seen, drusen are absent.")
    reports = [evaluate_reports([answered(one.item, text) for one in plain]) for text in said]
    assert reports[0] == reports[1]
    assert compare_places(plain, more) == compare_places(plain, plain)
    config = GrpoConfig(localisation_weight=1.0)
    places = []
    for one in (plain[0], more[0]):
        example = samples.example(1, findings=("haemorrhage",), searched=("haemorrhage",), boxes=(PLACE,))
        places.append(assess(one.response, example, None, {}, config, finished=True).localisation)
    assert places == [1.0, 1.0]
