"""Attention in plain XLA: the reference of every other back end, and what decoding and windows use anywhere.

Rollouts of one prompt share its keys and values: queries come as [B, G, N, ...], the prompt's keys as
[B, S, ...] without the group axis, so a prompt's cache is read once a group, not copied G times. The same
function serves whole rows (G = 1, no prefix), the scoring of G responses, windows, and one decoding step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
BLOCK = 512  # queries whose scores exist at a time


class Prefix(NamedTuple):
    """Keys and values [B, S, K, C] of the prompt, and which of its positions are real [B, S]."""

    keys: Array
    values: Array
    mask: Array


def attend(query: Array, keys: Array, values: Array, mask: Array, prefix: Prefix | None = None) -> Array:
    """Softmax attention with grouped key/value heads.

    query [B,G,N,H,C]; keys, values [B,G,S,K,C], H a multiple of K; mask broadcastable to [B,G,N,S], True
    where a key may be seen; prefix: keys every query of the row may see. Returns [B,G,N,H,C] in the query's
    dtype; scores and softmax are float32 at least. A query that sees no key at all (padding) gets a finite,
    meaningless value.
    """
    batch, group, length, heads, channels = query.shape
    kv_heads = keys.shape[-2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, group, length, kv_heads, heads // kv_heads, channels)
    scale = channels**-0.5

    scores = jnp.einsum("bgnkrc,bgskc->bgkrns", query, keys, preferred_element_type=wide) * scale
    scores = jnp.where(mask[:, :, None, None], scores, jnp.finfo(wide).min)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        out = jnp.einsum("bgkrns,bgskc->bgnkrc", weights, values)
    else:
        shared = jnp.einsum("bgnkrc,bskc->bgkrns", query, prefix.keys, preferred_element_type=wide) * scale
        shared = jnp.where(prefix.mask[:, None, None, None, None, :], shared, jnp.finfo(wide).min)
        weights = jax.nn.softmax(jnp.concatenate([shared, scores], axis=-1), axis=-1).astype(values.dtype)
        split = prefix.keys.shape[1]
        out = jnp.einsum("bgkrns,bskc->bgnkrc", weights[..., :split], prefix.values)
        out += jnp.einsum("bgkrns,bgskc->bgnkrc", weights[..., split:], values)
    return out.reshape(batch, group, length, heads, channels)


class Xla:
    """The back end of any machine; see `attention.Backend`. At most BLOCK queries of a row (and group) have
    their scores in memory at a time, in the backward pass too."""

    def causal(self, query: Array, keys: Array, values: Array, segments: Array | None) -> Array:
        places = jnp.arange(query.shape[1])

        def seen(rows: Array) -> Array:
            earlier = (rows[:, None] >= places)[None]
            if segments is not None:
                earlier &= segments[:, rows, None] == segments[:, None]
            return earlier[:, None]

        return _in_blocks(query[:, None], keys[:, None], values[:, None], seen)[:, 0]

    def continuation(self, query: Array, keys: Array, values: Array, prefix: Prefix) -> Array:
        places = jnp.arange(query.shape[2])

        def seen(rows: Array) -> Array:
            return (rows[:, None] >= places)[None, None]

        return _in_blocks(query, keys, values, seen, prefix)

    def within(self, query: Array, keys: Array, values: Array, segments: Array) -> Array:
        def seen(rows: Array) -> Array:
            return (segments[:, rows, None] == segments[:, None])[:, None]

        return _in_blocks(query[:, None], keys[:, None], values[:, None], seen)[:, 0]


def _in_blocks(
    query: Array, keys: Array, values: Array, seen: Callable[[Array], Array], prefix: Prefix | None = None
) -> Array:
    """`attend` with the mask `seen(rows)` of the queries [n] asked for, a block of queries at a time."""
    batch, group, length, heads, channels = query.shape
    count = -(-length // BLOCK)
    if count <= 1:
        return attend(query, keys, values, seen(jnp.arange(length)), prefix)
    size = -(-length // count)  # blocks of nearly equal size, so that little is padding
    query = jnp.pad(query, ((0, 0), (0, 0), (0, count * size - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(query.reshape(batch, group, count, size, heads, channels), 2, 0)
    rows = jnp.minimum(jnp.arange(count * size), length - 1).reshape(count, size)

    @jax.checkpoint
    def one(block: Array, rows: Array) -> Array:
        return attend(block, keys, values, seen(rows), prefix)

    out = jax.lax.map(lambda inputs: one(*inputs), (blocks, rows))
    return jnp.moveaxis(out, 0, 2).reshape(batch, group, -1, heads, channels)[:, :, :length]
