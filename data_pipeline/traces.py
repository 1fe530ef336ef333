"""Composes a Trace for each example, checks it, and keeps the verdict with it.

Paper, section 3.2.3. `rules` write and check by rule (`composing.py`); `server` has a language model write,
and rules and the model check (`trace_server.py`). A trace that fails the check is written too, with `kept`
false and the reasons, so that it can be counted and read; only what is kept is trained on. Where a trace
would have to claim findings of an image that nobody looked at, none is written: the record is empty, with the
reason "no findings". Neighbours: `findings.py` and `knowledge_base.py` come before.

    python -m data_pipeline.traces --examples=DIR --findings=DIR --knowledge=DIR --out=DIR
    python -m data_pipeline.traces --examples=DIR --findings=DIR --knowledge=DIR --out=DIR --traces=server \
        --writer.server.address=http://HOST:8000/v1 --writer.server.model=NAME
"""

import collections
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import app, flags, logging
from ml_collections import config_flags

from data_pipeline import files, jobs, manifest, parts, quality, stages
from data_pipeline.composing import Case, Rules
from data_pipeline.trace_server import TRIES, ServerWriter, WriterConfig
from fundus_jax.chat import LostError
from fundus_jax.records import ConfigError, DataError, Example, Findings, Knowledge, Trace

KINDS = ("rules", "server")
SUMMARY = "summary.json"
Book = Mapping[tuple[str, str], Knowledge]  # by (label, modality)


class TraceWriter(Protocol):
    """Writes traces and checks them. Where it asks nobody, a process pool pickles it.

    `boxes`, `most_words`: what `quality.check` asks of its traces.
    """

    name: str

    @property
    def boxes(self) -> int: ...

    @property
    def most_words(self) -> int: ...

    @property
    def config(self) -> dict:
        """Everything else that determines the traces besides the records, as JSON."""
        ...

    @property
    def through(self) -> jobs.Through | None:
        """What asks a server about cases; None where `traces` takes the cases themselves."""
        ...

    def traces(self, items: Iterable[Any], side: Path) -> Iterator[Trace]:
        """One trace a case. What else is worth keeping goes to files that begin with `side`, a path."""
        ...


def make_writer(kind: str, config: WriterConfig, boxes: int = 0) -> TraceWriter:
    """The writer of a name, rules or server; its traces say where findings lie, with at most so many boxes of
    each (0: they do not). Raises ConfigError for an unknown name or a setting that does not make sense."""
    if kind not in KINDS:
        raise ConfigError(f"traces is {kind!r}; it must be one of {', '.join(KINDS)}")
    return Rules(boxes) if kind == "rules" else ServerWriter(config, boxes)


