"""Dynamic sampling (DAPO, Yu et al., 2025): groups that teach nothing give their places to others.

A group without variance has no advantage. Further batches of prompts are then drawn, answered and judged, at
most so many a step, and their groups with variance take the places of those without, in order. Shapes stay
what they are, so nothing is compiled for it. What is left over is dropped and counted, not kept for the next
step: the place in the data stays the iterator's, and a resumed run draws what an undisturbed one would have.
Neighbours: `train` (asks), `advantages` (what variance is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fundus_jax import hosts
from fundus_jax.grpo.advantages import group_stats, varied
from fundus_jax.grpo.rewards import Score, reward_arrays
from fundus_jax.grpo.rollout import Rollout
from fundus_jax.grpo.sampler import Counts


class Draw(NamedTuple):
    """B prompts with G rollouts each, scored and judged.

    Attributes:
        index: [B], which prompts.
        batch: the prompts themselves, on the mesh.
        rollout: what was sampled; said: the same, whole on every host, in numpy.
        ref, old: [B,G,N] log-probs of the reference and of the policy, or None.
        texts, scores: of every rollout, B groups of G; the same on every process.
        every: the scores of all groups that were drawn for it, also of those that are not in it.
        counts: what the sampler did.
    """

    index: np.ndarray
    batch: Any
    rollout: Rollout
    said: Rollout
    ref: jax.Array | None
    old: jax.Array | None
    texts: list[list[str]]
    scores: list[list[Score]]
    every: list[list[Score]]
    counts: Counts

    @property
    def teaches(self) -> np.ndarray:
        """Which groups have variance, [B] bool, going by their scores alone: neither their length nor their
        divergence, which differ almost always, make a group worth its place."""
        return varied(*reward_arrays(self.scores))


def redraw(
    ask: Callable[[int], Draw],
    put: Callable[[np.ndarray, Any], tuple[Any, Any]],
    extra_draws: int,
    step: int,
    steps: int,
) -> tuple[Draw, dict[str, float]]:
    """Returns the draw of a step, one of `steps`, for which up to `extra_draws` further ones were asked, and
    metrics (none where that is 0).

    ask: gives a draw by a number, which no other draw of the stage has; put: (index [B], a tree of whole
    numpy arrays [B,...]) -> (the batch of these prompts, the tree), both on the mesh. Every process sees the
    same scores, so all ask equally often.

    Metrics: `redraw/batches`, the further draws; of groups, `redraw/replaced`, `redraw/left` (without
    variance to the end) and `redraw/unused` (with variance, for which there was no place); of all that were
    drawn, `redraw/flat`, the share of the groups without variance, and `redraw/reward`, the mean reward,
    which unlike that of the chosen ones tells how good the policy is.
    """
    draw = ask(step)
    if not extra_draws:
        return draw, {}
    first = draw.teaches
    teaches, batches = first.copy(), 0
    while batches < extra_draws and not teaches.all():
        batches += 1
        draw = draw if draw.batch is None else _on_host(draw)
        other = _on_host(ask(step + batches * steps))
        (places,), (good,) = np.nonzero(~teaches), np.nonzero(other.teaches)
        count = min(len(places), len(good))
        draw = _replaced(draw, places[:count], other, good[:count])
        teaches[places[:count]] = True
    if batches:
        batch, (rollout, ref, old) = put(draw.index, (draw.said, draw.ref, draw.old))
        draw = draw._replace(batch=batch, rollout=rollout, ref=ref, old=old)
    rewards, valid = reward_arrays(draw.every)
    useful = varied(rewards, valid)
    return draw, {
        "redraw/batches": float(batches),
        "redraw/replaced": float(teaches.sum() - first.sum()),
        "redraw/left": float((~teaches).sum()),
        "redraw/unused": float(useful.sum() - teaches.sum()),
        "redraw/flat": float((~useful).mean()),
        "redraw/reward": float(group_stats(rewards, valid)["reward"]),
    }


def _on_host(draw: Draw) -> Draw:
    """Without its batch: the devices have room for one at a time."""
    ref, old = jax.tree.map(hosts.fetch, (draw.ref, draw.old))
    return draw._replace(batch=None, rollout=draw.said, ref=ref, old=old)


def _replaced(draw: Draw, places: np.ndarray, other: Draw, rows: np.ndarray) -> Draw:
    """`draw` with the groups `rows` of `other` at `places`, and with what sampling both took."""

    def arrays(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
        mine = mine.copy()
        mine[places] = others[rows]
        return mine

    def lists(mine: list[Any], others: list[Any]) -> list[Any]:
        new = dict(zip(places.tolist(), rows.tolist(), strict=True))
        return [others[new[row]] if row in new else group for row, group in enumerate(mine)]

    both = ((one.index, one.said, one.ref, one.old) for one in (draw, other))
    index, said, ref, old = jax.tree.map(arrays, *both)
    return draw._replace(
        index=index,
        rollout=said,
        said=said,
        ref=ref,
        old=old,
        texts=lists(draw.texts, other.texts),
        scores=lists(draw.scores, other.scores),
        every=draw.every + other.every,
        counts=draw.counts.plus(other.counts),
    )
