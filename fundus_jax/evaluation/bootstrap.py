"""Numbers with their uncertainty: a value, the count behind it, and a 95% bootstrap interval.

Every statistic of this package is a function of column sums: an answer adds a row of counts, the score reads
the totals. A bootstrap then needs no second pass over the answers: how often each unit is drawn is one
multinomial sample, and the resampled totals are a matrix product. The unit of resampling is the patient (or
image), not the answer, because several questions about one retina, or several samples of one question, are
not independent.

Undefined values (0/0) are never replaced by a number: they are NaN inside and `Figure.value = None` outside.
Neighbours: scores.py (the statistics).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fundus_jax.records import ConfigError

RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)
_BLOCK_CELLS = 4_000_000  # draws (resamples x units) held at once: bounds memory at 32 MB


@dataclass(frozen=True, slots=True)
class Figure:
    """One number: value (None: undefined), the count n it rests on, and the ends of its 95% interval."""

    value: float | None
    n: int
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """The four fields as plain JSON values."""
        return asdict(self)


def unit_totals(rows: np.ndarray, units: Sequence[Hashable] | None = None) -> np.ndarray:
    """Adds the rows [N, C] that share a unit: [U, C], in order of first appearance. None: each row is a unit.

    Raises:
        ConfigError: another number of units than of rows.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if units is None:
        return rows
    if len(units) != len(rows):
        raise ConfigError(f"{len(units)} units for {len(rows)} rows: give one unit per row")
    number: dict[Hashable, int] = {}
    index = np.fromiter((number.setdefault(unit, len(number)) for unit in units), np.intp, len(units))
    totals = np.zeros((len(number), rows.shape[1]))
    np.add.at(totals, index, rows)
    return totals


def resampled_totals(totals: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Column sums [R, C] of R bootstrap samples of the units [U, C], each of U units drawn with replacement.

    Units with equal rows are drawn together, since only how many of each kind are drawn matters. That is the
    same distribution, and makes the usual case (a column of hits) as cheap as a few binomials.
    """
    distinct, frequency = np.unique(totals, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    share = frequency / len(totals)
    step = max(1, _BLOCK_CELLS // len(distinct))
    blocks = [
        rng.multinomial(len(totals), share, size=min(step, resamples - start)).astype(np.float64) @ distinct
        for start in range(0, resamples, step)
    ]
    return np.concatenate(blocks)


def figure(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    n: int | None = None,
    units: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Figure:
    """`statistic`, which maps column sums [..., C] to [...], of the rows [N, C]; `n` defaults to N."""
    n = len(rows) if n is None else n
    if len(rows) == 0:
        return Figure(None, n, None, None)
    totals = unit_totals(rows, units)
    return interval(statistic(totals.sum(axis=0)), statistic(resampled_totals(totals, seed=seed)), n)


def interval(value: float | np.ndarray, resampled: np.ndarray, n: int) -> Figure:
    """Figure of a value and its resampled values [R]; resamples in which it is undefined are left out."""
    value = float(value)
    defined = resampled[~np.isnan(resampled)]
    if math.isnan(value) or not len(defined):
        return Figure(None, n, None, None)
    low, high = np.percentile(defined, _PERCENTILES)
    return Figure(value, n, float(low), float(high))
