"""The sampler: S slots that work through any number of prompts, so that one long answer does not hold the
others.

A slot is one prompt and its group. Decoding returns to the host when enough slots have ended; the host has
the next prompts read and put into them, and goes on. It also returns after `STEPS` steps: between two calls
the run can be stopped, on several hosts too. A rollout's random numbers follow from the seed and its prompt's
number alone, so the tokens are those of `rollout.generate`, whatever S is. Four programs are compiled, each
once. Neighbours: `rollout` (the loop), `train`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fundus_jax import stop
from fundus_jax.grpo.rollout import Decoding, Groups, Rollout, Settings, as_key, begin, decode, start
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.decode import Stepper, pinned
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import ConfigError
from fundus_jax.sharding import constrain, parts

Array = jax.Array
STEPS = 64  # of one call: a second or two with the largest models, hundreds of times what a call costs
Split = tuple[nnx.GraphDef, Any]  # a module as nnx.split gives it


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

    def plus(self, other: Counts) -> Counts:
        """Of both together."""
        sums = (mine + others for mine, others in zip(self, other, strict=True))
        return Counts(*sums)._replace(slots=self.slots)

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
    to refill than there are slots; Stopped where the run is to stop.
    """
    settings = Settings(max_new_tokens, float(temperature), group_size)
    settings.check()
    rows = batch.tokens.shape[0]
    slots, refill = sizes(rows, slots, refill)
    key, split = as_key(seed), nnx.split(model)
    stepper = make_stepper(split)
    if slots == rows:
        decoding, free = fill_all(split, stepper, batch, key, settings), np.zeros(rows, bool)
        while not free.all():
            decoding, ended = decode_slots(stepper, decoding, key, settings, rows, STEPS)
            free = np.array(stop.settle(ended))
        return decoding.groups.out, Counts(int(decoding.steps), int(decoding.busy), slots, 1)
    queue = Queue(rows, slots, refill)
    decoding, done = open_slots(split, stepper, batch, key, settings, slots)
    while not queue.over:
        while queue.waits:
            place = queue.take()
            decoding, done = fill_slots(split, stepper, decoding, done, batch, *place, key, settings)
        decoding, ended = decode_slots(stepper, decoding, key, settings, queue.enough, STEPS)
        queue.free = np.array(stop.settle(ended)).reshape(queue.free.shape)
    counts = Counts(int(decoding.steps), int(decoding.busy), slots, queue.fills)
    return close_slots(done, decoding.groups, len(queue.free)), counts


