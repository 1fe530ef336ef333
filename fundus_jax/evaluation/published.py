"""A benchmark's score as it is published: by the rules of one extraction mode, averaged as the paper
averages.

FunBench's score is its harmonic mean over labels, files, tasks and levels; Omni-Fundus and GMAI-Fundus are
the plain mean of the accuracies of their tasks. Beside it the report has accuracies by our own, more
lenient reading of answers: the two are never mixed. Pure. Neighbours: scores.py (the numbers), report.py
(the whole report).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fundus_jax.evaluation import scores
from fundus_jax.evaluation.extract import Mode, answer_text, chosen
from fundus_jax.evaluation.items import Item


def evaluate_published(
    benchmark: str, items: Sequence[Item], responses: Sequence[str], *, mode: Mode, seed: int = 0
) -> dict[str, Any]:
    """The published score of answers [N] to items [N].

    Keys:
        benchmark, extraction: what is scored, and by whose rules.
        groups: the figure of each level or task; score: that of their mean; None as value where one has none.
        lacking: the groups without an answer.
        unparsed: how many answers name no option by these rules; unparsed_ids: whose.
        undefined: FunBench's labels without a score.
    """
    found = [
        chosen(response, item.options, mode, multiple=item.multiple, part=item.part)
        for item, response in zip(items, responses, strict=True)
    ]
    units = [item.unit for item in items]
    undefined: list[str] = []
    if benchmark == "FunBench":
        fun = scores.funbench(
            [(item.level, item.task, item.part) for item in items],
            [item.answers for item in items],
            [one or () for one in found],
            [item.options for item in items],
            units=units,
            seed=seed,
        )
        figures = {level: fun.figures[level,] for level in sorted({item.level for item in items})}
        figures |= {"": fun.figures[()]}
        undefined = list(fun.undefined)
    else:
        hits = [one is not None and one == item.answers for item, one in zip(items, found, strict=True)]
        tasks = [item.task for item in items]
        figures = scores.group_figures(benchmark, tasks, np.array(hits), units=units, seed=seed)
    groups = scores.PAPER_GROUPS[benchmark]
    score = figures[""].as_dict()
    lacking = [name for name in groups if name not in figures or not figures[name].n]
    if lacking:
        score = {"value": None, "n": score["n"], "low": None, "high": None}
    return {
        "benchmark": benchmark,
        "extraction": mode,
        "groups": {name: figures[name].as_dict() for name in groups if name not in lacking},
        "score": score,
        "lacking": lacking,
        "unparsed": sum(one is None for one in found),
        "unparsed_ids": [item.id for item, one in zip(items, found, strict=True) if one is None],
        "undefined": undefined,
    }


def evaluate_sets(
    items: Sequence[Item],
    extracted: Sequence[Sequence[str] | None],
    responses: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Set scores by task: of the chosen options where several may be right, and of the words of the answer
    where a question has no options. None where there are neither.

    The report's reading of the answers counts (`extracted`); one that names no option is the empty set.
    """
    members: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if item.multiple or not item.options:
            members.setdefault(item.task, []).append(i)
    found = {}
    for task, index in sorted(members.items()):
        pairs = [_sets(items[i], extracted[i], responses[i]) for i in index]
        gold, given = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        figures = scores.set_figures(gold, given, units=[items[i].unit for i in index], seed=seed)
        found[task] = {name: one.as_dict() for name, one in figures.items()}
    return found or None


def _sets(item: Item, extracted: Sequence[str] | None, response: str) -> tuple[set[str], set[str]]:
    if item.options:
        return set(item.answers), set(extracted or ())
    return _words(item.answer), _words(answer_text(response))


def _words(text: str) -> set[str]:
    """The words of an open answer, without case and punctuation; the text itself where it has none."""
    return {word.strip(".,;:()[]\"'") for word in text.casefold().split()} - {""} or {text}
