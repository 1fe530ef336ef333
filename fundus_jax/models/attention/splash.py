"""Attention on TPU by JAX's splash kernel (Pallas): flash attention that skips the blocks nobody sees.

A structure that shapes alone decide is a static mask, evaluated block by block at compile time; what the data
decide (which conversation, which image, padding) are segment ids, compared inside the kernel. Key heads are
read in place by the query heads they serve.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from fundus_jax.models.attention.mesh import on_mesh
from fundus_jax.models.attention.xla import Prefix

Array = jax.Array
LANES = 128  # lengths are padded to a multiple of a TPU register's lanes
BLOCK = 512  # at most so many queries and keys a block of the kernel


@dataclasses.dataclass(frozen=True)
class Branches(masks.Mask):
    """Keys: `shared` of a prompt, then runs of `length`, one a response. Queries: the runs alone.

    With shared = 2 and two runs of 2, the queries see

        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 0 0 1 0
        1 1 0 0 1 1
    """

    size: tuple[int, int]
    shared: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(size)[part] for size, part in zip(self.size, index, strict=True))
        query, key = rows[:, None], columns[None] - self.shared
        return (key < 0) | ((key <= query) & (key >= query // self.length * self.length))


@dataclasses.dataclass(frozen=True)
class Splash:
    """The back end of TPUs; see `attention.Backend`. `interpret` runs the kernel's steps on any machine."""

    interpret: bool = False

    def causal(self, query: Array, keys: Array, values: Array, segments: Array | None) -> Array:
        pair = () if segments is None else (segments, segments)
        return self._run(masks.CausalMask, query, keys, values, *pair)

    def continuation(self, query: Array, keys: Array, values: Array, prefix: Prefix) -> Array:
        batch, group, length = query.shape[:3]
        own = jnp.ones((batch, group * length), jnp.int32)

        def flat(x: Array) -> Array:
            return x.reshape(batch, group * length, *x.shape[3:])

        seen = functools.partial(Branches, shared=prefix.keys.shape[1], length=length)
        joined = (
            jnp.concatenate([shared, new], axis=1)
            for shared, new in (
                (prefix.keys, flat(keys)),
                (prefix.values, flat(values)),
                (prefix.mask.astype(jnp.int32), own),
            )
        )
        keys, values, real = joined
        return self._run(seen, flat(query), keys, values, own, real).reshape(query.shape)

    def within(self, query: Array, keys: Array, values: Array, segments: Array) -> Array:
        return self._run(masks.FullMask, query, keys, values, segments, segments)

    def _run(self, seen: Callable[[tuple[int, int]], Any], *arrays: Array) -> Array:
        return on_mesh(functools.partial(_splash, seen, self.interpret), *arrays)


def _splash(
    seen: Callable[[tuple[int, int]], Any],
    interpret: bool,
    query: Array,
    keys: Array,
    values: Array,
    *segments: Array,
) -> Array:
    """One device's share: query [B,M,H,C], keys and values [B,S,K,C], segments of both, the static mask by
    its shape. Padding is segment 0, which at worst sees itself."""
    length, heads, channels = query.shape[1:]
    scaled = query * jnp.asarray(channels**-0.5, query.dtype)
    query, keys, values = (_padded(x).swapaxes(1, 2) for x in (scaled, keys, values))  # heads before places
    shape = (query.shape[2], keys.shape[2])
    rows, columns = (_block(size) for size in shape)
    blocks = kernels.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    mask = masks.MultiHeadMask([seen(shape)] * heads)
    kernel = kernels.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    ids = kernels.SegmentIds(*map(_padded, segments)) if segments else None
    out: Any = jax.vmap(kernel)(query, keys, values, ids)
    return out.swapaxes(1, 2)[:, :length]


def _padded(x: Array) -> Array:
    """[B, length, ...] with the length padded by zeros to a multiple of LANES."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *((0, 0) for _ in x.shape[2:])))


def _block(length: int) -> int:
    """The largest multiple of LANES up to BLOCK that divides `length`."""
    return next(size for size in range(BLOCK, 0, -LANES) if length % size == 0)
