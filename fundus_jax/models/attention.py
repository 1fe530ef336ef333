"""Attention behind one function. Back ends: plain XLA, everywhere.

Rollouts of one prompt share its keys and values: queries come as [B, G, N, ...], the prompt's keys as
[B, S, ...] without the group axis, so a prompt's cache is read once a group, not copied G times. The same
function serves the full forward pass (G = 1, no prefix), the scoring of G responses, and one decoding step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fundus_jax.records import ConfigError

Array = jax.Array


class Prefix(NamedTuple):
    """Keys and values [B, S, K, C] of the prompt, and which of its positions are real [B, S]."""

    keys: Array
    values: Array
    mask: Array


def attend(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array,
    prefix: Prefix | None = None,
    *,
    backend: str = "xla",
) -> Array:
    """Softmax attention with grouped key/value heads.

    query [B,G,N,H,C]; keys, values [B,G,S,K,C], H a multiple of K; mask broadcastable to [B,G,N,S], True
    where a key may be seen; prefix: keys every query of the row may see. Returns [B,G,N,H,C] in the query's
    dtype; scores and softmax are float32 at least. A query that sees no key at all (padding) gets a finite,
    meaningless value.
    """
    if backend != "xla":
        raise ConfigError(f"attention back end {backend!r} is unknown; there is: xla")
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
