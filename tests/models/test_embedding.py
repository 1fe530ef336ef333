"""Embedding lookup on meshes: equal to plain indexing, gradients too, and the table stays where it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import sharding
from fundus_jax.models.embedding import lookup

V, D, B, T = 64, 16, 8, 12
MESHES = ["data:2,fsdp:2,tensor:2", "fsdp:8", "tensor:8", "data:8", "fsdp:4,tensor:2"]


@pytest.fixture(autouse=True)
def eight() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")


def value_and_gradient(table: Any, tokens: Any) -> Any:
    """A loss in which every entry of every vector has a weight of its own."""
    weights = jnp.sin(jnp.arange(tokens.size * D)).reshape(*tokens.shape, D)
    return jax.value_and_grad(lambda table: jnp.sum(weights * lookup(table, tokens) ** 2))(table)


def inputs(rows: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, V, (rows, T)).astype(np.int32)
    tokens[:, :4] = (0, V - 1, V // 2, V // 2 - 1)  # the ends of every part
    return jax.random.normal(jax.random.key(0), (V, D)), jnp.asarray(tokens)


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("rows", [B, 3])  # 3 rows divide by no mesh
def test_equal_to_indexing(text: str, rows: int) -> None:
    table, tokens = inputs(rows)
    want = table[tokens]
    loss, gradient = value_and_gradient(table, tokens)
    with jax.set_mesh(sharding.parse_mesh(text, jax.devices()[:8])):
        assert np.array_equal(jax.jit(lookup)(table, tokens), want)
        got = jax.jit(value_and_gradient)(table, tokens)
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    np.testing.assert_allclose(got[1], gradient, atol=1e-4)


def test_the_table_is_not_gathered() -> None:
    mesh = sharding.parse_mesh("data:1,fsdp:4,tensor:2", jax.devices()[:8])
    table, tokens = inputs(B)
    placed = jax.device_put(table, jax.NamedSharding(mesh, sharding.spec(("vocab", "embed"))))
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(value_and_gradient).lower(placed, rows).compile().as_text()
    lines = [line for line in text.splitlines() if " all-gather(" in line or " all-reduce(" in line]
    assert lines
    assert not [line for line in lines if f"[{V},{D}]" in line or f"[{V // 2},{D}]" in line], (
        "the whole table"
    )
