"""Decoding in bfloat16: products are summed and positions turned in float32, as the trainer does it.

In float32 none of this shows, and on the chips that decode in bfloat16 a sampler that rounds more than the
trainer draws from another distribution than the one that is trained.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax import training
from fundus_jax.grpo import sampler
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.decode import Prefix, attend_step
from tests.models import small

WIDE = {"precision": jax.lax.Precision.HIGHEST}


@pytest.fixture(scope="module")
def narrow() -> Any:
    """A small model with weights in bfloat16."""
    skeleton, params = training.split(small.model())
    return skeleton.merge(training.cast(params, "bfloat16"))


def test_logits_are_summed_in_float32(narrow: Any) -> None:
    stepper = sampler.make_stepper(nnx.split(narrow))
    head = stepper.embed_tokens if stepper.head is None else stepper.head
    hidden = 8 * jax.random.normal(jax.random.key(0), (5, head.shape[1])).astype(jnp.bfloat16)
    exact = jnp.einsum("bd,vd->bv", hidden.astype(jnp.float32), head.astype(jnp.float32), **WIDE)
    got = stepper.logits(hidden)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4 * float(jnp.abs(exact).max()))


def test_attention_scores_are_summed_in_float32() -> None:
    """Scores of about 100: rounded to bfloat16 they are off by up to 0.25, their exponentials by 28 %."""
    batch, kv_heads, group, ratio, channels, prompt, columns = 2, 2, 3, 2, 32, 40, 8
    keys = jax.random.split(jax.random.key(1), 5)

    def draw(key: Any, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape).astype(jnp.bfloat16)

    query = 15 * draw(keys[0], batch, group, kv_heads, ratio, channels)
    mask = jnp.ones((batch, prompt), bool).at[1, 30:].set(False)
    prefix = Prefix(
        draw(keys[1], batch, kv_heads, prompt, channels),
        draw(keys[2], batch, kv_heads, prompt, channels),
        mask,
    )
    own = [draw(key, batch, kv_heads * group, columns, channels) for key in keys[3:]]
    seen = jnp.arange(columns) < jnp.array([[3], [8]])
    got = attend_step(query, prefix, *own, seen).astype(jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (query, prefix[:2], own))
    with jax.default_matmul_precision("highest"):
        exact = attend_step(wide[0], Prefix(*wide[1], mask), *wide[2], seen)
    error = jnp.abs(got - exact).max() / jnp.abs(exact).max()
    assert error < 0.008, "two roundings to bfloat16, of weights and of the result"


def test_positions_are_told_apart_in_float32(narrow: Any, tmp_path: Any) -> None:
    """Above 256 neighbouring positions are one number in bfloat16."""
    batch: Batch = small.batch(small.processor(tmp_path), [[], []], length=32, patches=0)
    stepper = sampler.make_stepper(nnx.split(narrow))
    memory = stepper.remember(narrow.prefill(batch).prefix)
    cache = stepper.empty_cache(memory, 1, 2)
    tokens, column = jnp.full((2, 1), 5, jnp.int32), jnp.zeros((), jnp.int32)
    seen = jnp.broadcast_to(jnp.arange(2) == 0, (2, 2))
    first, second = (
        stepper(memory, cache, tokens, jnp.full(2, place, jnp.int32), seen, column)[1].keys[0]
        for place in (1000, 1001)
    )
    assert not np.array_equal(first, second)
