"""Finds copies of pictures within and across data sets, and keeps from training what is held out.

    python -m data_pipeline.decontaminate --examples=DIR --out=DIR [--against=DIR ...] [--reviewed=DIR]
    python -m data_pipeline.decontaminate --images=DIR [--images=DIR ...] --out=DIR

The first form takes a finished directory of Examples and writes those that may be used, in shards of the
same names, into OUT. An Example is left out if its picture, or its patient, stands in a split that is
held out from its own (train from val, and both from test) or among the benchmarks, which are folders of
images or finished directories of Examples; each one is listed with the reason in the shard's quarantine
file. The second form only looks. Both write OUT/pairs.tsv (a, b, kind, distance), OUT/conflicts.tsv
(copies with different labels) and OUT/summary.json. With --shard=i/n the command is given once for each
phase: prints, pairs, verdicts. Neighbours: `near` compares two pictures, `candidates` chooses which,
`leaks` draws the conclusions.
"""

import collections
import csv
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from numpy.typing import NDArray

from data_pipeline import candidates, files, images, jobs, leaks, manifest, near, parts, pictures, stages
from data_pipeline.leaks import Pair, Print, Said
from data_pipeline.reviewed import answers
from fundus_jax.records import ConfigError, DataError, Example

PAIRS, CONFLICTS, SUMMARY = "pairs.tsv", "conflicts.tsv", "summary.json"


