"""Writes the Findings of each example: what its image is held to show.

Paper, section 3.2.2. Here runs the embedded back end, called `pixels`: where the publisher gives masks, the
findings are those of the masks, as the paper does for the 6 % of its data that has them. Examples without
masks are outside this back end: nothing is written for them, and their number is logged. Neighbours:
`jobs.py` runs the shards; the answers of a model, by majority of five, are another `FindingsSource`.

    python -m data_pipeline.findings --examples=DIR --out=DIR
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from absl import app, flags, logging

from data_pipeline import jobs, manifest, parts, stages
from fundus_jax import findings
from fundus_jax.records import ConfigError, Example, Findings


class FindingsSource(Protocol):
    """One way to come by the findings of images. A process pool pickles it."""

    name: str

    @property
    def config(self) -> dict:
        """Everything that determines the answers besides the examples, as JSON."""
        ...

    def find(self, examples: Sequence[Example]) -> Iterable[Findings | jobs.Quarantine]:
        """At most one answer an example, in any order; none for those outside this source."""
        ...


class PixelSource:
    """The findings of the publisher's masks."""

    name = "pixels"
    config: dict = {}

    def find(self, examples: Sequence[Example]) -> Iterator[Findings | jobs.Quarantine]:
        for example in examples:
            if example.findings is None:
                continue
            foreign = _foreign(example)
            if foreign:
                reason = f"the masks show {foreign}, which {example.modality} can not show; mend the builder"
                yield jobs.Quarantine(example.id, reason)
            else:
                yield Findings(example=example.id, present=example.findings, votes={}, n=0, origin="pixels")


def _foreign(example: Example) -> list[str]:
    known = findings.vocabulary(example.modality, extended=True)
    return sorted(set(example.findings or ()) - set(known))


SOURCES = {"pixels": PixelSource}


def run(
    examples: Path,
    out: Path,
    *,
    sources: Sequence[FindingsSource] | None = None,
    limit: float = 0.02,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary:
    """Writes one Findings record for each example that a source knows, shard by shard.

    Args:
        examples: finished directory of Examples.
        out: directory of the stage; its shards have the names of the examples' shards.
        sources: asked in this order; a source sees only what those before it left. None means the masks.
        limit, workers, shard: as in `jobs.run`.
    """
    asked = tuple(sources) if sources is not None else (PixelSource(),)
    if not asked:
        raise ConfigError(f"no source of findings is given; known are {', '.join(SOURCES)}")
    config = {"sources": [{"name": source.name, **source.config} for source in asked]}
    process = functools.partial(_process, sources=asked)
    inputs = stages.shards(examples, Example)
    summary = jobs.run(
        jobs.Job("findings", config), inputs, process, out, limit=limit, workers=workers, shard=shard
    )
    names = "+".join(source.name for source in asked)
    there = manifest.load(out).values()  # all parts of the job, as far as they are done
    seen = sum(entry.items for entry in there)
    without = seen - sum(entry.answers + entry.quarantined for entry in there)
    logging.info("findings (%s): %d records, %d quarantined", names, summary.answers, summary.quarantined)
    logging.info("without_%s: %d of %d", names, without, seen)
    return summary


def _process(
    shard: jobs.ShardInput, folder: Path, *, sources: tuple[FindingsSource, ...]
) -> Iterator[Findings | jobs.Quarantine]:
    del folder  # no side files
    rest: Sequence[Example] = shard.items  # type: ignore[assignment]
    for source in sources:
        done = set()
        for result in source.find(rest):
            done.add(result.key if isinstance(result, jobs.Quarantine) else result.example)
            yield result
        rest = [example for example in rest if example.id not in done]


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples.", required=True)
    flags.DEFINE_string("out", None, "Directory for the Findings records.", required=True)
    flags.DEFINE_integer("workers", 1, "Processes.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    run(Path(values.examples), Path(values.out), workers=values.workers, shard=parts.chosen(values.shard))


if __name__ == "__main__":
    _define_flags()
    app.run(main)
