"""Converting and loading checkpoints, as a share of what copying the same files takes, and the memory for it.

    python -m benchmarks.convert --out=convert.json

A checkpoint of about 1 GB in several shards is made in a temporary directory (`--folder`, which should be on
the disk that is asked about). Each measurement has a process of its own, with everything imported before, so
that its peak memory is its own; they go in turns. Before each, the source is read once, so that it lies in
the page cache, a copy of it is written and removed, so that there is memory at hand (a virtual machine may
have to fetch it from its host, at random, which takes several times as long as a copy), and nothing waits to
be written. Everything that writes ends with fsync of each file and directory, the plain copies too:
`shutil.copyfile`, and the same followed by comparing sha256 of both ends, file by file in as many threads as
there are cores: that is what `convert` promises and a copy does not. Throughput is by the size of the weights
in the Hugging Face directory.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import common
from fundus_jax.convert import convert
from fundus_jax.models import read_config, weights
from fundus_jax.models.qwen2_5_vl import params

SETTINGS = (*common.SIZES, "shard_mb", "repeats")
Prepared = Callable[[], Callable[[], Any]]  # imports and opens what is not measured; gives what is


def copy(source: Path, target: Path) -> Prepared:
    """A copy of the files, on the disk when it returns."""

    def work() -> None:
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        sync(target)

    return lambda: work


def verified_copy(source: Path, target: Path) -> Prepared:
    """The same, and its sha256 compared with the source's."""

    def work() -> None:
        copy(source, target)()()
        names = [path.relative_to(target) for path in target.rglob("*") if path.is_file()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(digest, [end / name for end in (source, target) for name in names]))
        if digests[: len(names)] != digests[len(names) :]:
            raise RuntimeError(f"{target} is not a copy of {source}")

    return lambda: work


def converted(source: Path, target: Path) -> Prepared:
    """`fundus_jax.convert`, either way."""
    return lambda: lambda: convert(source, target)


def loaded(source: Path, target: Path) -> Prepared:
    """What `load_pretrained` does with the weights, in their own dtype."""
    del target
    return lambda: lambda: jax.block_until_ready(jax.tree.leaves(params_of(source)))


def saved(source: Path, target: Path) -> Prepared:
    """What `save_pretrained` does with the weights of a model in memory, in shards like the source's."""

    def prepare() -> Callable[[], None]:
        model = params.load(source, read_config(source), None, None)
        shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
        return lambda: common.write_hf(target, model, shard)

    return prepare


def hf_loaded(source: Path, target: Path) -> Prepared:
    """transformers' `from_pretrained`, every value touched: it may map the files and read them later."""
    del target

    def prepare() -> Callable[[], Any]:
        from transformers import Qwen2_5_VLForConditionalGeneration as Model

        def work() -> float:
            return touched(Model.from_pretrained(source, dtype="auto", local_files_only=True))

        return work

    return prepare


def hf_saved(source: Path, target: Path) -> Prepared:
    """transformers' `save_pretrained`, and fsync."""

    def prepare() -> Callable[[], None]:
        from transformers import Qwen2_5_VLForConditionalGeneration as Model

        model: Any = Model.from_pretrained(source, dtype="auto", local_files_only=True)
        touched(model)  # it is in memory before, as ours is
        shard = max(path.stat().st_size for path in source.glob("*.safetensors"))

        def work() -> None:
            model.save_pretrained(target, max_shard_size=shard)
            sync(target)

        return work

    return prepare


# name -> (what it does, what it reads, whether transformers' side)
TASKS: Mapping[str, tuple[Callable[[Path, Path], Prepared], str]] = {
    "copy": (copy, "hf"),
    "verified copy": (verified_copy, "hf"),
    "HF to Orbax": (converted, "hf"),
    "Orbax to HF": (converted, "orbax"),
    "load": (loaded, "hf"),
    "save": (saved, "hf"),
    "transformers load": (hf_loaded, "hf"),
    "transformers save": (hf_saved, "hf"),
}


