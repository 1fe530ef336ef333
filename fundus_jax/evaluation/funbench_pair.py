"""FunBench's score of two evaluations of the same questions, in pairs.

The score is no mean over questions, so its difference is no mean of differences: in every resample of the
bootstrap both scores are computed from the same units, patients or images, and subtracted. Which labels have
a score depends on the right answers alone, so both sides average the same ones. Pure. Neighbours: scores.py
(the score), compare.py (whose lines these are).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fundus_jax.evaluation import scores
from fundus_jax.evaluation.bootstrap import interval
from fundus_jax.evaluation.extract import Mode, chosen
from fundus_jax.records import DataError

Line = Mapping[str, Any]  # of predictions.jsonl
SIDES = ("first", "second")
LEVELS = scores.PAPER_GROUPS["FunBench"]

Read = Callable[[Line], Sequence[str] | None]  # an answer -> the option texts that it chooses
Pair = dict[str, dict[str, Any]]  # first, second, difference -> a figure


def by_report(one: Line) -> Sequence[str] | None:
    """The reading that the accuracies of a report rest on."""
    return one["extracted"]


def by_rules(mode: Mode) -> Read:
    """The reading of published scores: the rules of a mode alone.

    Raises:
        DataError: lines that do not say of a question whether it has several answers, as older ones.
    """

    def read(one: Line) -> Sequence[str] | None:
        if "multiple" not in one:
            raise DataError(
                f"{one['id']}: its line does not say whether several answers are right; evaluate again"
            )
        return chosen(one["response"], one["options"], mode, multiple=one["multiple"], part=one["part"])

    return read


def pairs(
    first: Sequence[Line], second: Sequence[Line], read: Read, *, seed: int = 0
) -> dict[tuple[str, ...], Pair]:
    """The scores of two evaluations and their difference, second - first, keyed by (level, task), (level,)
    and () for their mean; {} where no question has a level. n counts questions; several samples of one count
    together."""
    sided = [
        (side, one)
        for side, lines in zip(SIDES, (first, second), strict=True)
        for one in lines
        if one["level"]
    ]
    if not sided:
        return {}
    asked = [one for _, one in sided]
    found = scores.with_means(
        scores.resampled_tables(
            [(side, one["level"], one["task"], one["part"]) for side, one in sided],
            [one["answers"] for one in asked],
            [read(one) or () for one in asked],
            [one["options"] or one["answers"] for one in asked],
            [one["unit"] for one in asked],
            seed,
        )
    )
    places = {one["id"]: (one["level"], one["task"]) for one in asked}
    pairs = {}
    for place, n in sorted(scores.counted(list(places.values())).items()):
        ones, twos = (found[(side, *place)] for side in SIDES)
        rows = {"first": ones, "second": twos, "difference": twos - ones}
        pairs[place] = {name: interval(row[0], row[1:], n).as_dict() for name, row in rows.items()}
    return pairs


def published(first: Sequence[Line], second: Sequence[Line], mode: Mode, *, seed: int = 0) -> dict[str, Any]:
    """The published score of two evaluations, by the rules of `mode` alone.

    Keys: benchmark, extraction; groups: the pair of each level; score: that of their mean, without values
    where a level has no question; lacking: these levels.
    """
    found = pairs(first, second, by_rules(mode), seed=seed)
    groups = {level: found[level,] for level in LEVELS if (level,) in found}
    lacking = [level for level in LEVELS if level not in groups]
    nothing = {"value": None, "low": None, "high": None} if lacking else {}
    score = {name: figure | nothing for name, figure in found[()].items()}
    return {
        "benchmark": "FunBench",
        "extraction": mode,
        "groups": groups,
        "score": score,
        "lacking": lacking,
    }
