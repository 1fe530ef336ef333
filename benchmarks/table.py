"""docs/benchmarks.md: what the benchmarks found, every number from the JSON that they wrote.

    python -m benchmarks.NAME --out=docs/benchmarks/NAME.json       a benchmark anew
    python -m benchmarks.table                                      the page, from docs/benchmarks/*.json

Neighbours: the benchmarks, each of which says in its head what it measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fundus_jax.files import write_atomic

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
Report = dict[str, Any]
HEAD = """# How fast it is

Made by `python -m benchmarks.table` from the JSON files beside it, which the benchmarks wrote. Where there is
a column for transformers, both ran in one process, in turns, on the same weights and inputs, after checking
that both compute the same (of images: its processor on PIL). Tasks on checkpoints had a process each, in
turns; evaluation stands beside a simple loop, and the pipeline's jobs beside what their server gives without
them. A ratio above 1 says that this project is faster:

* **ratio**: of the medians, by the clock;
* **by least**: of each side's least time, which other programs on the machine disturb least;
* **by processor**: of the seconds that all threads together used. Where the three are far apart, the machine
  was busy (its load is told), and the last one is the fairest.
* **of the bound**: of the speed at which memory would give a decoding step what it must read.

"""


def seconds(side: dict[str, float]) -> str:
    """The median in readable units."""
    value = side["median"]
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def ratios(row: dict[str, Any]) -> tuple[str, ...]:
    """Both sides' seconds and their ratios."""
    ours, theirs = row["ours"], row.get("hf")
    if theirs is None:
        return (seconds(ours), *[""] * 4)
    quotients = [f"{theirs[name] / ours[name]:.2f}" if name in ours else "" for name in KINDS]
    return (seconds(ours), seconds(theirs), *quotients)


KINDS = ("median", "least", "processor")
RATIOS = ("ratio", "by least", "by processor")
SIDES = ("ours", "transformers", *RATIOS)