def touched(model: Any) -> float:
    """A sum of values of every page of a model of transformers, which may only have mapped its files."""
    return sum(float(value.view(-1)[:: 4096 // value.itemsize].sum()) for value in model.parameters())


def params_of(source: Path) -> Any:
    """The parameters of a Hugging Face directory."""
    from flax import nnx

    return nnx.state(params.load(source, read_config(source), None, None))


def sync(folder: Path) -> None:
    """fsync of every file and directory."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def digest(path: Path) -> bytes:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def measure(task: str, source: Path, target: Path) -> dict[str, float]:
    """Run a task in this process: seconds, and bytes of memory at the peak beyond those before."""
    jax.config.update("jax_platforms", "cpu")
    jax.block_until_ready(jax.numpy.zeros(1))
    work = TASKS[task][0](source, target)()
    for path in source.rglob("*"):
        if path.is_file():
            digest(path)
    shutil.copytree(source, target)
    os.sync()
    shutil.rmtree(target)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_bytes": _memory("VmHWM") - before}


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")
    return 1024 * int(found[1])


def apart(task: str, source: Path, target: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, task, source, target).result()


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    report = common.new_report(args, None, SETTINGS)
    with tempfile.TemporaryDirectory(dir=args.folder or None) as name:
        folder = Path(name)
        sources = {"hf": folder / "hf", "orbax": folder / "orbax"}
        model = common.make_model(args)
        common.write_hf(sources["hf"], model, args.shard_mb * 10**6)
        del model
        convert(sources["hf"], sources["orbax"])
        shards = [path.stat().st_size for path in sources["hf"].glob("*.safetensors")]
        report |= {"bytes": sum(shards), "shards": len(shards), "largest_shard": max(shards)}
        if args.hf:
            import transformers  # noqa: F401 - so that the report names its version
        tasks = {task: source for task, (_, source) in TASKS.items() if args.hf or "transformers" not in task}
        found: dict[str, list[dict[str, float]]] = {task: [] for task in tasks}
        for _ in range(args.repeats):
            for task, source in tasks.items():
                found[task].append(apart(task, sources[source], folder / "out"))
                if task == "Orbax to HF":
                    same(sources["hf"], folder / "out")
                shutil.rmtree(folder / "out", ignore_errors=True)
    print(f"{'task':>18} {'seconds':>8} {'MB/s':>7} {'of copy':>8} {'of verified':>11} {'shards':>7}")
    for task, runs in found.items():
        row = summary(task, runs, report)
        report["rows"].append(row)
        print(
            f"{task:>18} {row['seconds']['median']:8.2f} {row['mb_per_second']:7.0f} {row['of_copy']:8.0%} "
            f"{row['of_verified_copy']:11.0%} {row['peak_shards']:7.2f}"
        )
    return report


def summary(task: str, runs: list[dict[str, float]], report: dict[str, Any]) -> dict[str, Any]:
    """One row: medians over the runs, and shares of the rows before it, which are the copies."""
    seconds = common.spread([run["seconds"] for run in runs])
    copies = {row["task"]: row["seconds"]["median"] for row in report["rows"][:2]}
    peak = common.spread([run["peak_bytes"] for run in runs])["median"]
    return {
        "task": task,
        "seconds": seconds,
        "mb_per_second": report["bytes"] / seconds["median"] / 1e6,
        "of_copy": copies.get("copy", seconds["median"]) / seconds["median"],
        "of_verified_copy": copies.get("verified copy", seconds["median"]) / seconds["median"],
        "peak_bytes": peak,
        "peak_shards": peak / report["largest_shard"],
    }


def same(one: Path, other: Path) -> None:
    """Raises RuntimeError unless two directories hold equal tensors."""
    files = [weights.TensorFiles(path) for path in (one, other)]
    if files[0].entries.keys() != files[1].entries.keys():
        raise RuntimeError("the way back gave other tensors")
    for tensor in files[0].entries:
        left, right = (file.read(tensor) for file in files)
        if left.dtype != right.dtype or left.tobytes() != right.tobytes():
            raise RuntimeError(f"the way back changed {tensor}")


def define_flags() -> None:
    """Declares the command's flags."""
    big = {"width": 1024, "layers": 24, "heads": 16, "mlp": 4096, "vocab": 65536, "vision_width": 512}
    common.define_model_flags(big | {"vision_heads": 8, "dtype": "bfloat16"})
    flags.DEFINE_integer("shard_mb", 250, "Largest shard, in 10^6 bytes.", lower_bound=1)
    flags.DEFINE_string("folder", "", "Where the files lie; the system's temporary directory by default.")
    common.define_report_flags(repeats=3)


if __name__ == "__main__":
    common.command(define_flags, run)
