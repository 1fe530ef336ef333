"""Rollouts: G continuations of each prompt, sampled by the trainer's own module in one compiled loop.

Each image is encoded and each prompt prefilled once; the group shares the prompt's keys and values. Decoding
stops as soon as every rollout has ended. The log-probs it returns are those of the distribution it drew from,
so the trainer's can be compared with them from step 0. Image and vision ids are impossible, here and in the
trainer (`models.logprobs`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fundus_jax.models.batch import Batch
from fundus_jax.models.logprobs import scaled_logits
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
    if max_new_tokens < 1 or group_size < 1 or not temperature >= 0:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} and group_size {group_size} must be >= 1, "
            f"temperature {temperature} >= 0"
        )
    graph, state = nnx.split(model)
    key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    return _generate(graph, state, batch, key, max_new_tokens, float(temperature), group_size)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _generate(
    graph: nnx.GraphDef,
    state: nnx.State,
    batch: Batch,
    key: Array,
    max_new_tokens: int,
    temperature: float,
    group_size: int,
) -> Rollout:
    return rollout(nnx.merge(graph, state), batch, key, max_new_tokens, temperature, group_size)


def rollout(
    model: Qwen2_5_VL, batch: Batch, key: Array, max_new_tokens: int, temperature: float, group_size: int
) -> Rollout:
    """The traced body of `generate`, for callers that compile it into a larger program."""
    config = model.config
    prompt = model.prefill(batch)
    rows = batch.tokens.shape[0]
    ends = jnp.asarray(config.eos_ids or (-1,), jnp.int32)
    shape = (rows, group_size, max_new_tokens)

    def draw(hidden: Array, step: Array) -> tuple[Array, Array]:
        """hidden [B,G,D] -> token and its log-prob [B,G]."""
        logits = constrain(
            scaled_logits(model.logits(hidden), config.banned_ids, temperature or 1.0), "batch", None, None
        )
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, step), logits, axis=-1)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        return token.astype(jnp.int32), (chosen - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)

    def put(out: Rollout, token: Array, logprob: Array, alive: Array, step: Array) -> Rollout:
        token, logprob = jnp.where(alive, token, ends[0]), jnp.where(alive, logprob, 0.0)
        new = Rollout(token, logprob, alive)
        return jax.tree.map(
            lambda old, column: jax.lax.dynamic_update_index_in_dim(old, column, step, 2), out, new
        )

    def proceed(carry: tuple) -> Array:
        _, _, alive, _, step = carry
        return (step < max_new_tokens) & alive.any()

    def advance(carry: tuple) -> tuple:
        out, cache, alive, last, step = carry
        hidden, cache = model.decode(prompt, cache, last, step - 1)
        token, logprob = draw(hidden, step)
        out = put(out, token, logprob, alive, step)
        return out, cache, alive & ~jnp.isin(token, ends), token, step + 1

    zero = jnp.zeros((), jnp.int32)
    first = jnp.broadcast_to(prompt.last[:, None], (rows, group_size, prompt.last.shape[-1]))
    token, logprob = draw(first, zero)
    alive = jnp.ones((rows, group_size), bool)
    out = Rollout(jnp.full(shape, ends[0]), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    out = put(out, token, logprob, alive, zero)
    cache = model.empty_cache(prompt, group_size, max_new_tokens)
    carry = (out, cache, alive & ~jnp.isin(token, ends), token, zero + 1)
    return jax.lax.while_loop(proceed, advance, carry)[0]
