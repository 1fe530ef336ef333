"""Between Hugging Face directories and bundles, either way by what the source is, tensor by tensor equal.

    python -m fundus_jax.convert --source=HF_DIR --target=DIR            # a bundle, with the side files in it
    python -m fundus_jax.convert --source=DIR --target=HF_DIR            # and back
    python -m fundus_jax.convert --source=WORKDIR/checkpoints/120 --target=HF_DIR

A converted bundle is one as `checkpoints.py` seals them, with config, tokenizer and the like under hf/, so
that it can go back alone, byte for byte. What is written is read again and compared with the source, byte by
byte, before it gets its name. Neighbours: `models` (names, shapes, safetensors), `later` (arrays in parts),
`bundle` and `files` (the form on disk).

    DIR/bundle.json      a table of the arrays; the dtype of every tensor they were made of
    DIR/state/           the arrays, in Orbax's own layout, called as in the bundles of a training run
    DIR/hf/              what stood beside the weights
    DIR/manifest.json    size and sha256 of all of the above
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from fundus_jax import bundle, files, later
from fundus_jax.checkpoints import CONTENT, HEADROOM, STATE
from fundus_jax.files import Piece
from fundus_jax.metrics import Progress
from fundus_jax.models import read_config, weights
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.records import ConfigError, DataError

SIDE = "hf"
TENSORS = "tensors"  # the counter of a converted bundle: tensor -> dtype
SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model")  # of side files; never of weights
Read = Callable[[str, Piece], np.ndarray]


def convert(source: str | Path, target: str | Path, like: str | Path | None = None) -> int:
    """Convert `source` into the new directory `target`; returns the number of tensors, all of them verified.

    Args:
        source: a Hugging Face directory, a bundle made from one, or a training run's `checkpoints/<step>`.
        target: must not exist; appears whole or not at all.
        like: the Hugging Face directory whose side files a bundle gets; for the bundles of a training run,
            whose policy is in the workdir, and for converted ones, it is found.

    Raises:
        ConfigError: `source` is none of these, or holds but the trained part of a model; `target` exists, or
            there is no room for it.
        DataError: a file of `source` is damaged, or holds other parameters than its configuration says; the
            message lists all of them.
    """
    source, target = (Path(os.path.abspath(path)) for path in (source, target))
    if (source / CONTENT).is_file():
        return _to_hf(source, target, _side_files(source, like))
    if (source / "config.json").is_file() and (source / "checkpoints").is_dir():
        raise ConfigError(f"{source} is a workdir; give one of its bundles, {source}/checkpoints/STEP")
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{source} is neither a Hugging Face directory (it has no config.json) nor a bundle (it has no "
            f"{CONTENT}); a training run's bundles are WORKDIR/checkpoints/STEP"
        )
    if like is not None:
        raise ConfigError(f"--like goes with a bundle; {source} is a Hugging Face directory of its own")
    return _to_bundle(source, target)


def _to_bundle(source: Path, target: Path) -> int:
    """A few pieces of tensors are in memory at a time."""
    config = read_config(source)
    tensors = weights.TensorFiles(source)
    shapes, arrays = _shapes(config), {}
    stored: dict[str, str] = {}  # tensor -> what the directory calls it
    for path, names in params.sources(config, tensors).items():
        kinds = {np.dtype(tensors.entries[name].dtype) for name in names}
        dtype = min(kinds) if len(kinds) == 1 else np.dtype(np.float32)  # holds both 16-bit formats exactly
        shape = shapes[_name(path)]
        # what is small is written at once: a chunk takes a millisecond whatever its size
        stacked = len(names) > 1 and math.prod(shape) * dtype.itemsize > files.PIECE
        make = functools.partial(_piece, tensors, names, shape[stacked:], dtype)
        arrays[_name(path)] = later.Later(shape, dtype, make, stacked)
        stored |= {params.hub_name(name): name for name in names}
    dtypes = {name: tensors.entries[own].dtype for name, own in stored.items()}
    announced = {name: (dtype, tensors.entries[stored[name]].shape) for name, dtype in dtypes.items()}
    with weights.new_directory(target) as scratch:
        _require_space(scratch, sum(array.nbytes for array in arrays.values()))
        later.save_later(scratch / STATE, arrays)
        config_hash = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
        text = bundle.to_text(0, config_hash, arrays, {}, {TENSORS: dtypes})
        files.write_atomic(scratch / CONTENT, text)
        _copy_side_files(source, scratch / SIDE)
        with ThreadPoolExecutor(1) as beside:  # it waits for the disk most of the time
            sealed = beside.submit(files.write_manifest, scratch, {"step": 0, "final": True})
            written = _fetcher(scratch, config, dtypes)
            _compare(scratch, announced, written, lambda name, piece: tensors.map(stored[name], piece))
            sealed.result()
    return len(dtypes)


def _piece(
    tensors: weights.TensorFiles,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    i: int,
    piece: Piece,
) -> np.ndarray:
    """A piece of layer i, which has this shape, of the parameter that is stored as `names`, one a layer; of
    what has one name, a piece of all of it; where the shape is that of all layers, a piece of them all."""
    if len(names) > 1 and len(shape) > len(tensors.entries[names[0]].shape):
        layers = [tensors.map(name, ()).astype(dtype, copy=False) for name in names]
        return np.stack(layers)[piece]
    return tensors.map(names[i], piece).reshape(-1, *shape[1:]).astype(dtype, copy=False)


def _to_hf(source: Path, target: Path, side: Path) -> int:
    """A few pieces of tensors are in memory at a time; of a training run's bundle, which is compressed, a
    parameter."""
    files.verify(source)
    config = read_config(side)
    content = _content(source)
    kept = content["counters"].get(TENSORS, {})
    slots = params.table(config)
    _require_parameters(source, side, config, content["arrays"])
    dtypes = {name: kept.get(name, config.dtype) for name in slots}
    # parameter by parameter, not layer by layer, so that each is opened once
    tensors = {name: (dtypes[name], slot.shape) for name, slot in slots.items()}
    with weights.new_directory(target) as scratch:
        sizes = (math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in tensors.values())
        _require_space(scratch, sum(sizes))
        _copy_side_files(side, scratch)
        weights.write_tensors(scratch, tensors, _fetcher(source, config, dtypes))
        written = weights.TensorFiles(scratch)
        params.match(config, written)
        with ThreadPoolExecutor(1) as beside:
            flushed = beside.submit(files.flush, scratch)
            _compare(scratch, tensors, written.map, _fetcher(source, config, dtypes))
            flushed.result()
    return len(tensors)


def _side_files(source: Path, like: str | Path | None) -> Path:
    """The Hugging Face directory whose side files belong to a bundle."""
    places = [source / SIDE, source.parent.parent / "policy"] if like is None else [Path(like)]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ConfigError(
        f"{source}: no config.json in {' or '.join(map(str, places))}; give --like=DIR, the Hugging Face "
        "directory that the run started from"
    )


def _copy_side_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and the like, as they are; never weights or what belongs to them."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = path.suffix in SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        if wanted and not path.name.endswith(".index.json") and path.is_file():
            shutil.copyfile(path, target / path.name)


def _content(source: Path) -> dict[str, Any]:
    """A bundle's JSON part, whatever step and run it is of."""
    text = (source / CONTENT).read_text(encoding="utf-8")
    found = weights.read_json(source / CONTENT)
    return bundle.from_text(text, source, step=found["step"], config_hash=found["config_hash"])


