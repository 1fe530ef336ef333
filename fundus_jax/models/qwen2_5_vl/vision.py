"""Qwen2.5-VL's vision tower: window attention in most blocks, full attention
within an image in a few, then the merger.

Patches arrive in window order, each window owning a fixed run of slots (see `models.batch`). Window attention
is then a reshape, without gathers, sliding bands or masks of P x P; full attention stays inside equal image
numbers. Short windows at an image's border leave slots empty, which no real slot sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fundus_jax.models.attention import attend, backend
from fundus_jax.models.layers import ATTENDED, Factory, Linear, Options, RMSNorm, SwiGLU, rotate, scan_blocks
from fundus_jax.models.qwen2_5_vl.config import VisionConfig
from fundus_jax.models.qwen2_5_vl.rotary import vision_rotary
from fundus_jax.sharding import constrain

Array = jax.Array
Core = Callable[[Array, Array, Array], Array]  # query, key, value [B,P,H,C] -> [B,P,H,C]
EPS = 1e-6  # of every norm of the tower; not a field of the configuration
PLAIN = Options()


class VisionAttention(nnx.Module):
    """Fused query/key/value projection, rotary by row and column, attention
    among the slots of one window or one image."""

    def __init__(self, make: Factory, config: VisionConfig, std: float) -> None:
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = Linear(make, width, 3 * width, ("heads", "embed"), bias=True, std=std)
        self.proj = Linear(make, width, width, ("embed", "heads"), bias=True, std=std)

    def __call__(self, x: Array, cos: Array, sin: Array, core: Core) -> Array:
        """x [B,P,D]; core: attention among the slots of one window, or of one image."""
        batch, slots, width = x.shape
        qkv = self.qkv(x).reshape(batch, slots, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        out = core(rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.proj(checkpoint_name(out.reshape(batch, slots, width), ATTENDED))


class VisionBlock(nnx.Module):
    """One pre-norm block."""

    def __init__(self, make: Factory, config: VisionConfig, std: float) -> None:
        self.norm1 = RMSNorm(make, config.hidden_size, EPS)
        self.norm2 = RMSNorm(make, config.hidden_size, EPS)
        self.attn = VisionAttention(make, config, std)
        self.mlp = SwiGLU(make, config.hidden_size, config.intermediate_size, bias=True, std=std)

    def __call__(self, x: Array, cos: Array, sin: Array, core: Core) -> Array:
        x = x + self.attn(self.norm1(x), cos, sin, core)
        return constrain(x + self.mlp(self.norm2(x)), "batch", None, None)


class Merger(nnx.Module):
    """Joins the 2 x 2 patches of a merge block into one vector of the language model's width."""

    def __init__(self, make: Factory, config: VisionConfig, std: float) -> None:
        self.merge = config.spatial_merge_size**2
        wide = config.hidden_size * self.merge
        self.ln_q = RMSNorm(make, config.hidden_size, EPS)
        self.fc1 = Linear(make, wide, wide, ("mlp", "embed"), bias=True, std=std)
        self.fc2 = Linear(make, wide, config.out_hidden_size, ("embed", "mlp"), bias=True, std=std)

    def __call__(self, x: Array) -> Array:
        x = self.ln_q(x)
        x = x.reshape(x.shape[0], x.shape[1] // self.merge, x.shape[2] * self.merge)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches in, merged features in slot order out."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig, dtype: jnp.dtype, std: float) -> None:
        make = Factory(rngs, dtype)
        self.config = config
        width, features = config.hidden_size, config.patch_features
        self.patch_embed = Linear(make, features, width, ("embed", None), bias=False, std=std)
        self.blocks = VisionBlock(Factory(rngs, dtype, (config.depth,)), config, std)
        self.merger = Merger(make, config, std)

    def __call__(
        self, patches: Array, patch_hw: Array, patch_image: Array, options: Options = PLAIN
    ) -> Array:
        """patches [B,P,1176], patch_hw [B,P,2], patch_image [B,P] (-1 = empty slot) -> features [B,P/4,D].

        Features of empty slots are finite and meaningless; `Batch.image_index` never points at them.
        """
        config = self.config
        dtype = self.patch_embed.weight.get_value().dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        windows, images = _cores(patch_image, config.window_slots, options.attention)
        channels = config.hidden_size // config.num_heads
        cos, sin = vision_rotary(patch_hw, channels, config.rope_theta, wide)

        x = self.patch_embed(patches.astype(dtype))
        for layers, full in _runs(config):
            core = images if full else windows

            def body(block: VisionBlock, x: Array, _: None, core: Core = core) -> tuple[Array, None]:
                return block(x, cos, sin, core), None

            x, _ = scan_blocks(self.blocks, body, x, None, options, layers)
        return self.merger(x)


def _cores(patch_image: Array, slots: int, name: str) -> tuple[Core, Core]:
    """Attention within windows of `slots` slots, and within images by the back end `name`.

    A window's scores are 64 x 64, P x 64 of a row in all: there is nothing for a flash kernel to save, and a
    batched product of small matrices is what XLA is good at on every platform.
    """
    batch = patch_image.shape[0]
    real = (patch_image >= 0).reshape(batch, -1, 1, slots)

    def windows(query: Array, key: Array, value: Array) -> Array:
        def cut(x: Array) -> Array:
            return x.reshape(batch, -1, slots, *x.shape[2:])

        return attend(cut(query), cut(key), cut(value), real).reshape(query.shape)

    def images(query: Array, key: Array, value: Array) -> Array:
        return backend(name).within(query, key, value, patch_image + 1)

    return windows, images


def _runs(config: VisionConfig) -> Iterator[tuple[slice, bool]]:
    """The tower as runs of consecutive layers of one kind: (layers, whether
    they attend over the whole image)."""
    start = 0
    kinds = [layer in config.full_attention_layers for layer in range(config.depth)]
    for stop in range(1, config.depth + 1):
        if stop == config.depth or kinds[stop] != kinds[start]:
            yield slice(start, stop), kinds[start]
            start = stop