def run(
    examples: Path,
    out: Path,
    *,
    against: Sequence[Path] = (),
    reviewed: Path | None = None,
    alike: bool = True,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary | None:
    """Write the Examples that may be used to `out`, and what was found beside them.

    Args:
        examples: finished directory of Examples with their images.
        out: directory of the stage; its shards have the names of the examples' shards.
        against: benchmarks: folders of images, or finished directories of Examples, whose splits count.
        reviewed: finished directory of reviewed traces; answers that were corrected there count.
        alike: look for pictures that are alike; False finds copies of the same bytes or pixels only, for
            pictures that are known to be drawn one by one.
        workers, shard: as in `jobs.run`.

    Returns:
        Counts of Examples; None where other parts of the job have yet to make their prints or pairs, or to
        make them anew.
    """
    sources = (examples, *against)
    found = _look(sources, out, alike=alike, workers=workers, shard=shard)
    if found is None:
        return None
    prints, pairs, unreadable = found
    said = {one.name: Said(split=one.split, patient="", answers={}) for one in prints}
    for number, source in enumerate(sources):
        if pictures.is_stage(source):
            said |= _said(source, foreign=number > 0)
    removed = {name: ("unreadable", f"image: {reason}") for name, reason in unreadable.items()}
    removed = leaks.removals(said, pairs) | removed
    reasons = {name: reason for name, (_, reason) in removed.items()}
    corrected = answers(reviewed) if reviewed else {}
    verdict = files.digest([*sorted(reasons.items()), *([corrected] if corrected else [])])
    inputs = [
        jobs.ShardInput(one.name, files.digest([one.key, verdict]), one.items)
        for one in stages.shards(examples, Example)
    ]
    job = jobs.Job(
        "decontaminate", {"near": near.VERSION, "alike": alike, "against": [str(one) for one in against]}
    )
    process = functools.partial(_clean, directory=examples, reasons=reasons, corrected=corrected)
    summary = jobs.run(job, inputs, process, out, limit=1.0, workers=workers, shard=shard)
    if not summary.shards_left:
        own = set(_said(examples))
        kinds = collections.Counter(kind for name, (kind, _) in removed.items() if name in own)
        _report(out, prints, pairs, leaks.conflicts(said, pairs), dict(kinds))
    return summary


def look(folders: Sequence[Path], out: Path, *, workers: int = 1, shard: str = "0/1") -> list[Pair] | None:
    """All pairs of pictures in some folders of images and below them; written to `out`/pairs.tsv too.

    A file that can not be read is listed with the reason in `out`/prints/*.quarantine.jsonl, and counted.
    Returns None where other parts of the job have yet to make their prints or pairs.
    """
    found = _look(folders, out, alike=True, workers=workers, shard=shard)
    if found is None:
        return None
    prints, pairs, unreadable = found
    for name, reason in list(unreadable.items())[: jobs.SHOWN]:
        logging.warning("decontaminate: %s can not be read: %s", name, reason)
    _report(out, prints, pairs, [], {"unreadable": len(unreadable)})
    return pairs


def _look(
    sources: Sequence[Path], out: Path, *, alike: bool, workers: int, shard: str
) -> tuple[list[Print], list[Pair], dict[str, str]] | None:
    """Prints of all pictures, pairs among them, and names of pictures that can not be read with the
    reason."""
    made, paired = out / "prints", out / "pairs"
    shards = [one for number, source in enumerate(sources) for one in pictures.shards(source, str(number))]
    config = {"near": near.VERSION, "alike": alike}
    share = {"workers": workers, "shard": shard, "limit": 1.0}
    process = functools.partial(_fingerprint, alike=alike)
    if jobs.run(jobs.Job("prints", config), shards, process, made, **share).shards_left:
        return None
    prints: list[Print] = list(jobs.read(made, Print))
    pairs, unreadable = leaks.exact(prints), _quarantined(made)
    if not alike:
        return prints, pairs, unreadable
    entries = manifest.complete(made)
    # the prints, and the names that pictures have in them
    whole = files.digest(
        [
            [entry.name, sorted((name, one["sha256"]) for name, one in entry.files.items())]
            for entry in entries
        ]
    )
    inputs = [jobs.ShardInput(entry.name, files.digest([entry.name, whole]), (entry,)) for entry in entries]
    table = out / f"table-{whole[:16]}"
    process = functools.partial(_compare, made=made, table=table)
    config |= {"same": [*map(list, near.SAME_EYE.items()), near.SAME_PICTURE]}
    if jobs.run(jobs.Job("pairs", config), inputs, process, paired, **share).shards_left:
        return None
    shutil.rmtree(table, ignore_errors=True)
    return prints, leaks.union(pairs, jobs.read(paired, Pair)), unreadable


def _fingerprint(shard: jobs.ShardInput, folder: Path, *, alike: bool) -> Iterator[Print | jobs.Quarantine]:
    """Prints of a shard's pictures, their keypoints in a file beside them."""
    rows: list[NDArray[np.void]] = []
    for one in shard.items:  # type: ignore[union-attr]
        try:
            data = one.read()
            image = images.decode(data)
        except DataError as error:
            yield jobs.Quarantine(one.name, str(error))
            continue
        if alike:
            rows.append(near.fingerprint(image))
        yield Print(
            name=one.name,
            split=one.split,
            sha256=files.sha256(data) if isinstance(data, Path) else hashlib.sha256(data).hexdigest(),
            pixels=hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(),
        )
    np.save(folder / _side(shard.name), np.array(rows, near.PRINT))


def _compare(shard: jobs.ShardInput, folder: Path, *, made: Path, table: Path) -> Iterator[Pair]:
    """The pictures of one shard with their candidates among all."""
    del folder  # no side files
    entries = manifest.complete(made)
    names = [one.name for one in jobs.read(made, Print)]
    prints = [np.load(made / _side(entry.name), mmap_mode="r") for entry in entries]
    firsts = np.cumsum([0, *map(len, prints)])
    mine = [entry.name for entry in entries].index(shard.name)
    if not any(one["count"].any() for one in prints):
        return

    def at(number: int) -> NDArray[np.void]:
        place = int(np.searchsorted(firsts, number, side="right")) - 1
        return prints[place][number - firsts[place]]

    pairs = candidates.search(candidates.build(prints, table), prints[mine], int(firsts[mine]))
    for a, b in np.unique(np.sort(pairs, axis=1), axis=0).tolist():
        match = near.compare(at(a), at(b))
        if kind := near.kind(match):
            distance = round(1000 * (1 - match.correlation))
            yield Pair(a=names[a], b=names[b], relation=kind, distance=distance)


def _clean(
    shard: jobs.ShardInput,
    folder: Path,
    *,
    directory: Path,
    reasons: Mapping[str, str],
    corrected: Mapping[str, str],
) -> Iterator[Example | jobs.Quarantine]:
    del folder  # the images stay where they are
    examples: Sequence[Example] = shard.items  # type: ignore[assignment]
    names = {one.image: name for name, one in pictures.named(directory, examples).items()}
    for one in examples:
        reason = reasons.get(names[one.image])
        answered = replace(one, answer=corrected[one.id]) if one.id in corrected else one
        yield jobs.Quarantine(one.id, reason) if reason else answered


def _said(directory: Path, *, foreign: bool = False) -> dict[str, Said]:
    """What the Examples of a directory say of each picture, by its name: of diseases all that it has."""
    examples: list[Example] = list(jobs.read(directory, Example))
    answers: dict[str, dict[str, str]] = {}
    for one in examples:
        known = answers.setdefault(
            one.image, {"disease": "; ".join(sorted(one.labels))} if one.labels else {}
        )
        if one.task in stages.LABEL_TASKS:
            known.setdefault(one.task, one.answer)
    return {
        name: Said(split=one.split, patient=one.patient, answers=answers[one.image])
        for name, one in pictures.named(directory, examples, foreign=foreign).items()
    }


def _side(shard: str) -> str:
    return f"{shard}.prints.npy"


def _quarantined(out: Path) -> dict[str, str]:
    lines = [
        json.loads(line)
        for entry in manifest.complete(out)
        for line in (out / f"{entry.name}.quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {line["key"]: line["reason"] for line in lines}


def _report(
    out: Path,
    prints: Sequence[Print],
    pairs: Sequence[Pair],
    conflicts: Sequence[tuple[str, ...]],
    removed: Mapping[str, int],
) -> None:
    """Write the tables and the summary, and say how much was found."""
    rows = [(pair.a, pair.b, pair.relation, leaks.distance(pair)) for pair in pairs]
    _table(out / PAIRS, ("a", "b", "kind", "distance"), rows)
    _table(out / CONFLICTS, ("task", "a", "answer_a", "b", "answer_b"), conflicts)
    counts = {
        "pictures": len(prints),
        "pairs": dict(sorted(collections.Counter(pair.relation for pair in pairs).items())),
        "conflicts": len(conflicts),
        "removed": dict(sorted(removed.items())),
    }
    files.write_atomic(out / SUMMARY, json.dumps(counts, indent=1) + "\n")
    logging.info(
        "decontaminate: %d pictures, pairs %s, %d conflicts; pictures removed: %s",
        counts["pictures"], counts["pairs"], counts["conflicts"], counts["removed"],
    )  # fmt: skip


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_atomic(path, text.getvalue())


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples.")
    flags.DEFINE_multi_string("against", [], "Benchmarks: a folder of images or a directory of Examples.")
    flags.DEFINE_string("reviewed", "", "Finished directory of reviewed traces; its corrected answers count.")
    flags.DEFINE_multi_string("images", [], "A folder of images; only looks for pairs.")
    flags.DEFINE_string("out", None, "Directory for what is found.", required=True)
    flags.DEFINE_bool(
        "alike", True, "Look for pictures that are alike, not only for the same bytes or pixels."
    )
    flags.DEFINE_integer("workers", 1, "Processes.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    """Run the job as the flags say."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    if bool(values.examples) == bool(values.images) or (values.images and values.against):
        raise app.UsageError("give either --examples (and --against), or --images")
    out = Path(values.out)
    try:
        share = {"workers": values.workers, "shard": parts.chosen(values.shard)}
        if values.images:
            done = look([Path(one) for one in values.images], out, **share)
        else:
            against = [Path(one) for one in values.against]
            reviewed = Path(values.reviewed) if values.reviewed else None
            done = run(
                Path(values.examples), out, against=against, reviewed=reviewed, alike=values.alike, **share
            )
    except (ConfigError, DataError) as error:
        raise SystemExit(f"decontaminate: {error}") from error
    if done is None:
        logging.info("decontaminate: other parts are not done; give the command again when they are")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
