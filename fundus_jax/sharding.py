"""Meshes from a string, and the one table that says which logical axis lies on which mesh axis.

Parameters and activations are declared with logical axis names ("embed", "heads", "batch", ...). `RULES` maps
each name to mesh axes; a new way to shard is a new row set here and nothing else. Models call `constrain`,
which does nothing outside a mesh, so that they know no mesh. Neighbours: `models.layers` declares, the loops
place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fundus_jax.records import ConfigError

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes. `batch` is split over both kinds of data parallelism; `embed` (the model width of
# every weight) is what FSDP splits; heads, MLP width and vocabulary are what tensor parallelism splits.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    "rank": (),  # of an adapter: far too few to be worth splitting
}


def parse_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Build a mesh from e.g. ``data:1,fsdp:-1,tensor:2`` over `devices` (default: all).

    Axes that are not named have size 1; one size may be -1 (the rest). Raises ConfigError for an unknown or
    repeated axis, two -1, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    named: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        matched = re.fullmatch(r"([a-z]+):(-1|[0-9]{1,9})", part)
        if not matched or matched[1] not in AXES:
            raise ConfigError(
                f"--mesh={text!r}: {part!r} is not AXIS:SIZE with AXIS one of {', '.join(AXES)}"
            )
        if matched[1] in named:
            raise ConfigError(f"--mesh={text!r} names {matched[1]} twice; give each axis one size")
        named[matched[1]] = int(matched[2])
    sizes = dict.fromkeys(AXES, 1) | named
    if list(sizes.values()).count(-1) > 1 or 0 in sizes.values():
        raise ConfigError(f"--mesh={text!r}: sizes must be >= 1, and at most one may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"--mesh={text!r} does not fit {len(devices)} devices: the sizes named multiply to {known}; "
            "make them multiply to the number of devices, or divide it and give one axis the size -1"
        )
    return Mesh(arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """`devices` as an array [data, fsdp, tensor], neighbours of an axis being neighbours in the machine.

    GPUs and CPUs keep their order, in which those of a node follow each other. TPUs are laid along the wires
    of their torus; between slices there is only the network, so slices are told apart by `data` alone: over
    it go gradients, never parameters. Raises ConfigError where `data` is not a multiple of the slices.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    if devices[0].platform != "tpu":
        return np.asarray(devices, dtype=object).reshape(shape)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if sizes["data"] % slices:
        raise ConfigError(
            f"the devices are {slices} slices and data:{sizes['data']} is no multiple of that; "
            f"write data:{slices} (or a multiple), so that only gradients cross the network"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inside = (sizes["data"] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of logical `axes`; a mesh axis already taken by an earlier
    dimension is not used twice."""
    taken: set[str] = set()
    entries = []
    for axis in axes:
        mesh_axes = tuple(name for name in RULES[axis] if name not in taken) if axis else ()
        taken.update(mesh_axes)
        entries.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    return PartitionSpec(*entries)


def fit(partition: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`partition` without the axes that do not divide their dimension of
    `shape`: such a dimension is replicated."""
    entries = []
    for size, entry in zip(shape, tuple(partition) + (None,) * (len(shape) - len(partition)), strict=True):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        parts = math.prod(mesh.shape[name] for name in names)
        entries.append(entry if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*entries)


def param_axes(param: nnx.Variable) -> tuple[str | None, ...]:
    """Logical axes of a parameter as declared in `models.layers`; parameters
    without a declaration are replicated."""
    return tuple(param.get_metadata().get("axes", (None,) * len(param.get_value().shape)))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A tree like `state` (nnx.State of arrays or ShapeDtypeStructs) with a
    NamedSharding in each parameter's place."""

    def one(param: nnx.Variable) -> nnx.Variable:
        value = param.get_value()
        return param.replace(NamedSharding(mesh, fit(spec(param_axes(param)), value.shape, mesh)))

    return jax.tree.map(one, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of everything whose first dimension is the batch."""
    return NamedSharding(mesh, spec(("batch",)))


def parts(axis: str, size: int) -> int:
    """Into how many parts the current mesh cuts a dimension of `size` on logical `axis`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else math.prod(mesh.shape[name] for name in RULES[axis])
    return count if size % count == 0 else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical `axes` under the current mesh
    (`jax.set_mesh`); the identity without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec(axes), x.shape, mesh))  # type: ignore[arg-type]
