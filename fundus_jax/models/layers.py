"""The few layers all models are made of. Weights keep Hugging Face's [out, in]
layout, so files load without a transpose.

Layers of one kind are stacked: every parameter of a block has a leading axis L, declared once with
`stack=(L,)`, and `scan_blocks` runs them one after the other. Each parameter names its logical axes, which
`sharding.RULES` maps to a mesh. Neighbours: `attention` (the core of every attention layer), `qwen2_5_vl`
(the models).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

# What the forward pass of a block keeps for its backward pass, beside the block's input; the rest is computed
# again. From least memory to most: nothing; what attention returned; the products with weights (attention's
# own, of [T,T], are left out). "none" recomputes nothing.
ATTENDED = "attended"
REMAT: Mapping[str, Any] = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model computes, never what.

    `remat` is a name of REMAT, `unroll` blocks are laid out per scan step (compile time against speed),
    `attention` names one of `models.attention.BACKENDS`.
    """

    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"


class Factory:
    """Makes parameters: shape, logical axes, initial standard deviation. One
    random stream, one dtype, one optional stack."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any, stack: tuple[int, ...] = ()) -> None:
        self.rngs, self.dtype, self.stack = rngs, dtype, stack

    def __call__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None) -> nnx.Param:
        """A normal parameter of `shape` with the stack in front; `std=None`
        gives ones (norms), 0 gives zeros (biases)."""
        full = (*self.stack, *shape)
        if std is None:
            value = jnp.ones(full, self.dtype)
        elif std == 0:
            value = jnp.zeros(full, self.dtype)
        else:
            value = (std * jax.random.normal(self.rngs.params(), full, jnp.float32)).astype(self.dtype)
        return nnx.Param(value, axes=("layers",) * len(self.stack) + axes)


class Linear(nnx.Module):
    """x @ weight.T + bias over the last axis; weight [out, in] as in torch.nn.Linear.

    With an adapter (`models.lora`) it adds lora_scale * (x @ lora_a.T) @ lora_b.T, of rank r: lora_a [r, in],
    lora_b [out, r].
    """

    def __init__(
        self,
        make: Factory,
        n_in: int,
        n_out: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool,
        std: float,
    ) -> None:
        self.weight = make((n_out, n_in), axes, std)
        self.bias = make((n_out,), axes[:1], 0.0) if bias else None
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum("...i,oi->...o", x, self.weight.get_value())
        if self.bias is not None:
            y = y + self.bias.get_value()
        if self.lora_a is not None and self.lora_b is not None:
            low = jnp.einsum("...i,ri->...r", x, self.lora_a.get_value())
            y = y + self.lora_scale * jnp.einsum("...r,or->...o", low, self.lora_b.get_value())
        return y


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight."""

    def __init__(self, make: Factory, width: int, eps: float) -> None:
        self.weight = make((width,), ("norm",), None)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.weight.get_value(), self.eps)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)): the MLP of both towers."""

    def __init__(self, make: Factory, width: int, hidden: int, *, bias: bool, std: float) -> None:
        self.gate_proj = Linear(make, width, hidden, ("mlp", "embed"), bias=bias, std=std)
        self.up_proj = Linear(make, width, hidden, ("mlp", "embed"), bias=bias, std=std)
        self.down_proj = Linear(make, hidden, width, ("embed", "mlp"), bias=bias, std=std)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis, with the statistics in float32 (float64 stays float64) and the
    product in the input's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * (wide * scale).astype(x.dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x [..., heads, C] by cos/sin [..., 1, C] (halves
    rotated against each other, as in Llama).

    Computed in float32 at least: angles of far tokens do not survive bfloat16.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (wide * cos + turned * sin).astype(x.dtype)


def scan_blocks(
    block: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    options: Options,
    layers: slice | None = None,
) -> tuple[Any, Any]:
    """Run `carry, y = body(block_l, carry, xs_l)` over the stacked layers of
    `block` (or a static slice of them).

    Returns (carry, stacked ys). `xs` has the leading axis of the chosen layers. The slice lets a caller run
    groups of layers that differ in kind (window and full attention) without a branch inside the compiled
    loop.
    """
    graph, params = nnx.split(block)
    if layers is not None:
        params = jax.tree.map(lambda leaf: leaf[layers], params)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        layer, inputs = x
        return body(nnx.merge(graph, layer), carry, inputs)

    if options.remat != "none":
        step = jax.checkpoint(step, prevent_cse=False, policy=REMAT[options.remat])
    return jax.lax.scan(step, carry, (params, xs), unroll=options.unroll)