def _name(path: Sequence[Any]) -> str:
    """What a bundle calls the parameter at `path` of the module tree, training runs' bundles included."""
    return ".".join(("params", *map(str, path)))


def _shapes(config: Qwen2_5_VLConfig) -> dict[str, tuple[int, ...]]:
    state = nnx.state(params.abstract(config), nnx.Param)
    return {_name(path): tuple(param.get_value().shape) for path, param in nnx.to_flat_state(state)}


def _require_parameters(source: Path, side: Path, config: Qwen2_5_VLConfig, saved: dict[str, Any]) -> None:
    """Raise one DataError that lists every parameter that is missing, unexpected or misshapen."""
    shapes = _shapes(config)
    found = {name: tuple(shape) for name, (_, shape) in saved.items() if name.startswith("params.")}
    if found.keys() < shapes.keys() or any(".lora_" in name for name in found):
        raise ConfigError(
            f"{source} holds {len(found)} parameters and not the {len(shapes)} that {side / 'config.json'} "
            "describes. If its run trains a part of the model (config.lora, config.freeze), export it with "
            "launch/run.py --stage=export; if not, give the directory of the same model as --like"
        )
    faults = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in found]
    faults += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in shapes]
    faults += [
        f"misshapen: {name} is {found[name]}, the configuration says {shape}"
        for name, shape in shapes.items()
        if found.get(name, shape) != shape
    ]
    if faults:
        listing = "\n  ".join(faults)
        raise DataError(
            f"{source} does not hold the parameters that {side / 'config.json'} describes "
            f"({len(faults)} faults); give the directory of the same model as --like:\n  {listing}"
        )


