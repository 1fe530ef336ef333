"""Dynamic sampling: which groups take whose places, when it ends, and what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fundus_jax.grpo.redraw import Draw, redraw
from fundus_jax.grpo.rewards import Score
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.sampler import Counts

STEP, STEPS = 3, 10
FLAT, VARIED, LOST = (1.0, 1.0), (0.0, 1.0), (None, 1.0)  # LOST: the judge abstained on one of two


def a_score(total: float | None) -> Score:
    return Score(answer=0.0, format=0.0, process=0.0, total=total)


class World:
    """Draws of four prompts each, whose rewards are given; every array tells which prompt it belongs to."""

    def __init__(self, *draws: list[tuple], old: bool = True) -> None:
        self.draws, self.old = draws, old
        self.asked: list[int] = []
        self.batches: list[Any] = []

    def ask(self, number: int) -> Draw:
        groups = self.draws[len(self.asked)]
        index = 10 * len(self.asked) + np.arange(len(groups))
        self.asked.append(number)
        rows = np.broadcast_to(index[:, None, None].astype(np.float32), (len(groups), 2, 5))
        said = Rollout(rows, rows + 0.5, rows >= 0)  # type: ignore[arg-type]
        scores = [[a_score(total) for total in group] for group in groups]
        return Draw(
            index=index,
            batch=f"batch {index.tolist()}",
            rollout=said,
            said=said,
            ref=None,
            old=rows + 0.25 if self.old else None,  # type: ignore[arg-type]
            texts=[[f"{i}a", f"{i}b"] for i in index],
            scores=scores,
            every=scores,
            counts=Counts(10, 30, 4, 1),
        )

    def put(self, index: np.ndarray, rows: Any) -> tuple[Any, Any]:
        self.batches.append(f"batch {index.tolist()}")
        return self.batches[-1], rows

    def fill(self, most: int) -> tuple[Draw, dict[str, float]]:
        return redraw(self.ask, self.put, most, STEP, STEPS)


def told(draw: Draw) -> list[int]:
    """The prompts of a draw, after a check that everything in it is theirs, in their order."""
    index = draw.index.tolist()
    assert draw.batch == f"batch {index}"
    for array, offset in zip(
        (*draw.rollout[:2], *draw.said[:2], draw.old), (0, 0.5, 0, 0.5, 0.25), strict=True
    ):
        assert (np.asarray(array) - offset).mean(axis=(1, 2)).tolist() == index
    assert draw.texts == [[f"{i}a", f"{i}b"] for i in index]
    return index


def test_without_extra_draws_nothing_is_looked_at() -> None:
    world = World([FLAT] * 4)
    draw, metrics = world.fill(0)
    assert (told(draw), metrics) == ([0, 1, 2, 3], {})
    assert (world.asked, world.batches) == ([STEP], [])


def test_a_draw_that_teaches_is_left_alone() -> None:
    world = World([VARIED] * 4)
    draw, metrics = world.fill(3)
    assert told(draw) == [0, 1, 2, 3]
    assert (world.asked, world.batches) == ([STEP], [])
    assert metrics == {
        **{"redraw/batches": 0, "redraw/replaced": 0, "redraw/left": 0, "redraw/unused": 0},
        **{"redraw/flat": 0, "redraw/reward": 0.5},
    }


def test_flat_groups_and_those_the_judge_lost_give_their_places_in_order() -> None:
    world = World([VARIED, FLAT, LOST, FLAT], [FLAT, VARIED, FLAT, FLAT], [VARIED, VARIED, FLAT, VARIED])
    draw, metrics = world.fill(3)
    assert told(draw) == [0, 11, 20, 21]
    totals = [[score.total for score in group] for group in draw.scores]
    assert totals == [list(VARIED)] * 4
    assert world.asked == [STEP, STEP + STEPS, STEP + 2 * STEPS], "numbers that no other step has"
    assert world.batches == ["batch [0, 11, 20, 21]"], "put together once"
    assert draw.counts == Counts(30, 90, 4, 3)
    assert len(draw.every) == 12
    assert metrics["redraw/batches"] == 2
    assert metrics["redraw/replaced"] == 3
    assert metrics["redraw/left"] == 0
    assert metrics["redraw/unused"] == 1, "prompt 23"
    assert metrics["redraw/flat"] == pytest.approx(7 / 12)
    assert metrics["redraw/reward"] == pytest.approx((5 * 1 + 1 + 6 * 2) / (5 * 2 + 1 + 6 * 2))


def test_the_cap_ends_it_and_what_is_left_is_counted() -> None:
    world = World([FLAT] * 4, [FLAT, FLAT, VARIED, FLAT], [FLAT] * 4, [VARIED] * 4)
    draw, metrics = world.fill(2)
    assert told(draw) == [12, 1, 2, 3]
    assert len(world.asked) == 3
    assert (metrics["redraw/left"], metrics["redraw/replaced"]) == (3, 1)


def test_draws_that_bring_nothing_leave_the_step_as_it_was() -> None:
    draw, metrics = World([FLAT] * 4, [FLAT] * 4).fill(1)
    assert told(draw) == [0, 1, 2, 3]
    assert (metrics["redraw/batches"], metrics["redraw/flat"]) == (1, 1)


def test_what_is_not_there_is_not_put_together() -> None:
    draw, _ = World([FLAT] * 4, [VARIED] * 4, old=False).fill(1)
    assert draw.old is None
    assert draw.ref is None
    assert draw.index.tolist() == [10, 11, 12, 13]
