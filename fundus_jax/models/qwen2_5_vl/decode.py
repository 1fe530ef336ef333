"""One token at a time: the decoder laid out for generation, and the keys and values it reads.

A decoding step reads every weight and every key once, and is as fast as memory gives them; whatever XLA cuts,
joins, pads or turns inside the loop is a copy of all that in every step. So it is done once, before the loop:
layers lie one by one, every weight is a matrix that a product takes as it lies (a TPU would turn one of more
axes before the loop, and keep both), and caches keep their heads in front of their positions, as the products
want them. On a mesh the weights are gathered over `fsdp`; then a step needs no weight of another device but
those of `tensor`. Adapters stay apart, as in training: added to a bfloat16 weight, one that is small next to
it would be rounded away. Neighbours: `text` (the same layers over whole conversations), `grpo.rollout` (the
loop).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fundus_jax.models.attention import Prefix
from fundus_jax.models.embedding import lookup
from fundus_jax.models.layers import Linear, rms_norm, rotate
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.rotary import text_rotary
from fundus_jax.models.qwen2_5_vl.text import Decoder
from fundus_jax.sharding import constrain

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
    the whole cache in every step. N is a multiple of 16, or it would be padded in every step.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


class Matrix(NamedTuple):
    """A weight [in,out] and its adapter of rank r, `low` [in,r] and `high` [r,out] with the scale in it; both
    None where there is none."""

    weight: Array
    low: Array | None
    high: Array | None

    def __call__(self, x: Array) -> Array:
        """x [...,in] -> [...,out], as `layers.Linear` without its bias."""
        y = x @ self.weight
        return y if self.low is None or self.high is None else y + (x @ self.low) @ self.high


class Layer(NamedTuple):
    """The weights of one layer; R = H / K query heads look at one key head.

    Attributes:
        norm: [D].
        qkv: [D,K*(R+2)*C], of each key head its R queries, its key and its value; `qkv_bias` alike.
            Its adapter is those of the three side by side, each with zeros where the others reach.
        out: [H*C,D].
        mlp_norm: [D].
        gate, up: [D,F].
        down: [F,D].
    """

    norm: Array
    qkv: Matrix
    qkv_bias: Array
    out: Matrix
    mlp_norm: Array
    gate: Matrix
    up: Matrix
    down: Matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Stepper:
    """The text half of a model for decoding: a copy of its weights, made once before a loop.

    Attributes:
        embed_tokens: [V,D].
        head: [V,D], None where it is the embedding.
        norm: [D], after the last layer.
    """

    config: Qwen2_5_VLConfig = field(metadata={"static": True})
    embed_tokens: Array
    head: Array | None
    norm: Array
    layers: tuple[Layer, ...]

    @classmethod
    def of(
        cls, config: Qwen2_5_VLConfig, text: Decoder, head: Array | None, layers: tuple[Layer, ...]
    ) -> Stepper:
        """The decoder's weights, and those of the output projection if it is untied; `layers` as `layer_of`
        gives them, or none yet."""
        return cls(
            config=config,
            embed_tokens=constrain(text.embed_tokens.get_value(), "vocab", None),
            head=None if head is None else constrain(head, "vocab", None),
            norm=text.norm.weight.get_value(),
            layers=layers,
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
        head = self.embed_tokens if self.head is None else self.head
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=wide)

    def __call__(
        self, memory: Memory, cache: Cache, tokens: Array, position: Array, seen: Array, column: Array
    ) -> tuple[Array, Cache]:
        """Read one token of every continuation, [B,G] at M-RoPE positions [B]: hidden states [B,G,D], and the
        cache with the tokens' keys and values in `column`. seen [B,N]: the columns that a prompt's
        continuations look at, that one included."""
        config, eps = self.config, self.config.rms_norm_eps
        x = lookup(self.embed_tokens, tokens, ("vocab", None))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angles = (config.head_dim, config.rope_theta, config.mrope_section, wide)
        cos, sin = text_rotary(jnp.broadcast_to(position[:, None, None], (len(position), 3, 1)), *angles)
        cos, sin = cos[:, None], sin[:, None]  # [B,1,1,1,C]: all continuations and heads turn alike
        keys, values = [], []
        for layer, *held in zip(self.layers, *memory[:2], *cache, strict=True):
            joined = layer.qkv(rms_norm(x, layer.norm, eps)) + layer.qkv_bias
            joined = joined.reshape(*x.shape[:2], config.num_key_value_heads, -1, config.head_dim)
            turned = rotate(joined[..., :-1, :], cos, sin)
            keys.append(_put(held[2], turned[..., -1, :], column))
            values.append(_put(held[3], joined[..., -1, :], column))
            prefix = Prefix(held[0], held[1], memory.mask)
            heads = attend_step(turned[..., :-1, :], prefix, keys[-1], values[-1], seen)
            x = x + layer.out(heads.reshape(*x.shape[:2], -1))
            inner = rms_norm(x, layer.mlp_norm, eps)
            x = x + layer.down(jax.nn.silu(layer.gate(inner)) * layer.up(inner))
            x = constrain(x, "batch", None, None)
        return rms_norm(x, self.norm, eps), Cache(tuple(keys), tuple(values))


def layer_of(text: Decoder, index: Array | int) -> Layer:
    """The weights of layer `index` of the stack, gathered over `fsdp`."""
    config, attention, mlp = text.config, text.layers.self_attn, text.layers.mlp
    heads, dtype = (config.num_key_value_heads, -1, config.head_dim), text.embed_tokens.get_value().dtype

    def own(stack: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)

    def matrix(linear: Linear, before: str | None, after: str | None) -> Matrix:
        weight = constrain(own(linear.weight.get_value()).T, before, after)
        if linear.lora_a is None:
            return Matrix(weight, None, None)
        low, high = halves(linear)
        return Matrix(weight, constrain(low.T, before, None), constrain(high.T, None, after))

    def halves(linear: Linear) -> tuple[Array, Array]:
        """Of an adapter, [r,in] and [out,r]; of none, with r = 0."""
        if linear.lora_a is None or linear.lora_b is None:
            n_out, n_in = linear.weight.get_value().shape[1:]
            return jnp.zeros((0, n_in), dtype), jnp.zeros((n_out, 0), dtype)
        return own(linear.lora_a.get_value()), linear.lora_scale * own(linear.lora_b.get_value())

    def side_by_side(linears: list[Linear]) -> Matrix:
        weight = joined([own(one.weight.get_value()) for one in linears]).T
        if all(one.lora_a is None for one in linears):
            return Matrix(weight, None, None)
        low, high = zip(*map(halves, linears), strict=True)
        ends = np.cumsum([len(part) for part in high])[:-1]
        high = joined(jnp.split(jax.scipy.linalg.block_diag(*high), ends)).T
        return Matrix(weight, constrain(jnp.concatenate(low).T, None, None), high)

    def joined(parts: list[Array]) -> Array:
        """[H*C,...] of the queries, [K*C,...] of keys and of values -> [K*(R+2)*C,...], split by heads."""
        whole = jnp.concatenate([part.reshape(*heads, *part.shape[1:]) for part in parts], axis=1)
        return constrain(whole, "heads", *[None] * (whole.ndim - 1)).reshape(-1, *parts[0].shape[1:])

    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    norms = (text.layers.input_layernorm, text.layers.post_attention_layernorm)
    before, after = (own(norm.weight.get_value()) for norm in norms)
    return Layer(
        norm=constrain(before, None),
        qkv=side_by_side(projections),
        qkv_bias=joined([own(one.bias.get_value()) for one in projections if one.bias is not None]),
        out=matrix(attention.o_proj, "heads", None),
        mlp_norm=constrain(after, None),
        gate=matrix(mlp.gate_proj, None, "mlp"),
        up=matrix(mlp.up_proj, None, "mlp"),
        down=matrix(mlp.down_proj, "mlp", None),
    )


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

    query [B,G,K,R,C]; prefix: keys, values [B,K,T,C] and mask [B,T] of the prompts, read once a group; keys,
    values [B,K*G,N,C], of which [B,N] are seen. Returns [B,G,K,R,C] in the query's dtype; scores and softmax
    are float32 at least.
    """
    batch, group, kv_heads, ratio, channels = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    query = query.swapaxes(1, 2)
    own = product("bjrc,bjnc->bjrn", query.reshape(batch, -1, ratio, channels), keys) * channels**-0.5
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
    out = (out / total).astype(query.dtype).reshape(batch, kv_heads, group, ratio, channels)
    return out.swapaxes(1, 2)


def _put(cache: Array, new: Array, column: Array) -> Array:
    """[B,K*G,N,C] with new [B,G,K,C] in `column`, in place."""
    new = new.swapaxes(1, 2).reshape(*cache.shape[:2], 1, -1)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, column, axis=2)
