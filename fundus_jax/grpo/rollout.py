"""Rollouts: G continuations of each prompt, sampled by the trainer's own module in one compiled loop.

Each image is encoded and each prompt prefilled once; the group shares the prompt's keys and values. Decoding
stops as soon as every rollout has ended. The log-probs it returns are those of the distribution it drew from,
so the trainer's can be compared with them from step 0. Image and vision ids are impossible, here and in the
trainer (`models.logprobs`). Neighbours: `sampler` runs the same loop over more prompts than are decoded at
once; `models.qwen2_5_vl.decode` is one step of the model.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fundus_jax.models.batch import Batch
from fundus_jax.models.logprobs import scaled_logits
from fundus_jax.models.qwen2_5_vl.decode import Cache, Memory, Stepper
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import ConfigError
from fundus_jax.sharding import constrain

Array = jax.Array


class Rollout(NamedTuple):
    """G rollouts of N tokens for each of B prompts.

    Attributes:
        tokens: [B,G,N] int32; beyond the end token they are the first end id.
        logprobs: [B,G,N] float32, at the sampling temperature (greedy: at 1); 0 beyond the end token.
        mask: [B,G,N] bool, True up to and including the end token.
    """

    tokens: Array
    logprobs: Array
    mask: Array


class Settings(NamedTuple):
    """What a rollout is like; compiled in."""

    max_new_tokens: int
    temperature: float
    group_size: int

    @property
    def columns(self) -> int:
        """N of the cache: the last token is never read, and products want multiples of 16."""
        return -(-max(self.max_new_tokens - 1, 1) // 16) * 16

    def check(self) -> None:
        """Raises ConfigError for a negative temperature, or sizes below 1."""
        if self.max_new_tokens < 1 or self.group_size < 1 or not self.temperature >= 0:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} and group_size {self.group_size} must be >= 1, "
                f"temperature {self.temperature} >= 0"
            )


class Groups(NamedTuple):
    """B prompts and how far their groups have come.

    Attributes:
        memory: the prompts' keys and values.
        position: [B] int32, the M-RoPE position of a prompt's first new token.
        number: [B] int32, the prompt's number among all: it alone tells its random numbers from others'.
        step: [B] int32, tokens drawn.
        last: [B,G] int32, the token drawn last.
        alive: [B,G] bool, the rollouts that have not ended.
        out: what was drawn.
    """

    memory: Memory
    position: Array
    number: Array
    step: Array
    last: Array
    alive: Array
    out: Rollout


class Decoding(NamedTuple):
    """The loop's state: S groups, their cache, and counters of the steps taken.

    In step t all groups write into column t mod N of the cache, wherever in their own rollouts they are, so
    that nothing is scattered; a group sees the columns written since it began.

    Attributes:
        steps: [] int32, the steps so far.
        busy: [] int32, summed over the steps, the groups that had a rollout to continue.
    """

    groups: Groups
    cache: Cache
    steps: Array
    busy: Array


def generate(
    model: Qwen2_5_VL,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    group_size: int = 1,
    seed: int | Array = 0,
) -> Rollout:
    """Sample `group_size` continuations of every row of `batch`; temperature 0 is greedy.

    A rollout ends with any id of `model.config.eos_ids` or after `max_new_tokens`. Equal seeds (a number, or
    a key of jax.random) give equal rollouts, on any mesh. Compiled once a shape and setting. Raises
    ConfigError for a negative temperature, or sizes below 1.
    """
    settings = Settings(max_new_tokens, float(temperature), group_size)
    settings.check()
    return _generate(*nnx.split(model), batch, as_key(seed), settings)


def as_key(seed: int | Array) -> Array:
    """A number or a key of jax.random, as a key."""
    return seed if isinstance(seed, jax.Array) else jax.random.key(seed)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(graph: nnx.GraphDef, state: nnx.State, batch: Batch, key: Array, settings: Settings) -> Rollout:
    model = nnx.merge(graph, state)
    stepper = model.stepper()
    rows = jnp.arange(batch.tokens.shape[0])
    decoding = start(stepper, begin(model, stepper, batch, rows, key, settings), settings)
    return decode(stepper, decoding, key, settings, len(rows), settings.max_new_tokens).groups.out


def begin(
    model: Qwen2_5_VL, stepper: Stepper, batch: Batch, number: Array, key: Array, settings: Settings
) -> Groups:
    """Read the prompts of `batch`, which have the numbers [B], and draw the first token of every rollout."""
    prompt = model.prefill(batch)
    rows, group = batch.tokens.shape[0], settings.group_size
    shape = (rows, group, settings.max_new_tokens)
    ends = _ends(model.config)
    nothing = Rollout(jnp.full(shape, ends[0]), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    groups = Groups(
        memory=stepper.remember(prompt.prefix),
        position=prompt.position,
        number=number.astype(jnp.int32),
        step=jnp.zeros(rows, jnp.int32),
        last=jnp.zeros((rows, group), jnp.int32),
        alive=jnp.ones((rows, group), bool),
        out=nothing,
    )
    first = jnp.broadcast_to(prompt.last[:, None], (rows, group, prompt.last.shape[-1]))
    return _said(groups, *_draw(stepper, groups, first, key, settings), ends)


def start(stepper: Stepper, groups: Groups, settings: Settings) -> Decoding:
    """The loop's state before its first step."""
    cache = stepper.empty_cache(groups.memory, settings.group_size, settings.columns)
    return Decoding(groups, cache, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def decode(
    stepper: Stepper,
    decoding: Decoding,
    key: Array,
    settings: Settings,
    enough: Array | int,
    most: Array | int,
) -> Decoding:
    """Go on until `enough` groups have ended, but for at most `most` steps."""
    ends, last = _ends(stepper.config), decoding.steps + most

    def proceed(decoding: Decoding) -> Array:
        return ((~decoding.groups.alive.any(axis=1)).sum() < enough) & (decoding.steps < last)

    def advance(decoding: Decoding) -> Decoding:
        groups, cache, steps, busy = decoding
        column = steps % settings.columns
        age = (column - jnp.arange(settings.columns)) % settings.columns
        seen = age < groups.step[:, None]
        where = groups.position + groups.step - 1
        hidden, cache = stepper(groups.memory, cache, groups.last, where, seen, column)
        busy += groups.alive.any(axis=1).sum()
        groups = _said(groups, *_draw(stepper, groups, hidden, key, settings), ends)
        return Decoding(groups, cache, steps + 1, busy)

    return jax.lax.while_loop(proceed, advance, decoding)


def _ends(config: Any) -> Array:
    return jnp.asarray(config.eos_ids or (-1,), jnp.int32)


def _draw(
    stepper: Stepper, groups: Groups, hidden: Array, key: Array, settings: Settings
) -> tuple[Array, Array]:
    """hidden [B,G,D] -> token and its log-prob [B,G].

    A rollout's random numbers follow from the seed, its prompt's number, its place in the group and the step:
    never from who is decoded beside it.
    """
    temperature = settings.temperature
    logits = scaled_logits(stepper.logits(hidden), stepper.config.banned_ids, temperature or 1.0)
    logits = constrain(logits, "batch", None, None)
    if temperature == 0:
        token = jnp.argmax(logits, axis=-1)
    else:

        def one(number: Array, step: Array, logits: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, number), step)
            return jax.random.categorical(own, logits, axis=-1)

        token = jax.vmap(one)(groups.number, groups.step, logits)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token.astype(jnp.int32), (chosen - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)


def _said(groups: Groups, token: Array, logprob: Array, ends: Array) -> Groups:
    """The groups with one more token [B,G] in those of their rollouts that are alive."""
    alive, step = groups.alive, groups.step
    token, logprob = jnp.where(alive, token, ends[0]), jnp.where(alive, logprob, 0.0)
    here = jnp.arange(groups.out.tokens.shape[2]) == step[:, None, None]
    out = jax.tree.map(
        lambda old, new: jnp.where(here, new[..., None], old), groups.out, Rollout(token, logprob, alive)
    )
    step = step + alive.any(axis=1)
    alive = alive & ~jnp.isin(token, ends) & (step < here.shape[2])[:, None]
    return groups._replace(step=step, last=token, alive=alive, out=out)
