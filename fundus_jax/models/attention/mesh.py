"""Kernels on a mesh: the compiler can not cut a kernel, so each device is given its own rows and heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fundus_jax.sharding import fit, parts, spec

Array = jax.Array


def on_mesh(kernel: Callable[..., Array], query: Array, keys: Array, values: Array, *rows: Array) -> Array:
    """`kernel(query, keys, values, *rows)` on each device's share of the current mesh; directly without one.

    query [B,M,H,C]; keys, values [B,S,K,C]; rows: arrays whose first axis is B. Rows lie along the data axes
    and heads along the tensor axis, as far as these divide them. Key heads are copied only where the tensor
    axis does not divide K, and then no more than to what it divides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(query, keys, values, *rows)
    place = fit(spec(("batch", None, "heads", None)), query.shape, mesh)  # type: ignore[arg-type]
    cuts, kv_heads = parts("heads", query.shape[2]), keys.shape[2]
    if kv_heads % cuts:
        keys, values = (jnp.repeat(x, cuts // math.gcd(cuts, kv_heads), axis=2) for x in (keys, values))
    specs = (place, place, place, *(PartitionSpec(place[0]) for _ in rows))
    # Pallas calls say nothing about what varies over the mesh, so that can not be checked.
    return jax.shard_map(kernel, in_specs=specs, out_specs=place, check_vma=False)(query, keys, values, *rows)