def run(
    examples: Path,
    found: Path,
    knowledge: Path,
    out: Path,
    *,
    writer: TraceWriter | None = None,
    limit: float = 0.02,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary:
    """Writes one Trace for each example, shard by shard, and a summary by reason to `out`/summary.json.

    Args:
        examples, found, knowledge: finished directories of the three stages before.
        out: directory of the stage; its shards have the names of the examples' shards.
        writer: None means the rules.
        limit, workers, shard: as in `jobs.run`.
    """
    author = writer or Rules()
    seen = stages.hashes(found)
    inputs = stages.shards(examples, Example)
    lost = sorted({one.name for one in inputs} - seen.keys())
    if lost:
        raise DataError(f"{found}: has no shard {lost[0]} ({len(lost)} are missing); run the stage findings")
    known = stages.hashes(knowledge)
    keyed = [
        jobs.ShardInput(
            one.name,
            files.digest([one.key, seen[one.name], known]),
            functools.partial(_cases, examples, found, knowledge, one.name),
        )
        for one in inputs
    ]
    config = {
        "writer": {"name": author.name, **author.config},
        "check": {"version": quality.VERSION, "most_words": author.most_words}
        | ({"boxes": author.boxes} if author.boxes else {}),
    }
    job, process = jobs.Job("traces", config), functools.partial(_process, writer=author)
    summary = jobs.run(
        job, keyed, process, out, limit=limit, workers=workers, shard=shard, through=author.through
    )
    if not summary.shards_left:  # else other parts of the job still run
        counts = _write_summary(out, author.name)
        logging.info(
            "traces (%s): %d of %d kept; %s", author.name, counts["kept"], counts["traces"], counts["reasons"]
        )
    return summary


def _write_summary(out: Path, writer: str) -> dict:
    """The counts of a finished directory; where nothing was made since they were written, as they stand."""
    of = files.digest([[name, one.files] for name, one in sorted(manifest.load(out).items())])
    if (out / SUMMARY).exists():
        written = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        if written.get("of") == of:
            return written
    counts = {"writer": writer, "of": of, **summarise(jobs.read(out, Trace)), **summarise_tries(out)}
    files.write_atomic(out / SUMMARY, json.dumps(counts, indent=1) + "\n")
    return counts


def summarise(traces: Iterator[Trace]) -> dict:
    """Counts: traces, kept, and how many traces each kind of reason stands against."""
    total, kept, reasons = 0, 0, collections.Counter()
    for trace in traces:
        total, kept = total + 1, kept + trace.kept
        reasons.update({quality.kind(reason) for reason in trace.reasons})
    return {"traces": total, "kept": kept, "reasons": dict(sorted(reasons.items()))}


def summarise_tries(out: Path) -> dict:
    """The same counts over all that a model wrote, as `tries`, with those that were kept or given up later;
    {} where no model was asked."""
    total, kept, reasons, asked = 0, 0, collections.Counter(), False
    for entry in manifest.complete(out):
        name = f"{entry.name}{TRIES}"
        if name not in entry.files:
            continue
        asked = True
        manifest.check(out, entry, name)
        for line in (out / name).read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            total, kept = total + 1, kept + (not one["reasons"])
            reasons.update({quality.kind(reason) for reason in one["reasons"]})
    counts = {"written": total, "kept": kept, "reasons": dict(sorted(reasons.items()))}
    return {"tries": counts} if asked else {}


def read_book(knowledge: Path) -> Book:
    """The Knowledge records of a finished directory by (label, modality)."""
    return {(record.label, record.modality): record for record in jobs.read(knowledge, Knowledge)}


def _cases(examples: Path, found: Path, knowledge: Path, name: str) -> list[Case]:
    """The cases of a shard."""
    seen = {record.example: record for record in stages.load(found, name, Findings)}
    book = read_book(knowledge)
    return [
        Case(
            one,
            seen.get(one.id),
            book.get((one.answer, one.modality)) if one.task in stages.LABEL_TASKS else None,
        )
        for one in stages.load(examples, name, Example)
    ]


def _process(shard: jobs.ShardInput, folder: Path, *, writer: TraceWriter) -> Iterator[Trace]:
    return writer.traces(shard.items, folder / shard.name)  # type: ignore[arg-type]


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples.", required=True)
    flags.DEFINE_string("findings", None, "Finished directory of Findings.", required=True)
    flags.DEFINE_string("knowledge", None, "Finished directory of Knowledge.", required=True)
    flags.DEFINE_string("out", None, "Directory for the traces.", required=True)
    flags.DEFINE_enum("traces", "rules", KINDS, "Who writes them.")
    config_flags.DEFINE_config_dataclass("writer", WriterConfig(), "How a model writes and checks.")
    flags.DEFINE_integer("boxes", 0, "Say where each finding lies, with at most so many boxes.", 0)
    flags.DEFINE_float("limit", 0.02, "Share of quarantined examples that stops the job.", 0, 1)
    flags.DEFINE_integer("workers", 1, "Processes, where no server is asked.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    folders = (Path(getattr(values, name)) for name in ("examples", "findings", "knowledge", "out"))
    try:
        writer = make_writer(values.traces, values.writer, values.boxes)
        part = parts.chosen(values.shard)
        run(*folders, writer=writer, limit=values.limit, workers=values.workers, shard=part)
    except (ConfigError, DataError, LostError) as error:
        raise SystemExit(f"traces: {error}") from error


if __name__ == "__main__":
    _define_flags()
    app.run(main)
