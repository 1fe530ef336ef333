"""The first stage: from a publisher's archive (or drawn phantoms) to Examples and their images in shards.

    python -m data_pipeline.ingest --list
    python -m data_pipeline.ingest --dataset=idrid --source=DIR --out=DIR
    python -m data_pipeline.ingest --dataset=phantom --out=DIR --workers=2

A shard is NAME.jsonl (Examples) and NAME.array_record (encoded images, one a record); an Example names its
image as "NAME.array_record#INDEX". An image that can not be decoded, or whose masks do not fit it, is
quarantined with the reason. Neighbours: `datasets` lists, `images` decodes, `questions` asks, `jobs` runs.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore

from data_pipeline import files, images, jobs, parts, questions
from data_pipeline.datasets import heldout, registry
from data_pipeline.datasets.base import Sample, annotated, fingerprint, picture
from data_pipeline.datasets.phantom_source import PhantomConfig
from data_pipeline.datasets.phantom_source import shards as phantom_shards
from fundus_jax import findings
from fundus_jax.records import ConfigError, DataError, Example

TASKS = {
    "disease": 1.0,
    "dr_grade": 0.5,
    "amd_grade": 0.5,
    "dme_risk": 0.5,
    "progression": 0.5,
    "disease_presence": 2.0,
    "modality": 0.25,
    "laterality": 0.5,
    "lesion_presence": 1.0,
    "lesion_location": 0.5,
}
SHARD_SIZE = 500
_WRITER_OPTIONS = "group_size:1"  # each image can be read alone

Item = Sample | Callable[[], Sample]


def run(
    dataset: str,
    source: Path | None,
    out: Path,
    *,
    tasks: Mapping[str, float] | None = None,
    max_side: int = 0,
    kind: str = "JPEG",
    quality: int = 95,
    limit: int = 0,
    partial_copy: bool = False,
    benchmarks: Sequence[Path] | None = None,
    phantom: PhantomConfig | None = None,
    shard_size: int = SHARD_SIZE,
    quarantine: float = 0.02,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary:
    """Turn a data set into shards of Examples in `out`; running it again does what is missing.

    Args:
      dataset: a name of `datasets.registry`.
      source: the folder with the publisher's files; None for phantoms.
      tasks: task -> questions an image (see `questions.ask`); `TASKS` by default.
      max_side: reduce larger images to this many pixels on the longer side; 0 keeps them as they are.
      kind, quality: "JPEG" or "PNG", for images that have to be encoded again.
      limit: take only this many images of each split; 0 takes all.
      partial_copy: accept another number of images than the publisher's.
      benchmarks: folders of FunBench and OmniMedVQA; their images, and all of their patients, go to "test".
        [] trains on them; None is refused for a data set that they draw on.
      phantom: what to draw, if `dataset` is "phantom".
      shard_size: images a shard.
      quarantine: share of bad images beyond which the job stops.
      workers, shard: as `jobs.run`.

    Raises:
      ConfigError: unknown data set or task, nothing said of benchmarks, another config than `out` was made
        with.
      DataError: the source is not the publisher's layout, or too many images are bad.
    """
    row = registry.row(dataset)
    rates = dict(TASKS if tasks is None else tasks)
    questions.check_tasks(rates)
    if kind not in ("JPEG", "PNG") or not 1 <= quality <= 100 or max_side < 0 or shard_size < 1 or limit < 0:
        raise ConfigError(
            f"kind {kind!r} (JPEG or PNG), quality {quality} (1-100), max_side {max_side} and limit {limit} "
            f"(>= 0), shard_size {shard_size} (>= 1): one of these is out of its bounds"
        )
    diseases: dict[str, int] = {}
    if dataset == "phantom":
        phantom = phantom or PhantomConfig()
        shards = phantom_shards(phantom, shard_size=shard_size)
    elif source is None:
        raise ConfigError(f"data set {dataset!r} needs a source: the folder of {row.title}, from {row.where}")
    else:
        heldout.require_said(dataset, benchmarks)
        found = registry.lister(dataset)(source, partial=partial_copy)
        if benchmarks:
            found = heldout.moved(dataset, found, heldout.names(benchmarks))
        told = Counter(sample.labels.get("disease") for sample in found)
        diseases = {name: told[name] for name in registry.diseases(dataset)}
        shards = _shards(found, diseases, limit=limit, shard_size=shard_size)
    options = {"max_side": max_side, "kind": kind, "quality": quality}
    config = {
        "dataset": dataset,
        "tasks": rates,
        "questions": questions.VERSION,
        **options,
        "limit": limit,
        "shard_size": shard_size,
        "phantom": asdict(phantom) if phantom else None,
    }
    process = partial(_process, dataset=dataset, tasks=rates, diseases=diseases, options=options)
    job = jobs.Job("ingest", config)
    return jobs.run(job, shards, process, out, limit=quarantine, workers=workers, shard=shard)


def _shards(
    samples: Sequence[Sample], diseases: Mapping[str, int], *, limit: int, shard_size: int
) -> list[jobs.ShardInput]:
    """Samples by split, mixed by a hash of their key, so that each shard is like the whole; their questions
    depend on the `diseases` too."""
    shards = []
    for split in sorted({sample.split for sample in samples}):
        here = sorted(
            (sample for sample in samples if sample.split == split), key=lambda s: files.digest(s.key)
        )
        if repeated := {s.key for s, after in zip(here, here[1:], strict=False) if s.key == after.key}:
            raise DataError(f"{split}: {len(repeated)} keys occur twice: {', '.join(sorted(repeated)[:5])}")
        here = here[: limit or len(here)]
        for number, start in enumerate(range(0, len(here), shard_size)):
            items = here[start : start + shard_size]
            key = files.digest([fingerprint(items), diseases])
            shards.append(jobs.ShardInput(f"{split}-{number:05d}", key, items))
    return shards


def _process(
    shard: jobs.ShardInput,
    scratch: Path,
    *,
    dataset: str,
    tasks: Mapping[str, float],
    diseases: Mapping[str, int],
    options: Mapping[str, int | str],
) -> Iterator[Example | jobs.Quarantine]:
    """Write a shard's images, then yield the questions about those that are sound."""
    name = f"{shard.name}.array_record"
    sound: list[Sample] = []
    writer = ArrayRecordWriter(str(scratch / name), _WRITER_OPTIONS)
    items: Sequence[Item] = shard.items() if callable(shard.items) else shard.items
    try:
        for item in items:
            sample = item if isinstance(item, Sample) else item()
            try:
                sample = annotated(sample)
                data = _encoded(picture(sample), options)
            except DataError as error:
                yield jobs.Quarantine(f"{dataset}/{sample.split}/{sample.key}", str(error))
                continue
            _write(writer, data, scratch)
            sound.append(replace(sample, image=b""))
    finally:
        writer.close()
    asked = questions.ask(sound, tasks, diseases=diseases)
    for index, (sample, about) in enumerate(zip(sound, asked, strict=True)):
        yield from _examples(sample, about, f"{name}#{index}", dataset)


