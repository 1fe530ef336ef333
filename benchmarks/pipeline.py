"""The pipeline's jobs: answers a second beside what the server gives at its best, and how soon a job resumes.

    python -m benchmarks.pipeline --out=pipeline.json
    python -m benchmarks.pipeline --address=http://HOST:8000/v1 --model=NAME --out=pipeline_vllm.json

First a client without weight (`serving`) asks about so many items, with 1, 2, 4, ... requests under way; the
best of these is the server's own best. Then a job, with shards, files and kept answers, does the same, in
turns with further runs of that client; `share` is the quotient of their medians, and `runs` has them all. No
two runs show an image twice, so no cache of the server knows one; a run before the first is not counted.
Without --address the server is one of 50 ms with `slots` requests at a time; and then jobs of so many records
in shards of 500, which lack their last shard, are given again: seconds until that shard is begun, and memory.
What is measured is a process of its own, without jax.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import random
import re
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from absl import flags

from benchmarks import serving
from data_pipeline import asking, jobs, manifest, stages
from fundus_jax.chat import Chat, ChatConfig, picture
from fundus_jax.records import Findings

SETTINGS, FAKE = ("items", "shard_size", "repeats"), ("slots", "latency")
SIDE, SAMPLES = 112, 5  # pixels of an image; answers to a request: as the stage of findings asks
NAMES = ("drusen", "haemorrhage", "hard exudate", "microaneurysm")
EMPTY = {"present": (), "votes": {}, "n": 0, "origin": "pixels"}


class Answer(pydantic.BaseModel):
    """What the server is asked for: a few tokens in a grammar."""

    model_config = pydantic.ConfigDict(extra="forbid")
    findings: list[Literal[NAMES]] = pydantic.Field(max_length=8)  # type: ignore[valid-type]


def messages(item: int) -> list[dict[str, Any]]:
    """A conversation about an image, each another."""
    size = 3 * SIDE * SIDE
    fields = (b"BM", 54 + size, 0, 54, 40, SIDE, SIDE, 1, 24, 0, size, 0, 0, 0, 0)
    pixels = random.Random(item).randbytes(size)  # noqa: S311
    text = {"type": "text", "text": "Which findings does the image show?"}
    return [
        {
            "role": "user",
            "content": [picture(struct.pack("<2sIIIIiiHHIIiiII", *fields) + pixels, "bmp"), text],
        }
    ]


async def ask(chat: Chat, item: int) -> Findings:
    """A record about an item, from several answers; raises ChatError where the first is none."""
    first, *_ = await chat.ask(messages(item), Answer, n=SAMPLES, max_tokens=64, temperature=1.0)
    if not isinstance(first, Answer):
        raise first
    return Findings(example=f"item {item}", **EMPTY)


def body(model: str, item: int) -> dict[str, Any]:
    """The request that `ask` makes."""
    described = {"name": Answer.__name__, "schema": Answer.model_json_schema(), "strict": True}
    said = {"messages": messages(item), "n": SAMPLES, "max_tokens": 64, "temperature": 1.0}
    return {"model": model, **said, "response_format": {"type": "json_schema", "json_schema": described}}


def shards(items: range, size: int) -> list[jobs.ShardInput]:
    """Some items in shards."""
    starts = range(0, len(items), size)
    return [jobs.ShardInput(f"s{at:07d}", f"{items[at]}", items[at : at + size]) for at in starts]


def job(out: Path, address: str, model: str, items: range, size: int, concurrency: int) -> float:
    """Items a second of a job about `items`."""
    config, inputs = ChatConfig(address=address, model=model, concurrency=concurrency), shards(items, size)
    through = asking.through(ask, config, "server", name=str)
    begun = time.perf_counter()
    summary = jobs.run(jobs.Job("ask", {}), inputs, asking.as_answered, out, limit=1.0, through=through)
    spent = time.perf_counter() - begun
    if summary.answers + summary.quarantined != len(items):
        raise RuntimeError(f"{len(items)} items became {summary}")
    return len(items) / spent


def fill(folder: Path, records: int, size: int) -> None:
    """Two stages of so many records, the second made from the first."""
    jobs.run(jobs.Job("first", {}), shards(range(records), size), _records, folder / "first")
    jobs.run(jobs.Job("second", {}), stages.shards(folder / "first", Findings), _again, folder / "second")


def cut(folder: Path) -> None:
    """Take the last shard from the second stage."""
    path = folder / "second" / manifest.MANIFEST
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _records(shard: jobs.ShardInput, folder: Path) -> Iterator[Findings]:
    return (Findings(example=f"item {item}", **EMPTY) for item in shard.items)  # type: ignore[union-attr]


def _again(shard: jobs.ShardInput, folder: Path) -> Any:
    return shard.items


def resume(folder: Path) -> float:
    """Seconds until a job with everything but its last shard begins that shard."""
    began: list[float] = []

    def process(shard: jobs.ShardInput, scratch: Path) -> Any:
        began.append(time.perf_counter())
        return shard.items

    begun = time.perf_counter()
    inputs = stages.shards(folder / "first", Findings)
    jobs.run(jobs.Job("second", {}), inputs, process, folder / "second")
    [at] = began
    return at - begun


def _measured(call: Callable[[], float], answer: Any) -> None:
    value = call()  # getrusage would count what the parent had when it forked
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    answer.send((value, int(peak[1]) / 1024 if peak else float("nan")))


def apart(call: Callable[[], float]) -> tuple[float, float]:
    """What `call` returns, and the most memory in MB that a process of its own took for it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(call, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def throughput(args: Any, address: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The sweep, and the job at the concurrency that it found best and at twice that."""
    starts = itertools.count(time.time_ns(), args.items)  # nor does another command show these images

    def items() -> range:
        first = next(starts)
        return range(first, first + args.items)

    def server(level: int) -> float:
        return serving.plain(address, [body(args.model, item) for item in items()], level)

    def ours(out: Path, level: int) -> tuple[float, float]:
        return apart(functools.partial(job, out, address, args.model, items(), args.shard_size, level))

    from benchmarks import common

    levels = common.numbers("sweep", args.sweep)
    server(max(levels))  # its first answers count nowhere
    rates: dict[int, float] = {}
    for level in levels:
        rates[level] = server(level)
        yield {"what": "server", "under_way": level, "items": args.items, "per_second": rates[level]}
    best = max(rates, key=lambda one: rates[one])
    for level in sorted({best, 2 * best}):
        runs: list[dict[str, float]] = []
        for repeat in range(args.repeats):
            out = folder / f"job-{level}-{repeat}"
            if repeat % 2 == 0:
                beside, (rate, memory) = server(best), ours(out, level)
            else:
                (rate, memory), beside = ours(out, level), server(best)
            runs.append({"per_second": rate, "memory_mb": memory, "server_per_second": beside})
        yield {"what": "job", "under_way": level, "items": args.items, **summary(runs), "runs": runs}


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The medians of a job's runs, and what share of the server's rate the job's is."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return medians | {"share": medians["per_second"] / medians["server_per_second"]}


def scans(args: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """The resumed jobs."""
    for records in map(int, args.records):
        place = folder / f"{records}"
        fill(place, records, 500)
        runs: list[tuple[float, float]] = []
        for _ in range(args.repeats):
            cut(place)
            runs.append(apart(functools.partial(resume, place)))
        seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
        yield {"what": "resume", "items": records, "seconds": seconds, "memory_mb": memory}


def run(args: Any) -> dict[str, Any]:
    """The whole measurement, as it is written to --out."""
    from benchmarks import common  # here, since the children that are measured import this file

    report = common.new_report(args, None, (*SETTINGS, *(("model",) if args.address else FAKE)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.address:
            rows = [throughput(args, args.address, folder)]
        else:
            rows = [_faked(args, folder), scans(args, folder)]
        for row in (row for some in rows for row in some):
            report["rows"].append(row)
            told = {key: value for key, value in row.items() if key != "runs"}
            print(" ".join(f"{key} {common.short(value)}" for key, value in told.items()), flush=True)
    return report


def _faked(args: Any, folder: Path) -> Iterator[dict[str, Any]]:
    with serving.server(args.slots, args.latency / 1e3) as address:
        yield from throughput(args, address, folder)


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("address", "", "A real server, up to and with the /v1.")
    flags.DEFINE_string("model", "m", "The name it serves.")
    flags.DEFINE_integer("slots", 8, "Requests that the fake server works on at a time.", lower_bound=1)
    flags.DEFINE_integer("latency", 50, "Milliseconds that it takes for one.", lower_bound=0)
    flags.DEFINE_list("sweep", ["1", "2", "4", "8", "16", "32"], "Requests under way.")
    flags.DEFINE_integer("items", 2000, "Items of the job.", lower_bound=1)
    flags.DEFINE_integer("shard_size", 100, "Items of a shard.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Runs of the job, in turns with the plain client.", lower_bound=1)
    flags.DEFINE_list("records", ["10000", "100000", "1000000"], "Records of the jobs that are resumed.")
    flags.DEFINE_string("out", "", "JSON file to write.")


if __name__ == "__main__":
    from benchmarks import common

    common.command(define_flags, run)
