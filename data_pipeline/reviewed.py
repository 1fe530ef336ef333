"""Traces as reviewers left them: what they rejected goes, what they corrected takes its place.

A correction passes the quality check that the traces passed, with the same settings, or the trace is left
out. An accepted trace is kept also where the check had rejected it, as long as it can be written down: a
person has read the reasons. A trace on which reviewers disagree, or that one of them rejected, is left out;
each stands with the reason in the shard's quarantine file, and OUT/summary.json counts them by kind.
Decisions about a text that has changed since count for nothing, and are listed in OUT/void.tsv.

A corrected answer is an answer to the question, so it changes the Example too: the check compares with it,
and `decontaminate --reviewed=OUT` puts it into the Examples that are trained on. Held-out questions keep the
published answer: a correction of it is void. Neighbours: `traces.py` before, `reviewing/` where people
decide.

    python -m data_pipeline.reviewed --examples=DIR --findings=DIR --knowledge=DIR --traces=DIR \\
        --decisions=DIR --out=DIR
"""

import collections
import csv
import dataclasses
import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from data_pipeline import decisions, files, jobs, manifest, parts, quality, stages
from data_pipeline.decisions import Decision, trace_sha256
from fundus_jax import dialog
from fundus_jax.records import ConfigError, DataError, Example, Findings, Knowledge, Trace

SUMMARY, VOID = "summary.json", "void.tsv"
ANSWERS = ".answers.json"  # end of the name of the side file with the answers that were corrected
Rules = Mapping[str, int]  # most_words and boxes, as `quality.check` takes them


