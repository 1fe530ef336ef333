"""Composes a Trace for each example, checks it, and keeps the verdict with it.

Paper, section 3.2.3. A trace that fails the check is written too, with `kept` false and the reasons, so that
it can be counted and read; only what is kept is trained on. Where a trace would have to claim findings of an
image that nobody looked at, none is written: the record is empty, with the reason "no findings". Neighbours:
`writer.py` composes, `quality.py` checks; `findings.py` and `knowledge_base.py` come before.

    python -m data_pipeline.traces --examples=DIR --findings=DIR --knowledge=DIR --out=DIR
"""

import collections
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from data_pipeline import files, jobs, manifest, parts, quality, stages
from data_pipeline.writer import RuleWriter, TraceWriter
from fundus_jax.records import DataError, Example, Findings, Knowledge, Trace

SUMMARY = "summary.json"
Book = Mapping[tuple[str, str], Knowledge]  # by (label, modality)


def compose(
    example: Example,
    found: Findings | None,
    knowledge: Knowledge | None,
    writer: TraceWriter,
    most_words: int = quality.MOST_WORDS,
    boxes: int = 0,
) -> Trace:
    """The checked trace of one example; with `boxes`, it has to say where, as `quality.check` explains."""
    think = writer.write(example, found, knowledge)
    reasons = quality.check(
        example, found, knowledge, think, example.answer, most_words=most_words, boxes=boxes
    )
    return Trace(example=example.id, think=think, answer=example.answer, kept=not reasons, reasons=reasons)


def run(
    examples: Path,
    found: Path,
    knowledge: Path,
    out: Path,
    *,
    writer: TraceWriter | None = None,
    most_words: int = quality.MOST_WORDS,
    boxes: int = 0,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary:
    """Writes one Trace for each example, shard by shard, and a summary by reason to `out`/summary.json.

    Args:
        examples, found, knowledge: finished directories of the three stages before.
        out: directory of the stage; its shards have the names of the examples' shards.
        writer: None means the rule writer.
        most_words: bound of a trace's length for the check.
        boxes: traces say where each finding lies, with so many boxes at most; 0: they do not.
        workers, shard: as in `jobs.run`.
    """
    author = writer or RuleWriter(boxes=boxes)
    seen = stages.hashes(found)
    inputs = stages.shards(examples, Example)
    lost = sorted({one.name for one in inputs} - seen.keys())
    if lost:
        raise DataError(f"{found}: has no shard {lost[0]} ({len(lost)} are missing); run the stage findings")
    known = stages.hashes(knowledge)
    keyed = [
        jobs.ShardInput(one.name, files.digest([one.key, seen[one.name], known]), one.items) for one in inputs
    ]
    config = {
        "writer": {"name": author.name, **author.config},
        "check": {"version": quality.VERSION, "most_words": most_words} | ({"boxes": boxes} if boxes else {}),
    }
    process = functools.partial(
        _process, found=found, knowledge=knowledge, writer=author, most_words=most_words, boxes=boxes
    )
    summary = jobs.run(jobs.Job("traces", config), keyed, process, out, workers=workers, shard=shard)
    if manifest.load(out).keys() >= {one.name for one in keyed}:  # else other parts of the job still run
        counts = summarise(jobs.read(out, Trace))
        files.write_atomic(out / SUMMARY, json.dumps({"writer": author.name, **counts}, indent=1) + "\n")
        logging.info(
            "traces (%s): %d of %d kept; %s", author.name, counts["kept"], counts["traces"], counts["reasons"]
        )
    return summary


def summarise(traces: Iterator[Trace]) -> dict:
    """Counts: traces, kept, and how many traces each kind of reason stands against."""
    total, kept, reasons = 0, 0, collections.Counter()
    for trace in traces:
        total, kept = total + 1, kept + trace.kept
        reasons.update({quality.kind(reason) for reason in trace.reasons})
    return {"traces": total, "kept": kept, "reasons": dict(sorted(reasons.items()))}


def read_book(knowledge: Path) -> Book:
    """The Knowledge records of a finished directory by (label, modality)."""
    return {(record.label, record.modality): record for record in jobs.read(knowledge, Knowledge)}


def _process(
    shard: jobs.ShardInput,
    folder: Path,
    *,
    found: Path,
    knowledge: Path,
    writer: TraceWriter,
    most_words: int,
    boxes: int,
) -> Iterator[Trace]:
    del folder  # no side files
    seen = {record.example: record for record in stages.load(found, shard.name, Findings)}
    book = read_book(knowledge)
    examples: Sequence[Example] = shard.items  # type: ignore[assignment]
    for example in examples:
        about = book.get((example.answer, example.modality)) if example.task in stages.LABEL_TASKS else None
        yield compose(example, seen.get(example.id), about, writer, most_words, boxes)


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples.", required=True)
    flags.DEFINE_string("findings", None, "Finished directory of Findings.", required=True)
    flags.DEFINE_string("knowledge", None, "Finished directory of Knowledge.", required=True)
    flags.DEFINE_string("out", None, "Directory for the traces.", required=True)
    flags.DEFINE_integer("most_words", quality.MOST_WORDS, "Longest trace that is kept, in words.")
    flags.DEFINE_integer("boxes", 0, "Say where each finding lies, with at most so many boxes.", 0)
    flags.DEFINE_integer("workers", 1, "Processes.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    run(
        Path(values.examples),
        Path(values.findings),
        Path(values.knowledge),
        Path(values.out),
        most_words=values.most_words,
        boxes=values.boxes,
        workers=values.workers,
        shard=parts.chosen(values.shard),
    )


if __name__ == "__main__":
    _define_flags()
    app.run(main)