def _fetcher(source: Path, config: Qwen2_5_VLConfig, dtypes: dict[str, str]) -> Read:
    """What reads pieces of tensors from a bundle in the dtype asked for, the last parameter kept open."""
    slots, lock = params.table(config), threading.Lock()
    last: dict[str, Any] = {}

    def fetch(name: str, piece: Piece) -> np.ndarray:
        slot = slots[name]
        parameter = _name(slot.path)
        with lock:
            if parameter not in last:
                last.clear()
                last[parameter] = later.open_array(source / STATE, parameter)
            value = last[parameter] if slot.layer is None else last[parameter][slot.layer]
        return later.read(value[piece]).astype(dtypes[name], copy=False).reshape(-1, *slot.shape[1:])

    return fetch


def _compare(
    target: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], written: Read, wanted: Read
) -> None:
    """Read back the tensors, name -> (dtype, shape), and raise DataError for those that are not, bit by bit,
    what they should be."""
    pieces = weights.pieces(tensors)
    progress, wrong = Progress(len(pieces), "convert: verify"), {}

    def same(name: str, piece: Piece) -> bool:
        return _same(written(name, piece), wanted(name, piece))

    for (name, _), alike in weights.ahead(same, pieces, files.THREADS):
        if not alike:
            wrong[name] = True
        progress.update()
    progress.close()
    if wrong:
        raise DataError(
            f"{len(wrong)} tensors were not written as they were read, first {list(wrong)[:5]}; nothing was "
            f"kept. Try again on another disk than that of {target.parent}"
        )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors have the same bits; NaN is what its bits are."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = np.dtype(np.uint64 if one.nbytes % 8 == 0 else np.uint8)
    return np.array_equal(one.reshape(-1).view(bits), other.reshape(-1).view(bits))


def _require_space(directory: Path, size: int) -> None:
    free, needed = shutil.disk_usage(directory).free, HEADROOM * size
    if free < needed:
        raise ConfigError(
            f"{directory.parent} has {free / 1e6:.1f} MB free, {HEADROOM} x the size of the weights is "
            f"{needed / 1e6:.1f} MB; make room or choose another --target"
        )


def define_flags() -> None:
    """Declares the command's flags; not at import, as programs with flags of their own import this module."""
    flags.DEFINE_string("source", None, "Hugging Face directory, or bundle.", required=True)
    flags.DEFINE_string("target", None, "New directory for the other form.", required=True)
    flags.DEFINE_string("like", None, "Hugging Face directory whose side files a training run's bundle gets.")


def main(argv: Sequence[str]) -> None:
    """The command. What the user has to change ends it with one line instead of a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments without a name: {' '.join(argv[1:])}")
    jax.config.update("jax_platforms", "cpu")  # the work of a host; an accelerator's memory may be too small
    args = flags.FLAGS
    try:
        count = convert(args.source, args.target, args.like)
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{args.target}: {count} tensors, each read back and equal to those of {args.source}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