def run(
    examples: Path,
    found: Path,
    knowledge: Path,
    traces: Path,
    out: Path,
    book: decisions.Book,
    *,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary:
    """Write the traces that hold to `out`, in shards of the same names.

    Args:
        examples, found, knowledge, traces: finished directories of the stages before.
        book: what reviewers decided, `decisions.read`; it is a part of each shard's key.
        workers, shard: as in `jobs.run`.
    """
    decided = decisions.digest(book)
    before = [stages.hashes(one) for one in (examples, found)]
    known = stages.hashes(knowledge)
    inputs = [
        jobs.ShardInput(
            one.name,
            files.digest([one.key, *(named[one.name] for named in before), known, decided]),
            one.items,
        )
        for one in stages.shards(traces, Trace)
    ]
    process = functools.partial(
        _process, examples=examples, found=found, knowledge=knowledge, book=book, rules=check_rules(traces)
    )
    job = jobs.Job("reviewed", {"version": 1, "check": quality.VERSION})
    summary = jobs.run(job, inputs, process, out, limit=1.0, workers=workers, shard=shard)
    if not summary.shards_left:
        _report(examples, traces, out, book)
    return summary


def check_rules(traces: Path) -> dict[str, int]:
    """The settings of the quality check that a directory of traces passed."""
    check = manifest.settings(traces)["check"]
    return {"most_words": check["most_words"], "boxes": check.get("boxes", 0)}


def check(
    example: Example,
    found: Findings | None,
    knowledge: Mapping[tuple[str, str], Knowledge],
    think: str,
    answer: str,
    rules: Rules,
) -> tuple[str, ...]:
    """The reasons against a correction; () for a good one. `knowledge`: records by (label, modality)."""
    if example.options and answer not in example.options:
        return (f"{quality.LABEL}: {answer!r} is not one of the options {', '.join(example.options)}",)
    asked = dataclasses.replace(example, answer=answer)
    about = knowledge.get((answer, example.modality)) if example.task in stages.LABEL_TASKS else None
    return quality.check(asked, found, about, think, answer, **rules)


def void(example: Example, trace: Trace, decision: Decision) -> str:
    """Why a decision does not count; "" if it does."""
    if decision.trace != trace_sha256(trace):
        return "the trace has changed since"
    if decision.outcome == "correct" and example.split != "train" and decision.answer != example.answer:
        return "a held-out question keeps the published answer"
    if decision.outcome == "accept" and not _writable(trace):
        return "there is no trace that could be kept"
    return ""


def answers(out: Path) -> dict[str, str]:
    """Example -> its answer as a reviewer corrected it, of a finished directory of reviewed traces."""
    found: dict[str, str] = {}
    for entry in manifest.complete(out):
        name = f"{entry.name}{ANSWERS}"
        manifest.check(out, entry, name)
        found |= json.loads((out / name).read_text(encoding="utf-8"))
    return found


def _process(
    shard: jobs.ShardInput,
    folder: Path,
    *,
    examples: Path,
    found: Path,
    knowledge: Path,
    book: decisions.Book,
    rules: Rules,
) -> Iterator[Trace | jobs.Quarantine]:
    asked = {one.id: one for one in stages.load(examples, shard.name, Example)}
    seen = {one.example: one for one in stages.load(found, shard.name, Findings)}
    known = {(one.label, one.modality): one for one in jobs.read(knowledge, Knowledge)}
    corrected: dict[str, str] = {}
    for trace in shard.items:  # type: ignore[union-attr]
        if trace.example not in asked:
            raise DataError(f"{shard.name}: no example {trace.example!r}, of which there is a trace")
        example = asked[trace.example]
        held = [one for one in book.get(example.id, ()) if not void(example, trace, one)]
        result = _settle(trace, held) if held else trace
        if isinstance(result, Decision):
            reasons = check(example, seen.get(example.id), known, result.think, result.answer, rules)
            result = _corrected(result, reasons)
            if isinstance(result, Trace) and result.answer != example.answer:
                corrected[example.id] = result.answer
        yield result
    (folder / f"{shard.name}{ANSWERS}").write_text(json.dumps(corrected), encoding="utf-8")


def _settle(trace: Trace, held: Sequence[Decision]) -> Trace | Decision | jobs.Quarantine:
    """A trace after the decisions on it, one at least; a correction is still to be checked."""
    first = held[0]
    if not decisions.agree(held):
        said = ", ".join(f"{one.reviewer} {one.outcome}" for one in held)
        return jobs.Quarantine(trace.example, f"reviewers disagree: {said}")
    if first.outcome == "reject":
        said = "; ".join(f"{one.reason} ({one.reviewer})" for one in held)
        return jobs.Quarantine(trace.example, f"rejected: {said}")
    if first.outcome == "correct":
        return first
    return dataclasses.replace(trace, kept=True, reasons=())


def _corrected(one: Decision, reasons: Sequence[str]) -> Trace | jobs.Quarantine:
    if reasons:
        return jobs.Quarantine(one.example, f"correction fails the check: {'; '.join(reasons)}")
    return Trace(example=one.example, think=one.think, answer=one.answer, kept=True, reasons=())


def _writable(trace: Trace) -> bool:
    try:
        dialog.render(trace.think, trace.answer)
    except DataError:
        return False
    return True


def _report(examples: Path, traces: Path, out: Path, book: decisions.Book) -> None:
    """Count what became of the decisions; list those that count for nothing."""
    asked = {one.id: one for one in jobs.read(examples, Example) if one.id in book}
    counts: collections.Counter[str] = collections.Counter()
    rejected: collections.Counter[str] = collections.Counter()
    rows, unknown = [], dict(book)
    for trace in jobs.read(traces, Trace):
        found = unknown.pop(trace.example, ())
        why = {one: void(asked[trace.example], trace, one) for one in found}
        rows += [(one.example, one.reviewer, one.outcome, text) for one, text in why.items() if text]
        held = [one for one, text in why.items() if not text]
        if not held:
            continue
        outcome = held[0].outcome if decisions.agree(held) else "disagree"
        counts[outcome] += 1
        counts["overruled"] += outcome == "accept" and not trace.kept
        rejected.update({quality.kind(one.reason) for one in held} if outcome == "reject" else ())
    rows += [
        (one.example, one.reviewer, one.outcome, "there is no such trace")
        for found in unknown.values()
        for one in found
    ]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([("example", "reviewer", "outcome", "why"), *sorted(rows)])
    files.write_atomic(out / VOID, text.getvalue())
    entries = manifest.complete(out)
    left_out = sum(one.quarantined for one in entries)
    shown = {
        "traces": sum(one.answers for one in entries),
        "left_out": left_out,
        "accepted": counts["accept"],
        "overruled": counts["overruled"],
        "corrected": counts["correct"],
        "corrections_failing": left_out - counts["reject"] - counts["disagree"],
        "answers_corrected": len(answers(out)),
        "rejected": dict(sorted(rejected.items())),
        "disagree": counts["disagree"],
        "void": len(rows),
    }
    files.write_atomic(out / SUMMARY, json.dumps(shown, indent=1) + "\n")
    logging.info("reviewed: %s", shown)


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples.", required=True)
    flags.DEFINE_string("findings", None, "Finished directory of Findings.", required=True)
    flags.DEFINE_string("knowledge", None, "Finished directory of Knowledge.", required=True)
    flags.DEFINE_string("traces", None, "Finished directory of Traces.", required=True)
    flags.DEFINE_string(
        "decisions", None, "Decision files, and folders of them, comma-separated.", required=True
    )
    flags.DEFINE_string("out", None, "Directory for the traces that hold.", required=True)
    flags.DEFINE_integer("workers", 1, "Processes.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    examples, found, knowledge, traces, out = (
        Path(getattr(values, name)) for name in ("examples", "findings", "knowledge", "traces", "out")
    )
    try:
        share = {"workers": values.workers, "shard": parts.chosen(values.shard)}
        book = decisions.read(decisions.paths(values.decisions))
        run(examples, found, knowledge, traces, out, book, **share)
    except (ConfigError, DataError) as error:
        raise SystemExit(f"reviewed: {error}") from error


if __name__ == "__main__":
    _define_flags()
    app.run(main)
