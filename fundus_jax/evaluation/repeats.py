"""What several answers to each question say: pass@k, majority@k, and whether agreement means being right.

pass@k is the chance that one of k answers is right, majority@k that the answer most of them give is: both are
exact expectations over all ways to draw k of the n answers (pass@k: Chen et al. 2021, arXiv:2107.03374,
equation 1). Calibration takes the share of the answers that agree with the majority as the model's confidence
in it. Pure. Neighbours: bootstrap.py (intervals), slices.py (by data set, modality and disease).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from fundus_jax.evaluation import scores
from fundus_jax.evaluation.bootstrap import Figure, figure
from fundus_jax.records import ConfigError

BINS = 10  # of the reliability table, equally wide: (0, 0.1], ... (0.9, 1]


@dataclass(frozen=True, slots=True)
class Repeats:
    """The answers to one question: what they choose, None for those that choose nothing; what is right; and
    the unit (patient or image) of the question."""

    given: tuple[Hashable | None, ...]
    right: Hashable
    unit: str

    @property
    def hits(self) -> int:
        """How many are right."""
        return sum(one == self.right for one in self.given)

    @property
    def majority(self) -> tuple[Hashable | None, float]:
        """The answer given most often, of equally frequent ones the first, and the share of all answers that
        give it; (None, 0) where none chooses anything."""
        counts = Counter(one for one in self.given if one is not None)
        if not counts:
            return None, 0.0
        answer = max(counts, key=lambda one: counts[one])  # the first of equals: Counter keeps their order
        return answer, counts[answer] / len(self.given)


def pass_at(n: int, hits: int, k: int) -> float:
    """The chance that k of n answers, `hits` of them right, include a right one.

    >>> pass_at(4, 1, 2)
    0.5
    """
    if not 1 <= k <= n or not 0 <= hits <= n:
        raise ConfigError(f"pass@{k} of {n} answers, {hits} right: 1 <= k <= n and hits <= n are needed")
    return 1.0 - comb(n - hits, k) / comb(n, k)


def majority_at(counts: Sequence[int], silent: int, k: int) -> float:
    """The chance that the first of `counts` wins the vote of k answers, drawn from all without replacement.

    counts: how many give the right answer, and how many each wrong one; silent: how many give none, and have
    no vote. A tie is won in equal shares.

    >>> round(majority_at([2, 1], 0, 3), 3), majority_at([1, 1], 0, 2)
    (1.0, 0.5)
    """
    right, *wrong = counts
    n = sum(counts) + silent
    if not 1 <= k <= n:
        raise ConfigError(f"majority@{k} of {n} answers: 1 <= k <= n is needed")
    won = 0.0
    for votes in range(1, min(right, k) + 1):
        # ways[drawn, ties]: of drawing so many of the others, none with more votes, so many with as many.
        ways = np.zeros((k - votes + 1, len(wrong) + 1))
        ways[: silent + 1, 0] = [comb(silent, drawn) for drawn in range(min(silent, k - votes) + 1)]
        for count in wrong:
            more = np.zeros_like(ways)
            for drawn in range(min(count, votes, k - votes) + 1):
                shifted = comb(count, drawn) * ways[: len(ways) - drawn]
                if drawn == votes:
                    more[drawn:, 1:] += shifted[:, :-1]
                else:
                    more[drawn:] += shifted
            ways = more
        shares = 1 / np.arange(1, len(wrong) + 2)
        won += comb(right, votes) * float(ways[k - votes] @ shares)
    return won / comb(n, k)


def evaluate_repeats(questions: Sequence[Repeats], *, seed: int = 0) -> dict[str, Any] | None:
    """What the answers say together; None unless every question has the same number of them, at least two.

    Keys:
        samples: answers a question.
        pass_at, majority_at: k -> figure, for k = 1, 2, 4, ... and all.
        calibration: see `calibration`.
    """
    sizes = {len(one.given) for one in questions}
    if len(sizes) != 1 or min(sizes) < 2:
        return None
    [n] = sizes
    units = [one.unit for one in questions]
    tables = [_counts(one) for one in questions]

    def mean(values: Sequence[float]) -> dict[str, Any]:
        return scores.mean(np.asarray(values), units=units, seed=seed).as_dict()

    ks = sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})
    return {
        "samples": n,
        "pass_at": {str(k): mean([pass_at(n, one.hits, k) for one in questions]) for k in ks},
        "majority_at": {str(k): mean([majority_at(*table, k) for table in tables]) for k in ks},
        "calibration": calibration(questions, seed=seed),
    }


def _counts(question: Repeats) -> tuple[list[int], int]:
    counts = Counter(one for one in question.given if one is not None and one != question.right)
    return [question.hits, *counts.values()], sum(one is None for one in question.given)


def calibration(questions: Sequence[Repeats], *, seed: int = 0) -> dict[str, Any]:
    """Whether the share of the answers that agree says how likely the majority is right.

    Keys:
        ece: expected calibration error, the mean over questions of |accuracy - share| of their bin.
        brier: mean of (share - right)^2.
        table: for each bin that has questions low, high (of the share), share (mean), accuracy.
    """
    votes = [one.majority for one in questions]
    share = np.array([share for _, share in votes])
    hit = np.array([answer == one.right for (answer, _), one in zip(votes, questions, strict=True)], float)
    place = np.clip(np.ceil(share * BINS).astype(int) - 1, 0, BINS - 1)
    units = [one.unit for one in questions]
    rows = np.zeros((len(questions), BINS + 1))
    rows[np.arange(len(questions)), place] = hit - share
    rows[:, BINS] = 1

    def error(sums: np.ndarray) -> np.ndarray:
        return scores.ratio(np.abs(sums[..., :BINS]).sum(axis=-1), sums[..., BINS])

    ece: Figure = figure(rows, error, units=units, seed=seed)
    table = []
    for number in sorted(set(place.tolist())):
        index = np.flatnonzero(place == number)
        ours = [units[i] for i in index]
        table.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "share": scores.mean(share[index], units=ours, seed=seed).as_dict(),
                "accuracy": scores.mean(hit[index], units=ours, seed=seed).as_dict(),
            }
        )
    brier = scores.mean((share - hit) ** 2, units=units, seed=seed)
    return {"ece": ece.as_dict(), "brier": brier.as_dict(), "table": table}
