"""Images to patches, images a second: this project's path beside transformers' `Qwen2VLImageProcessorPil`.

    python -m benchmarks.images --out=images.json
    python -m benchmarks.images --images=DIR --out=images.json      # also the pictures under a directory

Pictures are decoded before, since both would use the same decoder. Ours ends with the batch that the vision
tower reads, in window order; theirs with its `pixel_values`, which the model puts in order later. The values
must be equal, bit for bit, before anything is timed. `torchvision` is not used on either side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from benchmarks import common
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.images import ImageConfig, window_layout
from fundus_jax.models.qwen2_5_vl.rows import collate, expand
from fundus_jax.records import ConfigError

SETTINGS = ("sizes", "count", "repeats")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".bmp")
IDS = np.asarray([common.START, common.IMAGE, common.END], np.int32)
Pictures = Sequence[Image.Image]


def ours(pictures: Pictures, config: ImageConfig) -> list[Batch]:
    """One batch of one row a picture."""
    loss = np.zeros(len(IDS), bool)
    return [
        collate(
            [expand(IDS, loss, [picture], config, common.IMAGE, 0)],
            config,
            pad_id=common.PAD,
            length=None,
            patches=None,
        )[0]
        for picture in pictures
    ]


def theirs(config: ImageConfig) -> Callable[[Pictures], list[Any]]:
    """transformers' image processor that needs numpy and PIL alone, picture by picture."""
    from transformers import Qwen2VLImageProcessorPil

    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    process = Qwen2VLImageProcessorPil(size=size)
    return lambda pictures: [process(images=[picture], return_tensors="np") for picture in pictures]


def check(batch: Batch, other: Any, config: ImageConfig) -> None:
    """Raises RuntimeError unless the patches are those of transformers, put into window order."""
    grid = tuple(int(side) for side in other["image_grid_thw"][0])
    layout = window_layout(grid, patch_size=config.patch_size, merge_size=config.merge_size)
    if not np.array_equal(batch.patches[0, layout.patch_slot], other["pixel_values"]):
        raise RuntimeError(f"the patches of a picture of {grid} patches are not those of transformers")


def groups(args: Any) -> dict[str, Pictures]:
    """Pictures by what they are called in the report."""
    random = np.random.default_rng(0)
    found: dict[str, Pictures] = {}
    for size in args.sizes:
        if not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size):
            raise ConfigError(f"--sizes: {size!r} is not WIDTHxHEIGHT in pixels, as 224x224")
        width, height = map(int, size.split("x"))
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        found[size] = [Image.fromarray(pixels)] * args.count
    if args.images:
        paths = sorted(path for path in Path(args.images).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ConfigError(f"--images={args.images}: nothing under it ends with {' '.join(SUFFIXES)}")
        pictures = [Image.open(path) for path in paths[:: max(1, len(paths) // args.count)]]
        for picture in pictures:
            picture.load()
        found["files"] = pictures
    return found


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    report = common.new_report(args, None, SETTINGS)
    config = ImageConfig()
    reference = theirs(config) if args.hf else None
    print(f"{'pictures':>12} {'number':>6} {'seconds':>8} {'HF':>8} {'ratio':>6} {'images/s':>9}")
    for name, pictures in groups(args).items():
        calls = {"ours": lambda pictures=pictures: ours(pictures, config)}
        if reference is not None:
            for batch, other in zip(ours(pictures, config), reference(pictures), strict=True):
                check(batch, other, config)
            calls["hf"] = lambda pictures=pictures: reference(pictures)
        row: dict[str, Any] = {"pictures": name, "number": len(pictures)}
        row["tokens"] = sum(int(np.prod(config.grid(picture))) // 4 for picture in pictures) / len(pictures)
        row |= common.in_turns({side: common.silent(call) for side, call in calls.items()}, args.repeats)
        for side in calls:
            row[f"{side}_images_per_second"] = len(pictures) / row[side]["median"]
        if reference is not None:
            row["ratio"] = row["hf"]["median"] / row["ours"]["median"]
        report["rows"].append(row)
        print(
            f"{name:>12} {len(pictures):6d} {common.cells(row)} {row['ours_images_per_second']:9.1f}",
            flush=True,
        )
    return report


def define_flags() -> None:
    """Declares the command's flags."""
    sizes = ["224x224", "448x448", "768x496", "1024x1024", "2048x1536", "4288x2848"]
    flags.DEFINE_list("sizes", sizes, "Random pictures, width x height.")
    flags.DEFINE_integer("count", 8, "Pictures of each size; and, roughly, of --images.", lower_bound=1)
    flags.DEFINE_string("images", "", "A directory of pictures.")
    common.define_report_flags()


if __name__ == "__main__":
    common.command(define_flags, run)
