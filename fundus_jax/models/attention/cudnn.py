"""Attention on NVIDIA GPUs by cuDNN's flash kernel, through `jax.nn.dot_product_attention`.

The kernel knows "causal"; every other structure reaches it as a bias of [rows, 1, N, S] in half precision, so
it is asked for only where the data decide. Its inputs are half precision: other dtypes take plain XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fundus_jax.models.attention.mesh import on_mesh
from fundus_jax.models.attention.xla import Prefix, Xla

Array = jax.Array
_attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


class Cudnn:
    """The back end of NVIDIA GPUs; see `attention.Backend`."""

    def causal(self, query: Array, keys: Array, values: Array, segments: Array | None) -> Array:
        if not _half(query):
            return Xla().causal(query, keys, values, segments)

        def kernel(query: Array, keys: Array, values: Array, *segments: Array) -> Array:
            mask = _equal(segments[0]) if segments else None
            return _attention(query, keys, values, mask=mask, is_causal=True)

        return on_mesh(kernel, query, keys, values, *(() if segments is None else (segments,)))

    def continuation(self, query: Array, keys: Array, values: Array, prefix: Prefix) -> Array:
        """Each response becomes a row of its own, so here a prompt's keys are copied G times, for the one
        layer at work."""
        if not _half(query):
            return Xla().continuation(query, keys, values, prefix)
        batch, group, length = query.shape[:3]
        query, keys, values = (_even(x, 2) for x in (query, keys, values))
        prefix = Prefix(*(_even(x, 1) for x in prefix))

        def rows(x: Array) -> Array:
            return x.reshape(batch * group, *x.shape[2:])

        def join(shared: Array, own: Array) -> Array:
            copied = jnp.broadcast_to(shared[:, None], (batch, group, *shared.shape[1:]))
            return rows(jnp.concatenate([copied, own], axis=2))

        def kernel(query: Array, keys: Array, values: Array, prompt: Array) -> Array:
            own = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))
            shapes = (query.shape[0], *own.shape), (query.shape[0], query.shape[1], prompt.shape[1])
            seen = [jnp.broadcast_to(prompt[:, None], shapes[1]), jnp.broadcast_to(own, shapes[0])]
            return _attention(query, keys, values, mask=jnp.concatenate(seen, axis=2)[:, None])

        prompt = jnp.repeat(prefix.mask, group, axis=0)
        out = on_mesh(kernel, rows(query), join(prefix.keys, keys), join(prefix.values, values), prompt)
        return out.reshape(query.shape)[:, :, :length]

    def within(self, query: Array, keys: Array, values: Array, segments: Array) -> Array:
        if not _half(query):
            return Xla().within(query, keys, values, segments)

        def kernel(query: Array, keys: Array, values: Array, segments: Array) -> Array:
            return _attention(query, keys, values, mask=_equal(segments))

        return on_mesh(kernel, query, keys, values, segments)


def _half(x: Array) -> bool:
    return x.dtype in (jnp.bfloat16, jnp.float16)


def _equal(segments: Array) -> Array:
    """[B,S] -> [B,1,S,S]."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def _even(x: Array, axis: int) -> Array:
    """`x` padded by zeros to an even size along `axis`: with a mask, the backward kernel takes no other."""
    return jnp.pad(x, [(0, size % 2 if number == axis else 0) for number, size in enumerate(x.shape)])
