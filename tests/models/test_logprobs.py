"""Log-probabilities in chunks: equal to the plain formula, whatever the chunk; [B,T,V] never exists."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import sharding
from fundus_jax.models.logprobs import banned_mask, token_logprobs

B, G, N, D, V = 4, 2, 9, 16, 50
BANNED = (3, 7, 49)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    allowed = np.setdiff1d(np.arange(V), BANNED)
    hidden = jax.random.normal(keys[0], (B, G, N, D))
    head = jax.random.normal(keys[1], (V, D))
    return hidden, head, jnp.asarray(allowed)[jax.random.randint(keys[2], (B, G, N), 0, len(allowed))]


def plain(hidden: Any, head: Any, targets: Any, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    logits[..., list(BANNED)] = -np.inf
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = -np.where(np.isfinite(logs), np.exp(logs) * np.where(np.isfinite(logs), logs, 0), 0).sum(-1)
    return np.take_along_axis(logs, np.asarray(targets)[..., None], -1)[..., 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1024])
def test_equal_to_the_plain_formula(temperature: float, chunk: int) -> None:
    arguments = inputs()
    want = plain(*arguments, temperature)
    got = token_logprobs(*arguments, banned=BANNED, temperature=temperature, chunk=chunk)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


def test_the_chunk_changes_neither_values_nor_gradients() -> None:
    hidden, head, targets = inputs()
    weights = jax.random.normal(jax.random.key(5), targets.shape)

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_gradients(hidden: jax.Array, head: jax.Array, chunk: int) -> Any:
        def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
            logprobs, entropy = token_logprobs(hidden, head, targets, banned=BANNED, chunk=chunk)
            return jnp.sum(weights * logprobs) + 0.1 * entropy.sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    want = value_and_gradients(hidden, head, 1024)
    for chunk in (1, 5, 8, 12):
        got = value_and_gradients(hidden, head, chunk)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()))
    assert float(jnp.abs(want[1][1][jnp.asarray(BANNED)]).max()) == 0  # nothing pushes a banned id
    assert float(jnp.abs(want[1][1]).max()) > 1


def test_the_entropy_of_the_uniform_distribution() -> None:
    hidden, head, targets = inputs()
    logprobs, entropy = token_logprobs(0 * hidden, head, targets, banned=BANNED)
    np.testing.assert_allclose(entropy, math.log(V - len(BANNED)), rtol=1e-6)
    np.testing.assert_allclose(logprobs, -math.log(V - len(BANNED)), rtol=1e-6)
    _, sharp = token_logprobs(1000 * hidden, head, targets, banned=BANNED)
    assert 0 <= float(sharp.min()) <= float(sharp.mean()) < 0.01


def test_a_banned_target_is_impossible_and_harmless() -> None:
    hidden, head, targets = inputs()
    banned = jnp.full_like(targets, BANNED[1])

    def loss(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs, _ = token_logprobs(hidden, head, banned, banned=BANNED)
        return logprobs.sum(), logprobs

    gradient, logprobs = jax.grad(loss, has_aux=True)(1e3 * hidden)
    assert np.isfinite(logprobs).all()
    assert float(logprobs.max()) < -1e30
    assert np.isfinite(gradient).all()
    assert banned_mask(V, BANNED).nonzero()[0].tolist() == list(BANNED)
    assert not banned_mask(V, ()).any()


def test_other_shapes_and_dtypes() -> None:
    hidden, head, targets = inputs()
    want, _ = token_logprobs(hidden, head, targets)
    rows, _ = token_logprobs(hidden.reshape(B, G * N, D), head, targets.reshape(B, -1), chunk=13)
    flat, _ = token_logprobs(hidden.reshape(-1, D), head, targets.reshape(-1), chunk=13)
    for got in (rows, flat):
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-6)
    narrow, _ = token_logprobs(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, want, atol=0.2)


def sizes(jaxpr: Any) -> list[int]:
    """Number of elements of every value in a program, its loops and branches included."""
    found = []
    for equation in jaxpr.eqns:
        found += [value.aval.size for value in equation.outvars if hasattr(value.aval, "size")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += sizes(inner)
    return found


def test_the_whole_logits_never_exist() -> None:
    hidden, head, targets = inputs()

    def loss(hidden: jax.Array, head: jax.Array, chunk: int) -> jax.Array:
        logprobs, entropy = token_logprobs(hidden, head, targets, chunk=chunk)
        return logprobs.sum() + entropy.sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    assert max(sizes(program(hidden, head, 1024).jaxpr)) == B * G * N * V
    assert max(sizes(program(hidden, head, 8).jaxpr)) == max(8 * V, hidden.size)


def test_on_a_mesh_every_device_works_through_its_own_rows() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    mesh = sharding.parse_mesh("data:4,fsdp:2", jax.devices()[:8])
    hidden = jax.random.normal(jax.random.key(0), (8, 32, 64))
    head = jax.random.normal(jax.random.key(1), (512, 64))
    targets = jnp.zeros((8, 32), jnp.int32)

    def compiled(place: Any) -> Any:
        return (
            jax.jit(functools.partial(token_logprobs, chunk=16))
            .lower(*place((hidden, head, targets)))
            .compile()
        )

    def placed(arrays: Any) -> Any:
        rows = sharding.batch_sharding(mesh)
        weight = jax.NamedSharding(mesh, sharding.spec(("vocab", "embed")))
        return tuple(map(jax.device_put, arrays, (rows, weight, rows)))

    alone = compiled(lambda arrays: arrays)(hidden, head, targets)
    with jax.set_mesh(mesh):
        program = compiled(placed)
        spread = program(*placed((hidden, head, targets)))
    for one, other in zip(spread, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    text = program.as_text()
    assert "f32[16,512]" in text  # the logits of a chunk, of a device's own rows
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert len(gathered) == 1  # the head, once, before the loop
    assert "f32[512,64]" in gathered[0]
    assert "region" not in text[: text.index(gathered[0])].rsplit("\n\n", 1)[-1].splitlines()[0]


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2", "fsdp:4,tensor:2", "tensor:8"])
@pytest.mark.parametrize("rows", [8, 3])  # 3 rows are not split
def test_a_vocabulary_that_is_spread_changes_no_number(mesh: str, rows: int) -> None:
    """Banned ids, targets and gradients meet the edges between the parts."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    vocab, banned = 64, (0, 31, 32, 63)
    hidden = jax.random.normal(jax.random.key(0), (rows, 6, 16))
    head = jax.random.normal(jax.random.key(1), (vocab, 16))
    targets = jnp.asarray(np.random.default_rng(0).choice([1, 7, 8, 15, 16, 30, 33, 62], (rows, 6)))

    def value_and_gradients(hidden: jax.Array, head: jax.Array) -> Any:
        def loss(hidden: jax.Array, head: jax.Array) -> Any:
            logprobs, entropy = token_logprobs(
                hidden, head, targets, banned=banned, temperature=0.7, chunk=16
            )
            return (
                jnp.cos(jnp.arange(6 * rows)).reshape(rows, 6) * logprobs
            ).sum() + 0.3 * entropy.sum(), logprobs

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)

    want = value_and_gradients(hidden, head)
    with jax.set_mesh(sharding.parse_mesh(mesh, jax.devices()[:8])):
        got = jax.jit(value_and_gradients)(hidden, head)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()))
