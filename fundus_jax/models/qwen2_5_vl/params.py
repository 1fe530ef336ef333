"""Qwen2.5-VL's weights in and out: which parameter is which tensor of Hugging Face's files.

A parameter's place in the module tree is the tensor's name, but for the few renames below; parameters of
stacked layers are one tensor a layer. Both key layouts are read (`model.layers`, `visual` on the hub;
`model.language_model.layers`, `model.visual` from some transformers versions); the hub's is written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from fundus_jax import sharding
from fundus_jax.files import THREADS
from fundus_jax.models import lora, weights
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.records import ConfigError, DataError

Path_ = tuple[Any, ...]
# module path prefix -> tensor name prefix; `{}` is the layer
RENAMES = (
    (("text", "embed_tokens"), "model.embed_tokens.weight"),
    (("text", "layers"), "model.layers.{}"),
    (("text", "norm"), "model.norm"),
    (("visual", "patch_embed"), "visual.patch_embed.proj"),
    (("visual", "blocks"), "visual.blocks.{}"),
    (("visual", "merger", "fc1"), "visual.merger.mlp.0"),
    (("visual", "merger", "fc2"), "visual.merger.mlp.2"),
    (("visual", "merger", "ln_q"), "visual.merger.ln_q"),
    (("lm_head",), "lm_head"),
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of the hub's layout: its parameter, the layer of it (None: not stacked), its shape there."""

    path: Path_
    layer: int | None
    shape: tuple[int, ...]


def abstract(config: Qwen2_5_VLConfig, dtype: Any = jnp.float32) -> Qwen2_5_VL:
    """The model with ShapeDtypeStructs for parameters: nothing is allocated."""
    return nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0), dtype=dtype))


@functools.lru_cache(maxsize=16)
def table(config: Qwen2_5_VLConfig) -> Mapping[str, Slot]:
    """Every tensor name of the hub's layout -> its Slot, in the order of the module tree."""
    slots: dict[str, Slot] = {}
    for path, param in nnx.to_flat_state(nnx.state(abstract(config), nnx.Param)):
        shape = tuple(param.get_value().shape)
        prefix, name = next((prefix, name) for prefix, name in RENAMES if path[: len(prefix)] == prefix)
        name = ".".join((name, *(str(part) for part in path[len(prefix) :])))
        if "{}" in name:
            slots |= {name.format(layer): Slot(path, layer, shape[1:]) for layer in range(shape[0])}
        else:
            if path[:2] == ("visual", "patch_embed"):  # a convolution whose stride is its kernel
                vision = config.vision
                kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
                shape = (shape[0], vision.in_channels, *kernel)
            slots[name] = Slot(path, None, shape)
    return slots


def hf_names(config: Qwen2_5_VLConfig) -> list[str]:
    """Every tensor name of the hub's layout, sorted."""
    return sorted(table(config))