def _write(writer: Any, data: bytes, folder: Path) -> None:
    """Its library says that a disk is full in words alone; `files.room` reads the number."""
    try:
        writer.write(data)
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _encoded(image: Path | bytes, options: Mapping[str, int | str]) -> bytes:
    if isinstance(image, bytes) and not options["max_side"]:
        return image  # drawn and encoded by this program a moment ago
    return images.prepare(image, **options)  # pyright: ignore[reportArgumentType]


def _examples(
    sample: Sample, about: Sequence[questions.Question], image: str, dataset: str
) -> Iterator[Example]:
    for place, one in enumerate(about):
        same = [other for other in about if other.task == one.task]
        number = "" if len(same) == 1 else f"-{1 + sum(other.task == one.task for other in about[:place])}"
        yield Example(
            id=f"{dataset}/{sample.split}/{sample.key}/{one.task}{number}",
            dataset=dataset,
            split=sample.split,
            patient=f"{dataset}/{sample.patient}",
            eye=sample.eye,
            modality=sample.modality,
            image=image,
            labels=sample.diseases or tuple(filter(None, [sample.labels.get("disease")])),
            task=one.task,
            question=one.question,
            options=one.options,
            answer=one.answer,
            findings=sample.findings,
            boxes=sample.boxes,
            searched=_searched(sample),
        )


