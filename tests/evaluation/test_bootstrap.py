"""Intervals: seeded, of the right width, by units, and the same as drawing rows one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fundus_jax.evaluation.bootstrap import Figure, figure, interval, resampled_totals, unit_totals
from fundus_jax.evaluation.scores import accuracy, mean, paired_difference
from fundus_jax.records import ConfigError


def test_interval_has_the_width_of_a_binomial() -> None:
    hits = [True] * 300 + [False] * 100
    found = accuracy(hits, seed=1)
    error = math.sqrt(0.75 * 0.25 / 400)
    assert found.value == 0.75
    assert found.n == 400
    assert found.low == pytest.approx(0.75 - 1.96 * error, abs=0.006)
    assert found.high == pytest.approx(0.75 + 1.96 * error, abs=0.006)
    assert accuracy(hits, seed=1) == found
    assert accuracy(hits, seed=2) != found


def test_resampled_totals_are_distributed_as_drawn_rows() -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 3, (40, 4)).astype(float)
    ours = resampled_totals(rows, seed=5, resamples=20_000)
    drawn = rows[rng.integers(0, 40, (20_000, 40))].sum(axis=1)
    np.testing.assert_allclose(ours.mean(axis=0), drawn.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(np.cov(ours.T), np.cov(drawn.T), rtol=0.1, atol=0.6)


def test_blocks_do_not_change_the_number_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fundus_jax.evaluation.bootstrap._BLOCK_CELLS", 50)
    rows = np.arange(20.0)[:, None]
    totals = resampled_totals(rows, resamples=101)
    assert totals.shape == (101, 1)
    assert len(np.unique(totals)) > 50


def test_answers_of_one_unit_are_drawn_together() -> None:
    """Four copies of each answer carry no more information than one."""
    hits = np.random.default_rng(0).random(100) < 0.6
    once = accuracy(hits)
    copies = accuracy(np.repeat(hits, 4), units=np.repeat(np.arange(100), 4).tolist())
    naive = accuracy(np.repeat(hits, 4))
    assert copies == Figure(once.value, 400, once.low, once.high)
    assert naive.high - naive.low < 0.7 * (once.high - once.low)  # type: ignore[operator]


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    first = np.array([True] * 60 + [False] * 40)
    second = first.copy()
    second[:5] = False
    found = paired_difference(first, second)
    assert found.value == pytest.approx(0.05)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low < 0.05 < found.high < 0.11
    with pytest.raises(ConfigError, match="100 and 99"):
        paired_difference(first, second[:99])


def test_undefined_stays_undefined() -> None:
    assert accuracy([]) == Figure(None, 0, None, None)
    assert interval(float("nan"), np.array([0.1]), 3) == Figure(None, 3, None, None)
    found = interval(0.5, np.array([0.4, np.nan, 0.6]), 3)  # resamples without a value are left out
    assert found.low == pytest.approx(0.405)
    assert figure(np.zeros((2, 1)), lambda sums: sums[..., 0] * np.nan) == Figure(None, 2, None, None)


def test_units_are_summed_in_order() -> None:
    np.testing.assert_array_equal(
        unit_totals(np.array([[1.0], [2.0], [4.0]]), ["b", "a", "b"]), [[5.0], [2.0]]
    )
    with pytest.raises(ConfigError, match="1 units for 2 rows"):
        unit_totals(np.zeros((2, 1)), ["a"])


def test_mean_of_numbers() -> None:
    assert mean(np.array([1.0, 2.0, 6.0])).value == 3.0
