"""Qwen2.5's decoder: grouped-query attention with biased q/k/v, M-RoPE, SwiGLU, pre-norm.

Hidden states are [B, G, N, D]: G continuations of one prompt, N positions each. A plain forward pass has
G = 1. With a prompt's keys and values as prefix, the same code scores whole responses. `decode` extends them
token by token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fundus_jax.models.attention import Prefix, backend
from fundus_jax.models.embedding import lookup
from fundus_jax.models.layers import ATTENDED, Factory, Linear, Options, RMSNorm, SwiGLU, rotate, scan_blocks
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.rotary import text_rotary
from fundus_jax.sharding import constrain

Array = jax.Array


class Attention(nnx.Module):
    """Projections and rotary; the core is `models.attention`."""

    def __init__(self, make: Factory, config: Qwen2_5_VLConfig) -> None:
        self.channels = config.head_dim
        width, std = config.hidden_size, config.initializer_range
        heads, kv = config.num_attention_heads * self.channels, config.num_key_value_heads * self.channels
        self.q_proj = Linear(make, width, heads, ("heads", "embed"), bias=True, std=std)
        self.k_proj = Linear(make, width, kv, ("heads", "embed"), bias=True, std=std)
        self.v_proj = Linear(make, width, kv, ("heads", "embed"), bias=True, std=std)
        self.o_proj = Linear(make, heads, width, ("embed", "heads"), bias=False, std=std)

    def project(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """x [B,G,N,D] -> query [B,G,N,H,C], key and value [B,G,N,K,C], rotated."""
        query, key, value = (
            linear(x).reshape(*x.shape[:-1], -1, self.channels)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def output(self, heads: Array) -> Array:
        """[B,G,N,H,C] -> [B,G,N,D]."""
        return self.o_proj(checkpoint_name(heads.reshape(*heads.shape[:-2], -1), ATTENDED))


class DecoderLayer(nnx.Module):
    """One pre-norm layer; parameter names are Hugging Face's."""

    def __init__(self, make: Factory, config: Qwen2_5_VLConfig) -> None:
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(make, config)
        self.mlp = SwiGLU(make, width, config.intermediate_size, bias=False, std=config.initializer_range)
        self.input_layernorm = RMSNorm(make, width, eps)
        self.post_attention_layernorm = RMSNorm(make, width, eps)


class Decoder(nnx.Module):
    """Embedding, L layers, final norm."""

    def __init__(self, rngs: nnx.Rngs, config: Qwen2_5_VLConfig, dtype: jnp.dtype) -> None:
        make = Factory(rngs, dtype)
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = make(shape, ("vocab", "embed"), config.initializer_range)
        self.layers = DecoderLayer(Factory(rngs, dtype, (config.num_hidden_layers,)), config)
        self.norm = RMSNorm(make, config.hidden_size, config.rms_norm_eps)

    def embed(self, tokens: Array) -> Array:
        """Token ids [...] -> embeddings [..., D]."""
        return lookup(self.embed_tokens.get_value(), tokens)

    def __call__(
        self,
        x: Array,
        positions: Array,
        options: Options,
        *,
        segments: Array | None = None,
        prefix: Prefix | None = None,
        keep: bool = False,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Run the layers over x [B,G,N,D] at M-RoPE positions [B,3,N] (one group shares them).

        Whole rows (G = 1) are causal, within equal `segments` [B,N] where these are given. With `prefix`, the
        prompt's keys and values stacked [L,B,S,K,C], x continues it, causally. Returns (hidden, keys and
        values of x [L,B,G,N,K,C] if `keep`, else None).
        """
        config = self.config
        wide = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = text_rotary(positions, config.head_dim, config.rope_theta, config.mrope_section, wide)
        cos, sin = cos[:, None], sin[:, None]  # one axis for the group
        core = backend(options.attention)

        def body(layer: DecoderLayer, x: Array, shared: tuple) -> tuple[Array, tuple | None]:
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            if prefix is not None:
                heads = core.continuation(query, key, value, Prefix(shared[0], shared[1], prefix.mask))
            else:
                heads = core.causal(query[:, 0], key[:, 0], value[:, 0], segments)[:, None]
            x = x + layer.self_attn.output(heads)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            return constrain(x, "batch", None, None, None), (key, value) if keep else None

        shared = () if prefix is None else (prefix.keys, prefix.values)
        x, made = scan_blocks(self.layers, body, x, shared, options)
        return self.norm(x), made
