"""The sampler: S slots that work through any number of prompts, so that one long answer does not hold the
others.

A slot is one prompt and its group. Decoding returns to the host when enough slots have ended; the host has
the next prompts read and put into them, and goes on. A rollout's random numbers follow from the seed and its
prompt's number alone, so the tokens are those of `rollout.generate`, whatever S is. Four programs are
compiled, each once: open, fill, decode, close. Neighbours: `rollout` (the loop), `train`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fundus_jax.grpo.rollout import Decoding, Groups, Rollout, Settings, as_key, begin, decode, start
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.decode import Stepper, pinned
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import ConfigError

Array = jax.Array
Split = tuple[nnx.GraphDef, Any]  # a module as nnx.split gives it


class Pool(NamedTuple):
    """S slots, and the rollouts of all B prompts as far as they are known."""

    slots: Decoding
    done: Rollout


class Counts(NamedTuple):
    """What `sample` did.

    Attributes:
        steps: decoding steps of all slots together.
        busy: slot-steps in which the slot had a rollout to continue.
        slots: S.
        fills: prefills, each of `refill` prompts.
    """

    steps: int
    busy: int
    slots: int
    fills: int

    @property
    def occupancy(self) -> float:
        """Share of the slot-steps that were busy; 1 if there was nothing to decode."""
        return self.busy / (self.steps * self.slots) if self.steps else 1.0

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl records of it."""
        return {
            "sampler/occupancy": self.occupancy,
            "sampler/steps": float(self.steps),
            "sampler/fills": float(self.fills),
        }


def sample(
    model: Qwen2_5_VL,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    group_size: int = 1,
    seed: int | Array = 0,
    slots: int = 0,
    refill: int = 0,
) -> tuple[Rollout, Counts]:
    """What `rollout.generate` returns for the B rows of `batch`, with `slots` of them decoded at a time.

    slots: S, 0 for all B. refill: as soon as so many slots are free, the next prompts are prefilled, so many
    at once; 0 is a quarter of the slots. Many mean fewer and larger prefills, few mean fuller slots. On a
    mesh data x fsdp should divide both. Raises ConfigError for a negative temperature, sizes below 1, or more
    to refill than there are slots.
    """
    settings = Settings(max_new_tokens, float(temperature), group_size)
    settings.check()
    rows = batch.tokens.shape[0]
    slots = min(slots or rows, rows)
    refill = refill or (max(1, slots // 4) if slots < rows else rows)
    if not 1 <= refill <= slots:
        raise ConfigError(f"slots {slots} and refill {refill}: refill must lie between 1 and slots")
    key, split = as_key(seed), nnx.split(model)
    stepper, pool = _open(split, batch, key, settings, slots)
    free, given, fills = np.ones(slots, bool), 0, 0
    while given < rows or not free.all():
        while given < rows and free.sum() >= min(refill, rows - given):
            numbers = np.arange(given, min(given + refill, rows))
            taken = np.flatnonzero(free)[: len(numbers)]
            spare = (0, refill - len(numbers))  # rows that fill up the last prefill go nowhere
            index, where = np.pad(numbers, spare, mode="edge"), np.pad(taken, spare, constant_values=slots)
            pool = _fill(split, stepper, pool, batch, index, where, key, settings)
            free[taken], given, fills = False, given + len(numbers), fills + 1
        enough = min(refill, rows - given) if given < rows else slots
        pool, ended = _decode(stepper, pool, key, settings, enough)
        free = np.array(ended)
    counts = Counts(int(pool.slots.steps), int(pool.slots.busy), slots, fills)
    return _close(pool.done, pool.slots.groups), counts


@functools.partial(jax.jit, static_argnums=(3, 4))
def _open(model: Split, batch: Batch, key: Array, settings: Settings, slots: int) -> tuple[Stepper, Pool]:
    """The weights as decoding wants them, and S slots that are free; their prompts' number is B, nobody's."""
    stepper = nnx.merge(*model).stepper()
    rows = batch.tokens.shape[0]

    def first() -> Any:
        return begin(nnx.merge(*model), stepper, batch, jnp.arange(rows), key, settings)

    made = jax.eval_shape(first)
    groups = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), made)
    groups = pinned(groups._replace(number=jnp.full(slots, rows, jnp.int32)))
    done = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made.out)
    return stepper, Pool(start(stepper, groups, settings), pinned(done))


@functools.partial(jax.jit, static_argnums=7, donate_argnums=2)
def _fill(
    model: Split,
    stepper: Stepper,
    pool: Pool,
    batch: Batch,
    index: Array,
    where: Array,
    key: Array,
    settings: Settings,
) -> Pool:
    """Read the prompts `index` of the batch into the slots `where` (S: into none), after writing down what
    was said there."""
    prompts = pinned(jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), batch))
    new = begin(nnx.merge(*model), stepper, prompts, index, key, settings)
    groups = jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), pool.slots.groups, new)
    return Pool(pool.slots._replace(groups=pinned(groups)), _written(pool.done, pool.slots.groups))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
def _decode(
    stepper: Stepper, pool: Pool, key: Array, settings: Settings, enough: Array
) -> tuple[Pool, Array]:
    """Go on until `enough` slots are free; also says which are."""
    slots = decode(stepper, pool.slots, key, settings, enough)
    return Pool(slots, pool.done), ~slots.groups.alive.any(axis=1)


def _written(done: Rollout, groups: Groups) -> Rollout:
    """The rollouts of all prompts, with those of the slots in their places."""

    def put(done: Array, said: Array) -> Array:
        return done.at[groups.number].set(said, mode="drop")

    return pinned(jax.tree.map(put, done, groups.out))


_close = jax.jit(_written, donate_argnums=0)
