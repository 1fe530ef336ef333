"""Between Hugging Face directories and bundles, either way by what the source is, tensor by tensor equal.

    python -m fundus_jax.convert --source=HF_DIR --target=DIR            # a bundle, with the side files in it
    python -m fundus_jax.convert --source=DIR --target=HF_DIR            # and back
    python -m fundus_jax.convert --source=WORKDIR/checkpoints/120 --target=HF_DIR

A converted bundle is one as `checkpoints.py` seals them, with config, tokenizer and the like under hf/, so
that it can go back alone, byte for byte. What is written is read again and compared by sha256 before it gets
its name. Neighbours: `models` (names, shapes, safetensors), `bundle` and `files` (the form on disk).

    DIR/bundle.json      a table of the arrays; dtype and sha256 of every tensor they were made of
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from fundus_jax import bundle, files, later
from fundus_jax.checkpoints import CONTENT, HEADROOM, STATE
from fundus_jax.metrics import Progress
from fundus_jax.models import read_config, weights
from fundus_jax.models.qwen2_5_vl import params
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.records import ConfigError, DataError

SIDE = "hf"
TENSORS = "tensors"  # the counter of a converted bundle: tensor -> [dtype, sha256]
SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model")  # of side files; never of weights
THREADS = min(8, os.cpu_count() or 1)  # that hash
Digests = dict[str, str]


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
    """One parameter, in its stored dtype, is in memory at a time."""
    config = read_config(source)
    tensors = weights.TensorFiles(source)
    shapes, arrays, facts = _shapes(config), {}, {}
    for path, names in params.sources(config, tensors).items():
        kinds = {np.dtype(tensors.entries[name].dtype) for name in names}
        dtype = min(kinds) if len(kinds) == 1 else np.dtype(np.float32)  # holds both 16-bit formats exactly
        make = functools.partial(_stack, tensors, names, shapes[_name(path)], dtype, facts)
        arrays[_name(path)] = later.Later(shapes[_name(path)], dtype, make, stacked=len(names) > 1)
    with weights.new_directory(target) as scratch:
        _require_space(scratch, sum(array.nbytes for array in arrays.values()))
        later.save_later(scratch / STATE, arrays)
        config_hash = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
        text = bundle.to_text(0, config_hash, arrays, {}, {TENSORS: facts})
        files.write_atomic(scratch / CONTENT, text)
        _copy_side_files(source, scratch / SIDE)
        files.write_manifest(scratch, {"step": 0, "final": True}, threads=THREADS)
        fetch = _fetcher(scratch, config, {name: dtype for name, (dtype, _) in facts.items()})
        _compare(scratch, {name: digest for name, (_, digest) in facts.items()}, fetch)
    return len(facts)


def _stack(
    tensors: weights.TensorFiles,
    names: list[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    facts: dict[str, list[str]],
) -> np.ndarray:
    """The parameter of `shape` that is stored as `names`, one a layer; what is read is noted in `facts`."""
    if len(names) == 1:
        whole = tensors.read(names[0])
        facts[params.hub_name(names[0])] = [whole.dtype.name, _sha256(whole)]
        return whole.reshape(shape)
    whole = np.empty((len(names), math.prod(shape) // len(names)), dtype)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = []
        for row, name in zip(whole, names, strict=True):
            part = tensors.read(name)
            row[...] = part.reshape(-1)
            digests.append(pool.submit(_sha256, row if part.dtype == dtype else part))
        for name, digest in zip(names, digests, strict=True):
            facts[params.hub_name(name)] = [tensors.entries[name].dtype, digest.result()]
    return whole.reshape(shape)


def _to_hf(source: Path, target: Path, side: Path) -> int:
    """One parameter is in memory at a time."""
    files.verify(source)
    config = read_config(side)
    content = _content(source)
    facts = content["counters"].get(TENSORS, {})
    slots = params.table(config)
    _require_parameters(source, side, config, content["arrays"])
    dtypes = {name: facts[name][0] if name in facts else config.dtype for name in slots}
    fetch, digests = _fetcher(source, config, dtypes), Digests()
    hashing: dict[str, Future[str]] = {}  # of the tensor that is written meanwhile

    def note() -> None:
        for name, digest in hashing.items():
            digests[name] = digest.result()
            if name in facts and digests[name] != facts[name][1]:
                raise DataError(
                    f"{source}: {name} is not what it was converted from; convert the original again"
                )
        hashing.clear()

    def fetch_and_note(name: str) -> np.ndarray:
        note()
        tensor = fetch(name)
        hashing[name] = pool.submit(_sha256, tensor)
        return tensor

    # parameter by parameter, not layer by layer, so that each is read once
    tensors = {name: (dtypes[name], slot.shape) for name, slot in slots.items()}
    with ThreadPoolExecutor(1) as pool, weights.new_directory(target) as scratch:
        sizes = (math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in tensors.values())
        _require_space(scratch, sum(sizes))
        _copy_side_files(side, scratch)
        weights.write_tensors(scratch, tensors, fetch_and_note)
        note()
        written = weights.TensorFiles(scratch)
        params.match(config, written)
        _compare(scratch, digests, written.read)
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


def _fetcher(source: Path, config: Qwen2_5_VLConfig, dtypes: dict[str, str]) -> Callable[[str], np.ndarray]:
    """Tensor name -> its values from a bundle in the dtype asked for, keeping the parameter last opened."""
    slots = params.table(config)
    last: dict[str, Any] = {}

    def fetch(name: str) -> np.ndarray:
        slot = slots[name]
        parameter = _name(slot.path)
        if parameter not in last:
            last.clear()
            last[parameter] = later.open_array(source / STATE, parameter)
        value = last[parameter] if slot.layer is None else last[parameter][slot.layer]
        return later.read(value).astype(dtypes[name], copy=False).reshape(slot.shape)

    return fetch


def _compare(written: Path, digests: Digests, read: Callable[[str], np.ndarray]) -> None:
    """Read back what was written, and raise DataError for the tensors that are not what they should be."""
    progress, wrong = Progress(len(digests), "convert: verify"), []
    for name, digest in _hashed(digests, read):
        if digest != digests[name]:
            wrong.append(name)
        progress.update()
    progress.close()
    if wrong:
        raise DataError(
            f"{len(wrong)} tensors were not written as they were read, first {wrong[:5]}; nothing was kept. "
            f"Try again on another disk than that of {written.parent}"
        )


def _sha256(tensor: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()


def _hashed(names: Iterable[str], read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, str]]:
    """Every name and the sha256 of its tensor, which is hashed while the next one is read."""
    with ThreadPoolExecutor(1) as pool:
        before: list[tuple[str, Future[str]]] = []
        for name in names:
            before.append((name, pool.submit(_sha256, read(name))))
            if len(before) > 1:
                done, digest = before.pop(0)
                yield done, digest.result()
        for name, digest in before:
            yield name, digest.result()


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
