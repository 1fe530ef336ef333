"""What the loops share: a model as a pytree of parameters, and one compiled, donated, sharded optimizer step.

A step's gradient does not depend on how it is cut: losses are sums divided by a global count that is taken
before the batch is cut into micro-batches, and mesh shapes only move the work. Trained weights are float32
masters; `compute` is the dtype of the forward and backward pass. Frozen ones (`models.freeze`) stand beside
the state: they have no gradient, no moments, no master, and no place in a bundle. Neighbours: `base`, `sft`,
`grpo.update` give the losses, `workdir` the bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fundus_jax import sharding
from fundus_jax.models.freeze import is_frozen
from fundus_jax.models.layers import Options
from fundus_jax.optim import OptimConfig, like_params, make_optimizer, notfinite_count
from fundus_jax.records import ConfigError, DataError

Params = dict[str, Any]
Metrics = dict[str, jax.Array]
# loss(model, micro-batch, total) -> (its share of the loss, metrics); `total` is what `count` made of the
# whole batch
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]


class Exam(Protocol):
    """Measures a policy while it is trained, on questions of its own."""

    def due(self, step: int, last: int) -> bool:
        """Whether it is time to, after `step` of a stage of `last` steps."""
        ...

    def __call__(self, model: Any) -> dict[str, float]:
        """What metrics.jsonl records of it; with several processes all call it, and all get the same.

        Where the run is to stop, it is left half-way and owed: `workdir.BEST_BY` is NaN then, and the loop
        asks again when the run goes on (`Workdir.owes`)."""
        ...


class State(NamedTuple):
    """Everything an optimizer step reads and writes: the trained parameters and their optimizer."""

    params: Params
    optimizer: Any


class Skeleton:
    """A model without its parameters: `merge(params)` gives a model again. Parameters are a plain nested
    dict, a pytree."""

    def __init__(self, model: nnx.Module) -> None:
        self.graph, state = nnx.split(model)
        self.abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        self.frozen = {path for path, param in nnx.to_flat_state(state) if is_frozen(param)}

    def merge(self, params: Params, options: Options | None = None) -> Any:
        """The model with `params`, which may have any dtype and may be tracers.

        Tracers are pinned to their places on the mesh: what is cast is then cast before other devices' parts
        are gathered, and a gradient is scattered while it is summed.
        """
        state = jax.tree.map(lambda leaf: leaf, self.abstract)
        nnx.replace_by_pure_dict(state, params)
        state = jax.tree.map(_pinned, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        model: Any = nnx.merge(self.graph, state)
        if options is not None:
            model.options = options
        return model

    def shardings(self, mesh: Mesh) -> Params:
        """A tree like the parameters of their NamedShardings."""
        return nnx.to_pure_dict(sharding.state_shardings(self.abstract, mesh))

    def divide(self, params: Params) -> tuple[Params, Params]:
        """A tree like the parameters as two: of those that are trained, and of the frozen ones."""
        flat = flatten_dict(params)
        frozen = {path: flat.pop(path) for path in self.frozen}
        return unflatten_dict(flat), unflatten_dict(frozen)


def _pinned(param: nnx.Variable) -> nnx.Variable:
    value = param.get_value()
    if not isinstance(value, Tracer):
        return param
    return param.replace(sharding.constrain(value, *sharding.param_axes(param)))


def split(model: nnx.Module) -> tuple[Skeleton, Params]:
    """A model as (skeleton, parameters)."""
    return Skeleton(model), nnx.to_pure_dict(nnx.state(model))


def join(*parts: Params) -> Params:
    """Trees that have no leaf in common as one: what `Skeleton.divide` took apart."""
    flat: dict[tuple[Any, ...], Any] = {}
    for part in parts:
        flat |= flatten_dict(part)
    return unflatten_dict(flat)


def cast(params: Params, dtype: str) -> Params:
    """Floating-point parameters in `dtype`, as the forward pass wants them; gradients come back in the
    masters' dtype."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
    )


