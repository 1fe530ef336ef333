"""What the loops share: a model as a pytree of parameters, and one compiled, donated, sharded optimizer step.

A step's gradient does not depend on how it is cut: losses are sums divided by a global count that is taken
before the batch is cut into micro-batches, and mesh shapes only move the work. Weights are float32 masters;
`compute` is the dtype of the forward and backward pass. Neighbours: `base`, `sft`, `grpo.update` give the
losses, `workdir` the bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fundus_jax import sharding
from fundus_jax.models.layers import Options
from fundus_jax.optim import OptimConfig, like_params, make_optimizer, notfinite_count
from fundus_jax.records import ConfigError, DataError

Params = dict[str, Any]
Metrics = dict[str, jax.Array]
# loss(model, micro-batch, total) -> (its share of the loss, metrics); `total` is what `count` made of the
# whole batch
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]


class State(NamedTuple):
    """Everything an optimizer step reads and writes."""

    params: Params
    optimizer: Any


class Skeleton:
    """A model without its parameters: `merge(params)` gives a model again. Parameters are a plain nested
    dict, a pytree."""

    def __init__(self, model: nnx.Module) -> None:
        self.graph, state = nnx.split(model)
        self.abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def merge(self, params: Params, options: Options | None = None) -> Any:
        """The model with `params`, which may have any dtype and may be tracers."""
        state = jax.tree.map(lambda leaf: leaf, self.abstract)
        nnx.replace_by_pure_dict(state, params)
        model: Any = nnx.merge(self.graph, state)
        if options is not None:
            model.options = options
        return model

    def shardings(self, mesh: Mesh) -> Params:
        """A tree like the parameters of their NamedShardings."""
        return nnx.to_pure_dict(sharding.state_shardings(self.abstract, mesh))


def split(model: nnx.Module) -> tuple[Skeleton, Params]:
    """A model as (skeleton, parameters)."""
    return Skeleton(model), nnx.to_pure_dict(nnx.state(model))


def cast(params: Params, dtype: str) -> Params:
    """Floating-point parameters in `dtype`, as the forward pass wants them; gradients come back in the
    masters' dtype."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
    )


def rows_here(count: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of `count` the devices of this process hold, in order: with one process all.

    Rows that several processes hold (of one tensor-parallel group) are among those of each. Raises
    ConfigError if the rows do not divide.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % parts:
        raise ConfigError(
            f"{count} rows do not divide by data x fsdp = {parts} of the mesh; "
            "change the batch size or the mesh"
        )
    held: Any = sharding.batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique([np.arange(count)[index] for index in held])


def place(tree: Any, mesh: Mesh) -> Any:
    """A batch on the mesh: every leaf split along its first axis. Each process gives its `rows_here` only.
    Raises ConfigError if the rows do not divide."""
    target, parts = sharding.batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    share = len(rows_here(parts, mesh))

    def one(leaf: Any) -> jax.Array:
        count = leaf.shape[0] * parts // share
        rows = rows_here(count, mesh)
        if jax.process_count() == 1:
            return jax.device_put(leaf, target)

        def held(part: Any) -> Any:
            first, end, _ = part[0].indices(count)
            return leaf[slice(*np.searchsorted(rows, (first, end)))]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), target, held)

    return jax.tree.map(one, tree)


def spread(params: Params, places: Any) -> Params:
    """Parameters, whole on every process, to where `places` says; those that lie on the mesh already stay on
    it."""

    def one(leaf: Any, place: NamedSharding) -> jax.Array:
        if place.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, place)
        whole = np.asarray(leaf)  # each process takes its parts of it; device_put would compare all of it
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(one, params, places)


def start(skeleton: Skeleton, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The parameters of a model and fresh optimizer state on the mesh."""
    return begin(params, skeleton.shardings(mesh), optimizer, mesh)


def begin(params: Params, places: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Parameters where `places` says, and fresh optimizer state; moments lie where their parameters lie."""
    params = spread(params, places)
    shape = jax.eval_shape(optimizer.init, params)
    out = like_params(shape, places, NamedSharding(mesh, PartitionSpec()))
    return State(params, jax.jit(optimizer.init, out_shardings=out)(params))


def make_step(
    merge: Callable[[Any], Any],
    loss: Loss,
    count: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    *,
    compute: str = "float32",
    micro_batches: int = 1,
    combine: Callable[[Metrics], Metrics] = lambda stacked: jax.tree.map(lambda x: x.sum(0), stacked),
    prepare: Callable[[Any], Any] = lambda batch: batch,
    teaches: Callable[[Any], jax.Array] | None = None,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """Compile (state, batch) -> (state, metrics); the state is donated.

    merge: parameters -> model. count: what the loss divides by, taken of the whole batch. combine: joins
    metrics that are stacked over the micro-batches. prepare: applied to the batch before anything else.
    teaches: whether a micro-batch has a gradient at all; one that has none is not computed, and its metrics
    are zeros. Metrics gain the loss, the gradient's norm and the guard's count of non-finite steps.
    """

    def forward(params: Any, batch: Any, total: Any) -> tuple[jax.Array, Metrics]:
        return loss(merge(cast(params, compute)), batch, total)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        batch = prepare(batch)
        total = count(batch)

        def work(batch: Any) -> tuple[Any, Metrics]:
            (value, metrics), grads = jax.value_and_grad(forward, has_aux=True)(state.params, batch, total)
            return grads, metrics | {"loss": value}

        def rest(batch: Any) -> tuple[Any, Metrics]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, batch))

        def one(batch: Any) -> tuple[Any, Metrics]:
            return work(batch) if teaches is None else jax.lax.cond(teaches(batch), work, rest, batch)

        if micro_batches == 1:
            grads, metrics = one(batch)
            metrics = combine(jax.tree.map(lambda x: x[None], metrics))
        else:
            # rows i, i + M, ... form micro-batch i, so that each device keeps the rows it has
            cut = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

            def add(sums: Any, batch: Any) -> tuple[Any, Metrics]:
                grads, metrics = one(batch)
                return jax.tree.map(jnp.add, sums, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, stacked = jax.lax.scan(add, zeros, cut)
            metrics = combine(stacked)
        updates, moved = optimizer.update(grads, state.optimizer, state.params)
        opt_state: Any = moved
        params: Any = optax.apply_updates(state.params, updates)
        extra = {"grad_norm": optax.tree.norm(grads), "notfinite": notfinite_count(opt_state)}
        return State(params, opt_state), metrics | extra

    return jax.jit(step, donate_argnums=(0,))


def check_finite(metrics: dict[str, float], config: OptimConfig, stage: str, step: int) -> None:
    """Raise DataError once `skip_nonfinite` gradients in a row were not finite; each of them changed
    nothing."""
    if metrics["notfinite"] >= config.skip_nonfinite:
        raise DataError(
            f"{stage} step {step}: {int(metrics['notfinite'])} gradients in a row were not finite, "
            "and none was applied; "
            f"lower {stage}.optim.lr or look at the batches of these steps; the last bundle is intact"
        )


__all__ = [
    "Loss",
    "Skeleton",
    "State",
    "begin",
    "cast",
    "check_finite",
    "make_optimizer",
    "make_step",
    "place",
    "rows_here",
    "split",
    "spread",
    "start",
]