def forward(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.forward`."""
    yield ("rows", "result", "B x T", *SIDES)
    for row in report["rows"]:
        yield (row["rows"], row["result"], " x ".join(map(str, row["shape"])), *ratios(row))


def sft_step(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.sft_step`, with FLOPs where they were counted, and MFU where the chip
    is known."""
    counted, shared = (any(key in row for row in report["rows"]) for key in ("flops", "mfu"))
    work = ("ViT TFLOP", "LM TFLOP") if counted else ()
    yield ("rows", "B x T", *SIDES, *work, *(("MFU",) if shared else ()))
    for row in report["rows"]:
        more = [f"{row['flops'][tower] / 1e12:.3g}" for tower in ("vision", "text")] if counted else []
        more += [f"{row['mfu']['ours']:.1%}"] if shared else []
        yield (row["rows"], " x ".join(map(str, row["shape"])), *ratios(row), *more)


def grpo_step(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.grpo_step`."""
    yield ("phase", *SIDES)
    for row in report["rows"]:
        yield (row["phase"], *ratios(row))


def rollout(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.rollout`."""
    yield ("G", "tokens/s", "transformers", *RATIOS, "ms a step", "transformers", "of the bound")
    for row in report["rows"]:
        sides = {side: row[side] for side in ("ours", "hf") if side in row}
        rates, steps = (
            [f"{sides[side][name]:.1f}" if side in sides else "" for side in ("ours", "hf")]
            for name in ("tokens_per_second", "step_ms")
        )
        quotients = ratios({side: one["seconds"] for side, one in sides.items()})[2:]
        yield (str(row["group_size"]), *rates, *quotients, *steps, f"{row['share']:.0%}")


def images(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.images`."""
    yield ("pictures", "tokens each", "images/s", "transformers", *RATIOS)
    for row in report["rows"]:
        names = ("ours_images_per_second", "hf_images_per_second")
        rates = [f"{row[name]:.1f}" if name in row else "" for name in names]
        yield (row["pictures"], f"{row['tokens']:.0f}", *rates, *ratios(row)[2:])


def convert(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.convert`."""
    yield ("task", "seconds", "MB/s", "of a copy", "of a verified copy", "peak memory, in shards")
    for row in report["rows"]:
        shares = (f"{row['of_copy']:.0%}", f"{row['of_verified_copy']:.0%}")
        yield (
            *(row["task"], f"{row['seconds']['median']:.2f}", f"{row['mb_per_second']:.0f}"),
            *(*shares, f"{row['peak_shards']:.2f}"),
        )


def pipeline(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.pipeline`."""
    yield ("what", "under way", "items", "a second", "of the server's best", "seconds", "peak memory")
    for row in report["rows"]:
        rate = f"{row['per_second']:.1f}" if "per_second" in row else ""
        share = f"{row['share']:.0%} of {row['server_per_second']:.1f}" if "share" in row else ""
        spent = f"{row['seconds']:.2f}" if "seconds" in row else ""
        memory = f"{row['memory_mb']:.0f} MB" if "memory_mb" in row else ""
        yield (row["what"], str(row.get("under_way", "")), f"{row['items']:,}", rate, share, spent, memory)


def evaluation(report: Report) -> Iterable[tuple[str, ...]]:
    """Rows of the table of `benchmarks.evaluation`."""
    yield ("way", "questions", "questions/s", "idle", "waiting for images", "slots in use")
    for row in report["rows"]:
        shares = [
            f"{row[key]['median']:.1%}" if key in row else "" for key in ("idle", "waiting", "occupancy")
        ]
        rate = row["questions_per_second"]
        yield (row["way"], f"{row['questions']:,}", f"{rate['median']:.1f}", *shares)


# file -> (title, its rows)
TABLES: dict[str, tuple[str, Callable[[Report], Iterable[tuple[str, ...]]]]] = {
    "forward": ("Forward pass", forward),
    "sft_step": ("A step of SFT", sft_step),
    "grpo_step": ("A step of GRPO", grpo_step),
    "rollout": ("Rollouts of prompts with an image", rollout),
    "rollout_text": ("Rollouts of text prompts", rollout),
    "images": ("Images to patches", images),
    "convert": ("Checkpoints", convert),
    "evaluation": ("Evaluation of image questions", evaluation),
    "pipeline": ("The pipeline's jobs beside a fake server, and resumed", pipeline),
    "pipeline_vllm": ("The pipeline's jobs beside vLLM", pipeline),
}


def render(reports: dict[str, Report]) -> str:
    """The page of the reports by file name."""
    return HEAD + "\n".join(_section(name, reports[name]) for name in TABLES if name in reports)


def _section(name: str, report: Report) -> str:
    title, rows = TABLES[name]
    head, *body = rows(report)
    lines = [f"## {title}", ""]
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in report["settings"].items())
    lines += [f"`python -m benchmarks.{name.removesuffix('_text').removesuffix('_vllm')}`: {settings}."]
    versions = ", ".join(f"{library} {version}" for library, version in report["versions"].items())
    lines += [f"{_size(report)}{report['device']}; load {report['load']:.1f} before; {versions}.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body), ""])


def _size(report: Report) -> str:
    if "largest_shard" in report:
        total, largest = report["bytes"] / 1e6, report["largest_shard"] / 1e6
        return f"{total:.0f} MB in {report['shards']} shards, the largest of {largest:.0f} MB; "
    memory = f"memory {report['bandwidth']['gb_per_second']:.0f} GB/s; " if "bandwidth" in report else ""
    return f"{report['parameters'] / 1e6:.1f} M parameters; {memory}" if "parameters" in report else ""


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def read() -> dict[str, Report]:
    """The reports of docs/benchmarks by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


if __name__ == "__main__":
    write_atomic(FOLDER.with_suffix(".md"), render(read()))