def sizes(rows: int, slots: int, refill: int) -> tuple[int, int]:
    """Slots and refill for `rows` prompts, with the defaults of `sample` in the place of zeros: a quarter of
    the slots, of each shard of the batch as many. Raises ConfigError for more to refill than there are
    slots."""
    slots = min(slots or rows, rows)
    shards = parts("batch", math.gcd(rows, slots))
    refill = refill or (shards * max(1, slots // (4 * shards)) if slots < rows else rows)
    if not 1 <= refill <= slots:
        raise ConfigError(f"slots {slots} and refill {refill}: refill must lie between 1 and slots")
    return slots, refill


class Queue:
    """Which prompts wait for which slots: the host's side of `sample`.

    On a mesh every shard of the batch has a queue and slots of its own, so that no prompt and no key leaves
    its devices; `free` is [shards, slots of one].
    """

    def __init__(self, rows: int, slots: int, refill: int) -> None:
        whole = parts("batch", math.gcd(rows, slots, refill))
        self.rows, self.refill = rows // whole, refill // whole  # of one shard
        self.free = np.ones((whole, slots // whole), bool)
        self.given = np.zeros(whole, int)  # prompts of each shard that have got a slot
        self.fills = 0

    @property
    def over(self) -> bool:
        """Whether all prompts have been answered."""
        return bool((self.given == self.rows).all() and self.free.all())

    def _short(self) -> np.ndarray:
        """Of the shards whose prompts wait, how many more slots each must have before it can be refilled."""
        left = self.rows - self.given
        return np.maximum(np.minimum(self.refill, left) - self.free.sum(axis=1), 0)[left > 0]

    @property
    def waits(self) -> bool:
        """Whether it is time to refill: half of the shards whose prompts wait have room."""
        short = self._short()
        return len(short) > 0 and 2 * (short == 0).sum() >= len(short)

    @property
    def enough(self) -> int:
        """Free slots before which it can not be time again: there decoding returns."""
        short = np.sort(self._short())
        if not len(short):
            return self.free.size
        return int(self.free.sum() + max(1, short[: -(-len(short) // 2)].sum()))

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """The next prompts and their slots, numbered within each shard, [shards, refill]; where there is no
        prompt or no slot, the slot is one that does not exist, and the prompt any."""
        shape = (len(self.free), self.refill)
        index, where = np.zeros(shape, int), np.full(shape, self.free.shape[1])
        for shard, free in enumerate(self.free):
            taken = np.flatnonzero(free)[: min(self.refill, self.rows - self.given[shard])]
            index[shard, : len(taken)] = self.given[shard] + np.arange(len(taken))
            where[shard, : len(taken)] = taken
            free[taken] = False
            self.given[shard] += len(taken)
        self.fills += 1
        return index, where


def make_stepper(model: Split) -> Stepper:
    """The weights as decoding wants them, gathered layer by layer: all at once would need twice the room."""
    layers = range(nnx.merge(*model).config.num_hidden_layers)
    return dataclasses.replace(gather_ends(model), layers=tuple(gather_layer(model, i) for i in layers))


@jax.jit
def gather_layer(model: Split, index: Array) -> Any:
    """The weights of one layer."""
    return nnx.merge(*model).decoding_layer(index)


@jax.jit
def gather_ends(model: Split) -> Any:
    """The weights before the first and behind the last layer: a Stepper without layers."""
    return nnx.merge(*model).stepper_of()


@functools.partial(jax.jit, static_argnums=4)
def fill_all(model: Split, stepper: Stepper, batch: Batch, key: Array, settings: Settings) -> Decoding:
    """A slot for every prompt, read into it."""
    rows = jnp.arange(batch.tokens.shape[0])
    return start(stepper, begin(nnx.merge(*model), stepper, batch, rows, key, settings), settings)


@functools.partial(jax.jit, static_argnums=(4, 5))
def open_slots(
    model: Split, stepper: Stepper, batch: Batch, key: Array, settings: Settings, slots: int
) -> tuple[Decoding, Rollout]:
    """S slots that are free, their prompts' number being B, nobody's; and the rollouts of all prompts, of
    which nothing is known."""
    rows = batch.tokens.shape[0]
    made = jax.eval_shape(lambda: begin(nnx.merge(*model), stepper, batch, jnp.arange(rows), key, settings))
    groups = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), made)
    groups = pinned(groups._replace(number=jnp.full(slots, rows, jnp.int32)))
    done = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made.out)
    return start(stepper, groups, settings), pinned(done)


@functools.partial(jax.jit, static_argnums=8, donate_argnums=(2, 3))
def fill_slots(
    model: Split,
    stepper: Stepper,
    decoding: Decoding,
    done: Rollout,
    batch: Batch,
    index: Array,
    where: Array,
    key: Array,
    settings: Settings,
) -> tuple[Decoding, Rollout]:
    """Read the prompts `index` of each shard of the batch into its slots `where` (`Queue.take`), after
    writing down what was said there."""
    shards = len(index)
    prompts = pinned(_each(shards, lambda rows, index: rows[index], batch, index))
    number = (index + jnp.arange(shards)[:, None] * (len(batch.tokens) // shards)).reshape(-1)
    new = begin(nnx.merge(*model), stepper, prompts, number, key, settings)
    groups = jax.tree.map(lambda old, new: put(shards, old, where, new), decoding.groups, new)
    return decoding._replace(groups=pinned(groups)), _written(done, decoding.groups, shards)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
def decode_slots(
    stepper: Stepper, decoding: Decoding, key: Array, settings: Settings, enough: Array, most: Array
) -> tuple[Decoding, Array]:
    """Go on until `enough` slots are free, but for at most `most` steps; also says which are free."""
    decoding = decode(stepper, decoding, key, settings, enough, most)
    return decoding, constrain(~decoding.groups.alive.any(axis=1), None)  # whole: the host reads it


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def close_slots(done: Rollout, groups: Groups, shards: int) -> Rollout:
    """The rollouts of all prompts, when every slot has ended; `shards` as the queue has them."""
    return _written(done, groups, shards)


def _written(done: Rollout, groups: Groups, shards: int) -> Rollout:
    """The rollouts of all prompts, with those of the slots in their places."""
    rows = len(done.tokens) // shards
    own = groups.number.reshape(shards, -1) - rows * jnp.arange(shards)[:, None]
    own = jnp.where(groups.number.reshape(shards, -1) < rows * shards, own, rows)  # nobody's: nowhere
    return pinned(jax.tree.map(lambda done, said: put(shards, done, own, said), done, groups.out))


def _each(shards: int, act: Any, tree: Any, *more: Array) -> Any:
    """`act` on every shard of the leaves of `tree` by itself; `more` have a leading axis of shards."""

    def one(leaf: Array) -> Array:
        made = jax.vmap(act)(jnp.reshape(leaf, (shards, len(leaf) // shards, *leaf.shape[1:])), *more)
        return made.reshape(shards * made.shape[1], *made.shape[2:])

    return jax.tree.map(one, tree)


def put(shards: int, old: Array, where: Array, new: Array) -> Array:
    """`old` with the rows of `new` in the places `where` [shards, n], each shard by itself."""
    new = new.reshape(shards, len(new) // shards, *new.shape[1:])
    return _each(shards, lambda old, where, new: old.at[where].set(new, mode="drop"), old, where, new)