def hf_shapes(config: Qwen2_5_VLConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the hub's layout."""
    return {name: slot.shape for name, slot in table(config).items()}


def hub_name(name: str) -> str:
    """A tensor's name in the hub's layout, whichever of the two layouts it came in."""
    for old, new in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def match(config: Qwen2_5_VLConfig, files: weights.TensorFiles) -> dict[str, str]:
    """Hub name -> stored name, one to one, each parameter's tensors complete and of the right shape.

    A tied checkpoint may store the head as well, if it equals the embedding. Raises one DataError that lists
    all keys that are missing, unexpected, misshapen, stored twice, or unreadable.
    """
    wanted = table(config)
    stored: dict[str, list[str]] = {}
    for name in files.entries:
        stored.setdefault(hub_name(name), []).append(name)
    faults = [f"missing: {name} {slot.shape}" for name, slot in wanted.items() if name not in stored]
    faults += files.faults
    for name, names in stored.items():
        first, shape = names[0], files.entries[names[0]].shape
        if len(names) > 1:
            faults.append(f"stored twice: {name} as {' and '.join(sorted(names))}")
        if name == HEAD and config.tie_word_embeddings:
            if not _equal(files, first, stored.get(EMBEDDING, [""])[0]):
                tied = "since tie_word_embeddings is true and it differs from the embedding"
                faults.append(f"unexpected: {first} {shape}, {tied}")
        elif name not in wanted:
            faults.append(f"unexpected: {first} {shape}")
        elif shape != wanted[name].shape:
            faults.append(f"misshapen: {first} is {shape}, the configuration says {wanted[name].shape}")
    if faults:
        listing = "\n  ".join(faults)
        raise DataError(
            f"{files.directory} does not hold this model's weights ({len(faults)} faults); get the "
            f"checkpoint that its config.json belongs to:\n  {listing}"
        )
    return {name: stored[name][0] for name in wanted}


def _equal(files: weights.TensorFiles, one: str, other: str) -> bool:
    """Whether two stored tensors are of one shape and readable dtypes and have the same values."""
    entries = [files.entries.get(name) for name in (one, other)]
    readable = [entry.shape for entry in entries if entry and entry.dtype in weights.DTYPES.values()]
    same_shape = len(readable) == 2 and readable[0] == readable[1]
    return same_shape and bool(np.array_equal(files.read(one), files.read(other)))


def sources(config: Qwen2_5_VLConfig, files: weights.TensorFiles) -> dict[Path_, list[str]]:
    """Parameter -> the stored names it is made of, one a layer if stacked. Raises DataError as `match`."""
    names = match(config, files)
    by_path: dict[Path_, list[str]] = {}
    for name, slot in table(config).items():
        by_path.setdefault(slot.path, []).append(names[name])
    return by_path


def load(directory: str | Path, config: Qwen2_5_VLConfig, dtype: str | None, mesh: Mesh | None) -> Qwen2_5_VL:
    """A model filled from a directory, every parameter once. `dtype=None` keeps the stored one.

    With a mesh each device reads only its own part. The model's `config.dtype` says what the files held.
    Raises ConfigError for a dtype that parameters can not have, DataError as `match`.
    """
    files = weights.TensorFiles(directory)
    by_path = sources(config, files)
    kinds = {files.entries[name].dtype for names in by_path.values() for name in names}
    stored = min(kinds) if len(kinds) == 1 else "float32"
    if len(kinds) > 1:
        logging.warning("%s mixes dtypes; an export of it will be float32 throughout", directory)
    target = _checked(dtype or stored)
    model = abstract(dataclasses.replace(config, dtype=stored), target)
    graph, state = nnx.split(model)
    for path, param in nnx.to_flat_state(state):
        axes, shape = sharding.param_axes(param), tuple(param.get_value().shape)
        read = functools.partial(_read, files, by_path[path], shape, "layers" in axes, target)
        if mesh is None:
            param.set_value(jnp.asarray(read((slice(None),) * len(shape))))
        else:
            place = NamedSharding(mesh, sharding.fit(sharding.spec(axes), shape, mesh))
            param.set_value(jax.make_array_from_callback(shape, place, _once(read)))
    return nnx.merge(graph, state)


def _checked(dtype: str) -> np.dtype:
    """The dtype of that name. Raises ConfigError for one that parameters can not have here."""
    known = (*weights.DTYPES.values(), "float64")
    if dtype not in known:
        raise ConfigError(f"parameters can not be {dtype!r}; dtype is one of {', '.join(known)}")
    if dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            "dtype float64 needs jax.config.update('jax_enable_x64', True) before the first computation"
        )
    return np.dtype(dtype)


def _once(read: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """`read`, called once for each part: devices that hold the same part of a parameter share it."""
    done: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def cached(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in done:
            done[key] = read(index)
        return done[key]

    return cached


def _read(
    files: weights.TensorFiles,
    names: list[str],
    shape: tuple[int, ...],
    stacked: bool,
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of a parameter of `shape` that is stored as `names` (one a layer if `stacked`)."""
    full = all(
        part.indices(size) == (0, size, 1)
        for part, size in zip(index[stacked:], shape[stacked:], strict=True)
    )

    def one(name: str) -> np.ndarray:
        if len(files.entries[name].shape) != len(shape) - stacked:  # the patch convolution
            return files.read(name).reshape(shape[stacked:])[index[stacked:]].astype(dtype, copy=False)
        return files.read(name, () if full else index[stacked:]).astype(dtype, copy=False)

    if not stacked:
        return one(names[0])
    chosen = names[index[0]]
    rest = (len(range(*part.indices(size))) for part, size in zip(index[1:], shape[1:], strict=True))
    out = np.empty((len(chosen), *rest), dtype)

    def fill(row: np.ndarray, name: str) -> None:
        row[...] = one(name)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, out, chosen))
    return out


def save(directory: Path, model: Qwen2_5_VL, max_shard: int = weights.MAX_SHARD) -> None:
    """Write the tensors of `model` in the hub's layout and in `config.dtype` into an existing directory, with
    its adapters (`models.lora`) merged into the weights."""
    config = model.config
    dtype = np.dtype(config.dtype)
    slots = table(config)
    values = {path: param.get_value() for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    adapted = lora.adapted(model)

    @functools.lru_cache(maxsize=1)
    def whole(name: str) -> np.ndarray:
        slot = slots[name]
        value = values[slot.path] if slot.layer is None else values[slot.path][slot.layer]
        linear = adapted.get(".".join(map(str, slot.path[:-1])))
        if linear is not None and slot.path[-1] == "weight":
            value = lora.merged(value, linear, slot.layer)
        return np.asarray(value).astype(dtype, copy=False).reshape(slot.shape)

    tensors = {name: (dtype.name, slots[name].shape) for name in _hub_order(slots)}
    weights.write_tensors(directory, tensors, lambda name, piece: whole(name)[piece], max_shard)


def _hub_order(names: Mapping[str, Slot]) -> list[str]:
    """Names with layers in numerical order, so that a shard holds neighbouring layers."""
    return sorted(
        names, key=lambda name: tuple(int(part) if part.isdigit() else part for part in name.split("."))
    )
