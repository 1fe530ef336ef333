"""One token at a time: the decoder laid out for generation, and the keys and values it reads.

A decoding step reads every weight and every key once, and is as fast as memory gives them. So nothing here is
cut out of a stack inside the loop, which would be a copy a step: layers lie one by one, and caches keep their
heads in front of their positions, as the products want them. On a mesh the weights are gathered over `fsdp`
once, before the loop; then a step needs no weight of another device but those of `tensor`.
Neighbours: `text` (the same layers over whole conversations), `grpo.rollout` (the loop).
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from fundus_jax.models.attention import Prefix
from fundus_jax.models.embedding import lookup
from fundus_jax.models.qwen2_5_vl.rotary import text_rotary
from fundus_jax.models.qwen2_5_vl.text import Decoder
from fundus_jax.sharding import constrain, param_axes

Array = jax.Array
Tree = TypeVar("Tree")


class Memory(NamedTuple):
    """Keys and values of B prompts, one [B,K,T,C] a layer, and which of their positions are real [B,T]."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array


class Cache(NamedTuple):
    """Keys and values of what the G continuations of B prompts have said, one [B,K*G,N,C] a layer.

    Heads and continuations share an axis: XLA drops axes of size 1 on its way to a product, and then copies
    the whole cache in every step.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


class Stepper(nnx.Module):
    """The text half of a model with its layers one by one: a copy of the weights, made once before a loop."""

    def __init__(self, text: Decoder, head: nnx.Variable) -> None:
        self.config = text.config
        self.embed_tokens = _gathered(text.embed_tokens)
        self.head = self.embed_tokens if head is text.embed_tokens else _gathered(head)
        self.norm = text.norm
        graph, stack = nnx.split(text.layers)
        self.layers = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda param, i=i: _gathered(param, i), stack, is_leaf=_is_param))
            for i in range(text.config.num_hidden_layers)
        )

    def remember(self, prefix: Prefix) -> Memory:
        """The keys and values of prefilled prompts, stacked [L,B,T,K,C], laid out for decoding."""
        keys, values = (tuple(stack.swapaxes(2, 3)) for stack in (prefix.keys, prefix.values))
        return pinned(Memory(keys, values, prefix.mask))

    def empty_cache(self, memory: Memory, group: int, columns: int) -> Cache:
        """A cache of G = `group` continuations of every prompt and N = `columns`, in which nothing is set."""
        batch, heads, _, channels = memory.keys[0].shape
        shape = (batch, heads * group, columns, channels)
        return pinned(Cache(*(tuple(jnp.zeros(shape, key.dtype) for key in memory.keys) for _ in range(2))))

    def logits(self, hidden: Array) -> Array:
        """Hidden states [...,D] -> logits [...,V], float32 at least."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, self.head.get_value(), preferred_element_type=wide)

    def __call__(
        self, memory: Memory, cache: Cache, tokens: Array, position: Array, seen: Array, column: Array
    ) -> tuple[Array, Cache]:
        """Read one token of every continuation, [B,G] at M-RoPE positions [B]: hidden states [B,G,D], and the
        cache with the tokens' keys and values in `column`. seen [B,N]: the columns that a prompt's
        continuations look at, that one included."""
        config = self.config
        x = lookup(self.embed_tokens.get_value(), tokens, ("vocab", None))[:, :, None]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angles = (config.head_dim, config.rope_theta, config.mrope_section, wide)
        cos, sin = text_rotary(jnp.broadcast_to(position[:, None, None], (len(position), 3, 1)), *angles)
        cos, sin = cos[:, None], sin[:, None]  # one axis for the group
        caches = zip(self.layers, *memory[:2], *cache, strict=True)
        keys, values = [], []
        for layer, shared_keys, shared_values, own_keys, own_values in caches:
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            keys.append(_put(own_keys, key, column))
            values.append(_put(own_values, value, column))
            prefix = Prefix(shared_keys, shared_values, memory.mask)
            heads = attend_step(query, prefix, keys[-1], values[-1], seen)
            x = x + layer.self_attn.output(heads)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            x = constrain(x, "batch", None, None, None)
        return self.norm(x)[:, :, 0], Cache(tuple(keys), tuple(values))


def pinned(tree: Tree) -> Tree:
    """Arrays with a leading axis B on the mesh: rows lie where the batch does, and the heads of caches, the
    second of four axes, where the attention heads do."""

    def one(x: Array) -> Array:
        heads = "heads" if x.ndim > 3 else None
        return constrain(x, *("batch", heads, None, None)[: x.ndim])

    return jax.tree.map(one, tree)


def attend_step(query: Array, prefix: Prefix, keys: Array, values: Array, seen: Array) -> Array:
    """Softmax attention of one new token a continuation: `models.attention.attend` for caches laid out as
    here.

    query [B,G,1,H,C]; prefix: keys, values [B,K,T,C] and mask [B,T] of the prompts, read once a group; keys,
    values [B,K*G,N,C], of which [B,N] are seen. Returns [B,G,1,H,C] in the query's dtype; scores and softmax
    are float32 at least.
    """
    batch, group, _, heads, channels = query.shape
    kv_heads, pairs = prefix.keys.shape[1], keys.shape[1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    query = query.reshape(batch, group, kv_heads, -1, channels).swapaxes(1, 2)
    own = product("bjrc,bjnc->bjrn", query.reshape(batch, pairs, -1, channels), keys) * channels**-0.5
    shared = product("bkmc,bktc->bkmt", query.reshape(batch, kv_heads, -1, channels), prefix.keys)
    shared = shared.reshape(*own.shape[:-1], -1) * channels**-0.5
    low = jnp.finfo(wide).min
    own = jnp.where(seen[:, None, None], own, low)
    shared = jnp.where(prefix.mask[:, None, None], shared, low)
    # one softmax over both without joining them: what is joined must be written and read again
    top = jnp.maximum(shared.max(axis=-1), own.max(axis=-1))[..., None]
    own, shared = jnp.exp(own - top), jnp.exp(shared - top)
    total = (own.sum(axis=-1) + shared.sum(axis=-1))[..., None]
    out = product("bjrn,bjnc->bjrc", own.astype(values.dtype), values)
    shared = shared.reshape(batch, kv_heads, -1, shared.shape[-1]).astype(values.dtype)
    out += product("bkmt,bktc->bkmc", shared, prefix.values).reshape(out.shape)
    out = (out / total).astype(query.dtype).reshape(batch, kv_heads, group, -1, channels)
    return out.swapaxes(1, 2).reshape(batch, group, 1, heads, channels)


def _put(cache: Array, new: Array, column: Array) -> Array:
    """[B,K*G,N,C] with new [B,G,1,K,C] in `column`, in place."""
    new = new.transpose(0, 3, 1, 2, 4).reshape(*cache.shape[:2], 1, -1)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, column, axis=2)


def _is_param(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def _gathered(param: nnx.Variable, layer: int | None = None) -> nnx.Variable:
    """A parameter, or its slice for one layer of the stack, whole on every device but for `tensor`."""
    value, axes = param.get_value(), param_axes(param)
    if layer is not None:
        value, axes = value[layer], axes[1:]
    axes = tuple(None if axis == "embed" else axis for axis in axes)
    return nnx.Param(constrain(value, *axes), axes=axes)