def check_rows(name: str, count: int, mesh: Mesh, pieces: int = 1) -> None:
    """Raise ConfigError unless each of the `pieces` of a batch of `count` rows divides by data x fsdp.

    Where one does not, nothing fails: every device computes all of its rows (`sharding.fit`).
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % (pieces * parts):
        cut = f" in {pieces} pieces" if pieces > 1 else ""
        text = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
        raise ConfigError(
            f"{name} {count}{cut}: {count // pieces} rows do not divide by data x fsdp = {parts} of the mesh "
            f"{text}, and every device would compute all of them; change the batch, its pieces or the mesh, "
            "or leave pieces and mesh to --mesh=auto"
        )


def rows_here(count: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of `count` the devices of this process hold, in order: with one process all.

    Rows that several processes hold (of one tensor-parallel group) are among those of each. Raises
    ConfigError if the rows do not divide.
    """
    check_rows("a batch of", count, mesh)
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
    """Trained parameters and fresh optimizer state on the mesh."""
    return begin(params, _like(skeleton.shardings(mesh), params), optimizer, mesh)


def begin(params: Params, places: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Parameters where `places` says, and fresh optimizer state; moments lie where their parameters lie."""
    params = spread(params, places)
    shape = jax.eval_shape(optimizer.init, params)
    out = like_params(shape, places, NamedSharding(mesh, PartitionSpec()))
    return State(params, jax.jit(optimizer.init, out_shardings=out)(params))


def hold(skeleton: Skeleton, frozen: Params, mesh: Mesh, compute: str) -> Params:
    """Frozen parameters on the mesh, in the dtype of the forward pass: they are read and nothing else."""
    return spread(cast(frozen, compute), _like(skeleton.shardings(mesh), frozen))


def _like(tree: Params, part: Params) -> Params:
    """The leaves of `tree` that `part` has too."""
    flat = flatten_dict(tree)
    return unflatten_dict({path: flat[path] for path in flatten_dict(part)})


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
) -> Callable[..., tuple[State, Metrics]]:
    """Compile (state, batch, frozen parameters or nothing) -> (state, metrics); the state is donated, the
    frozen parameters are not.

    merge: all parameters -> model. count: what the loss divides by, taken of the whole batch. combine: joins
    metrics that are stacked over the micro-batches. prepare: applied to the batch before anything else.
    teaches: whether a micro-batch has a gradient at all; one that has none is not computed, and its metrics
    are zeros. Metrics gain the loss, the gradient's norm and the guard's count of non-finite steps.
    """

    def forward(params: Any, frozen: Any, batch: Any, total: Any) -> tuple[jax.Array, Metrics]:
        return loss(merge(cast(join(params, frozen or {}), compute)), batch, total)

    def step(state: State, batch: Any, frozen: Params | None = None) -> tuple[State, Metrics]:
        batch = prepare(batch)
        total = count(batch)

        def work(batch: Any) -> tuple[Any, Metrics]:
            (value, metrics), grads = jax.value_and_grad(forward, has_aux=True)(
                state.params, frozen, batch, total
            )
            return grads, metrics | {"loss": value}

        def rest(batch: Any) -> tuple[Any, Metrics]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, batch))

        def one(batch: Any) -> tuple[Any, Metrics]:
            return work(batch) if teaches is None else jax.lax.cond(teaches(batch), work, rest, batch)

        if micro_batches == 1:
            grads, metrics = one(batch)
            metrics = combine(jax.tree.map(lambda x: x[None], metrics))
        else:

            def add(sums: Any, batch: Any) -> tuple[Any, Metrics]:
                grads, metrics = one(batch)
                return jax.tree.map(jnp.add, sums, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, stacked = jax.lax.scan(add, zeros, cut_rows(batch, micro_batches))
            metrics = combine(stacked)
        updates, moved = optimizer.update(grads, state.optimizer, state.params)
        opt_state: Any = moved
        params: Any = optax.apply_updates(state.params, updates)
        extra = {"grad_norm": optax.tree.norm(grads), "notfinite": notfinite_count(opt_state)}
        return State(params, opt_state), metrics | extra

    return jax.jit(step, donate_argnums=(0,))


def cut_rows(batch: Any, pieces: int) -> Any:
    """A batch with a leading axis of M = `pieces` micro-batches: rows i, i + M, ... form micro-batch i, so
    that each device keeps the rows it has. `join_rows` undoes it."""

    def one(x: jax.Array) -> jax.Array:  # without images a row has no patches: -1 could not be inferred
        return x.reshape(len(x) // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, batch)


def join_rows(batch: Any) -> Any:
    """Micro-batches [M,B/M,...] as one batch [B,...] in its own order."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)


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
    "check_rows",
    "cut_rows",
    "hold",
    "join",
    "join_rows",
    "make_optimizer",
    "make_step",
    "place",
    "rows_here",
    "split",
    "spread",
    "start",
]