def _searched(sample: Sample) -> tuple[str, ...] | None:
    """As an Example has it: None where there are no masks, and where all was looked for."""
    if sample.findings is None or not findings.unknown(sample.modality, sample.searched):
        return None
    return tuple(sorted({*sample.searched, *sample.findings}))


def _define_flags() -> None:
    flags.DEFINE_bool("list", False, "Show the data sets with their licences, and end.")
    flags.DEFINE_string("dataset", None, "Name of a data set; --list shows them.")
    flags.DEFINE_string("source", None, "Folder with the publisher's files.")
    flags.DEFINE_string("out", None, "Folder for the shards; the same command again resumes.")
    flags.DEFINE_list("tasks", None, "Questions an image, e.g. disease:1,lesion_presence:0.5.")
    flags.DEFINE_integer("max_side", 0, "Reduce larger images to this side; 0 keeps them.", 0)
    flags.DEFINE_enum("kind", "JPEG", ["JPEG", "PNG"], "For images that have to be encoded again.")
    flags.DEFINE_integer("quality", 95, "Quality of these JPEGs.", 1, 100)
    flags.DEFINE_integer("limit", 0, "Images of each split; 0 takes all.", 0)
    flags.DEFINE_bool("partial", False, "Accept another number of images than published.")
    flags.DEFINE_list(
        "benchmarks", [], "Folders of FunBench and OmniMedVQA, whose images go to the test split; or none."
    )
    flags.DEFINE_list("phantoms", ["15000", "500", "500"], "Phantoms to draw: train, val, test.")
    flags.DEFINE_integer("phantom_seed", 0, "Series of the phantoms.", 0)
    flags.DEFINE_integer("phantom_size", 112, "Side of the phantoms in pixels.", 56)
    flags.DEFINE_integer("shard_size", SHARD_SIZE, "Images a shard.", 1)
    flags.DEFINE_float("quarantine", 0.02, "Share of bad images that stops the job.", 0, 1)
    flags.DEFINE_integer("workers", 1, "Processes that share the shards.", 1)
    flags.DEFINE_string("shard", "", parts.HELP)


def _rates(texts: Sequence[str]) -> dict[str, float] | None:
    pairs = [text.partition(":") for text in texts]
    try:
        return {task: float(rate or "1") for task, _, rate in pairs} or None
    except ValueError as error:
        raise ConfigError(f"--tasks={','.join(texts)}: {error}; write task:number") from error


def _phantom(values: flags.FlagValues) -> PhantomConfig:
    try:
        train, val, test = map(int, values.phantoms)
    except ValueError as error:
        raise ConfigError(
            f"--phantoms={','.join(values.phantoms)}: three whole numbers are needed"
        ) from error
    return PhantomConfig(seed=values.phantom_seed, size=values.phantom_size, train=train, val=val, test=test)


def main(argv: Sequence[str]) -> None:
    """Run the job as the flags say."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    if values.list:
        print(registry.table())
        return
    if not values.dataset or not values.out:
        raise app.UsageError("--dataset and --out are needed (or --list)")
    try:
        summary = run(
            values.dataset,
            Path(values.source) if values.source else None,
            Path(values.out),
            tasks=_rates(values.tasks or ()),
            max_side=values.max_side,
            kind=values.kind,
            quality=values.quality,
            limit=values.limit,
            partial_copy=values.partial,
            benchmarks=heldout.folders(values.benchmarks),
            phantom=_phantom(values) if values.dataset == "phantom" else None,
            shard_size=values.shard_size,
            quarantine=values.quarantine,
            workers=values.workers,
            shard=parts.chosen(values.shard),
        )
    except (ConfigError, DataError) as error:
        raise SystemExit(f"ingest: {error}") from error
    logging.info(
        "ingest: %d examples, %d images quarantined; %d shards made, %d were there",
        summary.answers, summary.quarantined, summary.shards_done, summary.shards_skipped,
    )  # fmt: skip


if __name__ == "__main__":
    _define_flags()
    app.run(main)
