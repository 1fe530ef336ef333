"""Every back end against attention written out densely, forward and gradient, for each of the structures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import sharding
from fundus_jax.models import attention
from fundus_jax.models.attention import splash, xla
from fundus_jax.records import ConfigError

B, G, C = 4, 3, 32
TOLERANCE = 2e-5
LESS_COMPILING = {"xla_backend_optimization_level": 0}


def dense(query: jax.Array, keys: jax.Array, values: jax.Array, mask: np.ndarray) -> jax.Array:
    """[B,M,H,C] from keys [B,S,K,C] by a mask [B,M,S], every matrix in full and every key head repeated."""
    times = query.shape[2] // keys.shape[2]
    keys, values = (jnp.repeat(x, times, axis=2) for x in (keys, values))
    scores = jnp.einsum("bmhc,bshc->bhms", query, keys) / np.sqrt(query.shape[3])
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * mask[:, None]
    return jnp.einsum("bhms,bshc->bmhc", weights / weights.sum(-1, keepdims=True), values)


class Case(NamedTuple):
    """Arrays; what is computed of them by a back end, and densely; and which results mean something."""

    arrays: tuple[np.ndarray, ...]
    run: Callable[..., jax.Array]
    wanted: Callable[..., jax.Array]
    real: np.ndarray


def draw(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(len(shapes) + shapes[0][-2])
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def rows(lengths: list[list[int]], width: int) -> np.ndarray:
    """Segments [B,width], numbered from 1 in each row, then zeros."""
    out = np.zeros((len(lengths), width), np.int32)
    for row, parts in zip(out, lengths, strict=True):
        row[: sum(parts)] = np.repeat(np.arange(1, len(parts) + 1), parts)
    return out


def causal(heads: int, kv_heads: int, *, packed: bool) -> Case:
    length = 150  # of a kernel's block: more than one, and no whole number
    lengths = [[60, 31, 59], [150], [1, 100], [129, 3]] if packed else [[60], [150], [1], [129]]
    segments = rows(lengths, length)
    mask = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])

    def run(name: str, *arrays: jax.Array) -> jax.Array:
        return attention.backend(name).causal(*arrays, jnp.asarray(segments) if packed else None)

    arrays = draw((B, length, heads, C), *[(B, length, kv_heads, C)] * 2)
    return Case(arrays, run, lambda *arrays: dense(*arrays, mask), segments > 0)


def within(heads: int, kv_heads: int) -> Case:
    slots = 192
    segments = rows([[64, 64], [20, 100, 60], [192], [5]], slots)
    segments[1:3, ::7] = 0  # windows at the border of an image leave slots empty, amid the others
    mask = segments[:, :, None] == segments[:, None]

    def run(name: str, *arrays: jax.Array) -> jax.Array:
        return attention.backend(name).within(*arrays, jnp.asarray(segments))

    arrays = draw((B, slots, heads, C), *[(B, slots, kv_heads, C)] * 2)
    return Case(arrays, run, lambda *arrays: dense(*arrays, mask), segments > 0)


def continuation(heads: int, kv_heads: int) -> Case:
    shared, length = 45, 51  # 45 + 3 x 51 keys
    prompt = rows([[45], [7], [20], [1]], shared) > 0
    earlier = np.tril(np.ones((length, length), bool))

    def run(name: str, query: jax.Array, keys: jax.Array, values: jax.Array, *prefix: jax.Array) -> jax.Array:
        before = attention.Prefix(prefix[0], prefix[1], jnp.asarray(prompt))
        return attention.backend(name).continuation(query, keys, values, before)

    def wanted(query: jax.Array, keys: jax.Array, values: jax.Array, *prefix: jax.Array) -> jax.Array:
        mask = np.concatenate(
            [
                np.broadcast_to(prompt[:, None], (B, length, shared)),
                np.broadcast_to(earlier, (B, length, length)),
            ],
            axis=2,
        )
        whole = [
            [jnp.concatenate([before, own[:, g]], axis=1) for g in range(G)]
            for before, own in zip(prefix, (keys, values), strict=True)
        ]
        return jnp.stack([dense(query[:, g], whole[0][g], whole[1][g], mask) for g in range(G)], axis=1)

    arrays = draw(
        (B, G, length, heads, C), *[(B, G, length, kv_heads, C)] * 2, *[(B, shared, kv_heads, C)] * 2
    )
    return Case(arrays, run, wanted, np.ones((B, G, length), bool))


CASES = {
    "packed": lambda *heads: causal(*heads, packed=True),
    "rows": lambda *heads: causal(*heads, packed=False),
    "continuation": continuation,
    "within": within,
}


def both(function: Callable[..., jax.Array], case: Case, dtype: Any = jnp.float32) -> list[np.ndarray]:
    """Results where they mean something, and the gradient of a random function of them."""
    weight = np.random.default_rng(9).standard_normal(case.arrays[0].shape)
    weight = jnp.asarray(np.where(case.real[..., None, None], weight, 0), jnp.float32)

    def value(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*arrays).astype(jnp.float32)
        return jnp.vdot(out, weight), out

    arrays = [jnp.asarray(x, dtype) for x in case.arrays]
    argnums = tuple(range(len(arrays)))
    step = jax.jit(jax.value_and_grad(value, argnums, has_aux=True), compiler_options=LESS_COMPILING)
    (_, out), grads = step(*arrays)
    assert np.isfinite(out).all(), "padding too"
    return [np.asarray(out)[case.real], *(np.asarray(grad, np.float32) for grad in grads)]


def check(name: str, case: Case, dtype: Any = jnp.float32, tolerance: float = TOLERANCE) -> None:
    got = both(lambda *arrays: case.run(name, *arrays), case, dtype)
    with jax.default_matmul_precision("highest"):
        want = both(case.wanted, case)
    for one, other in zip(got, want, strict=True):
        scale = np.abs(other).max()
        assert scale > 0.1, "the test would prove nothing"
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["xla", "splash_interpret"])
@pytest.mark.parametrize("kind", CASES)
def test_a_back_end_computes_attention(name: str, kind: str) -> None:
    check(name, CASES[kind](4, 2))


@pytest.mark.parametrize("kind", CASES)
def test_blocks_of_queries_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "BLOCK", 40)
    check("xla", CASES[kind](4, 2))


def test_long_rows_never_have_all_their_scores() -> None:
    """Of 4,096 queries, forward and backward."""
    query, keys = (jax.ShapeDtypeStruct((1, 4096, heads, C), jnp.float32) for heads in (4, 2))

    def value(query: jax.Array, keys: jax.Array) -> jax.Array:
        return attention.backend("xla").causal(query, keys, keys, None).sum()

    compiled = jax.jit(jax.grad(value, (0, 1))).lower(query, keys).compile()
    whole = 4 * 4096 * 4096 * 4  # bytes of the scores in float32
    assert compiled.memory_analysis().temp_size_in_bytes < whole


@pytest.mark.parametrize(
    ("kind", "heads"),
    [*((kind, (4, 2)) for kind in CASES), ("packed", (2, 1)), ("packed", (3, 3))],
)
def test_a_mesh_changes_nothing(kind: str, heads: tuple[int, int]) -> None:
    """Where the tensor axis divides the key heads, the query heads only, or neither."""
    with jax.set_mesh(sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])):
        check("splash_interpret", CASES[kind](*heads))


def test_a_key_head_is_copied_for_the_devices_that_lack_it_only() -> None:
    query, keys = (jax.ShapeDtypeStruct((4, 16, heads, C), jnp.float32) for heads in (8, 2))
    seen = []

    def kernel(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        seen.append((query.shape, keys.shape))
        return query

    with jax.set_mesh(sharding.parse_mesh("fsdp:2,tensor:4", jax.devices()[:8])):
        jax.eval_shape(lambda *arrays: attention.mesh.on_mesh(kernel, *arrays), query, keys, keys)
    assert seen[-1] == ((2, 16, 2, C), (2, 16, 1, C))


def test_the_static_mask_of_branches() -> None:
    mask = splash.Branches((5, 8), shared=2, length=2)
    whole = mask[:, :].astype(int)
    assert whole[:4, :6].tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert np.array_equal(mask[1:4, 2:6], whole[1:4, 2:6].astype(bool))


def test_the_platform_names_the_back_end() -> None:
    names = {platform: attention.backend_for(platform) for platform in ("cpu", "tpu", "gpu", "cuda", "rocm")}
    assert names == {"cpu": "xla", "tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "xla"}
    assert set(names.values()) < set(attention.BACKENDS)
    with pytest.raises(ConfigError, match="attention back end 'flash' is unknown; there are: xla, splash"):
        attention.backend("flash")


def test_cudnn_leaves_single_precision_to_xla() -> None:
    check("cudnn", CASES["packed"](4, 2))  # it would fail on a machine without a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("mesh", [False, True])
def test_cudnn_on_a_gpu(kind: str, mesh: bool) -> None:
    devices = sharding.parse_mesh("data:1", jax.devices()[:1])
    with jax.set_mesh(devices) if mesh else contextlib.nullcontext():
        check("cudnn", CASES[kind](4, 2), jnp.bfloat16, 3e-2)


@pytest.mark.tpu
@pytest.mark.parametrize("kind", CASES)
def test_splash_on_a_tpu(kind: str) -> None:
    check("splash", CASES[kind](4, 2), jnp.bfloat16, 3e-2)
