"""Writes the Findings of each example: what its image is held to show.

Paper, section 3.2.2. `masks`: where the publisher gives masks, the findings are those of the masks (the
embedded back end, `pixels.py`); nothing is written for the other examples, and their number is logged.
`votes`: a vision-language model is asked, and the majority counts (`votes.py`). `both`: masks where they
exist, as in the paper, and votes on what they are not about and on the other images. Neighbours: `jobs.py`
runs the shards.

    python -m data_pipeline.findings --examples=DIR --out=DIR
    python -m data_pipeline.findings --examples=DIR --out=DIR --findings=both --knowledge=DIR \
        --votes.server.address=http://HOST:8000/v1 --votes.server.model=NAME

With --quality the model is asked about the images with masks alone, and the paper's Table 6 is printed: the
sensitivity and specificity of its votes, by the masks. It stands in OUT/quality.json too.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import app, flags, logging
from ml_collections import config_flags

from data_pipeline import agreement, jobs, manifest, parts
from data_pipeline.pixels import PixelSource
from data_pipeline.votes import VotesConfig, VoteSource, vocabulary
from fundus_jax.chat import LostError
from fundus_jax.records import ConfigError, DataError, Findings, Knowledge

KINDS = ("masks", "votes", "both")


class FindingsSource(Protocol):
    """A way to come by the findings of images. Where it asks nobody, a process pool pickles it."""

    name: str

    @property
    def ways(self) -> list[dict]:
        """Everything that determines the answers besides the examples, as JSON: an object for each way in
        which answers are come by, with its name."""
        ...

    @property
    def through(self) -> jobs.Through | None:
        """What asks a server about the items of `inputs`; None where `find` takes the items themselves."""
        ...

    def inputs(self, examples: Path) -> list[jobs.ShardInput]:
        """What it looks at, shard by shard, under the names of the examples' shards."""
        ...

    def find(self, items: Iterable[Any], side: Path) -> Iterator[Findings | jobs.Quarantine]:
        """At most one answer an example, in any order; none for those outside this source. What else is worth
        keeping goes to files that begin with `side`, a path."""
        ...


def make_source(
    kind: str, config: VotesConfig, knowledge: Path | None = None, *, only_masked: bool = False
) -> FindingsSource:
    """The source of a name: masks, votes or both.

    Args:
        kind: one of `KINDS`.
        config: how images are voted on.
        knowledge: finished directory of Knowledge, whose findings are voted on; None takes the core of the
            table of findings.
        only_masked: leave out images without masks.

    Raises ConfigError for an unknown name or a setting that does not make sense.
    """
    if kind not in KINDS:
        raise ConfigError(f"findings is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "masks":
        return PixelSource()
    words = vocabulary(jobs.read(knowledge, Knowledge) if knowledge else ())
    return VoteSource(config, words, masks=PixelSource() if kind == "both" else None, only_masked=only_masked)


def run(
    examples: Path,
    out: Path,
    *,
    source: FindingsSource | None = None,
    limit: float = 0.02,
    workers: int = 1,
    shard: str = "0/1",
) -> jobs.Summary:
    """Writes one Findings record for each example that the source knows, shard by shard.

    Args:
        examples: finished directory of Examples.
        out: directory of the stage; its shards have the names of the examples' shards.
        source: None means the masks.
        limit, workers, shard: as in `jobs.run`.
    """
    asked = source or PixelSource()
    summary = jobs.run(
        jobs.Job("findings", {"sources": asked.ways}),
        asked.inputs(examples),
        functools.partial(_process, source=asked),
        out,
        limit=limit,
        workers=workers,
        shard=shard,
        through=asked.through,
    )
    names = "+".join(way["name"] for way in asked.ways)
    logging.info("findings (%s): %d records, %d quarantined", names, summary.answers, summary.quarantined)
    if asked.through is None:
        there = manifest.load(out).values()  # all parts of the job, as far as they are done
        seen = sum(entry.items for entry in there)
        without = seen - sum(entry.answers + entry.quarantined for entry in there)
        logging.info("without_%s: %d of %d", names, without, seen)
    return summary


def _process(
    shard: jobs.ShardInput, folder: Path, *, source: FindingsSource
) -> Iterator[Findings | jobs.Quarantine]:
    return source.find(shard.items, folder / shard.name)  # type: ignore[arg-type]


def _define_flags() -> None:
    flags.DEFINE_string("examples", None, "Finished directory of Examples.", required=True)
    flags.DEFINE_string("out", None, "Directory for the Findings records.", required=True)
    flags.DEFINE_enum("findings", "masks", KINDS, "Where findings come from.")
    flags.DEFINE_string("knowledge", None, "Finished directory of Knowledge, whose findings are voted on.")
    config_flags.DEFINE_config_dataclass("votes", VotesConfig(), "How images are voted on.")
    flags.DEFINE_bool("quality", False, "Ask about the images with masks alone, and print Table 6.")
    flags.DEFINE_float("limit", 0.02, "Share of quarantined items that stops the job.", 0, 1)
    flags.DEFINE_integer("workers", 1, "Processes, where no server is asked.")
    flags.DEFINE_string("shard", "", parts.HELP)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    examples, out = Path(values.examples), Path(values.out)
    try:
        source = make_source(
            "votes" if values.quality else values.findings,
            values.votes,
            Path(values.knowledge) if values.knowledge else None,
            only_masked=values.quality,
        )
        part = parts.chosen(values.shard)
        done = run(examples, out, source=source, limit=values.limit, workers=values.workers, shard=part)
        if not values.quality:
            return
        if done.shards_left:
            logging.info("%d shards are left to other parts; Table 6 comes with the last", done.shards_left)
        else:
            print(agreement.measure(examples, out, source.ways[-1]))
    except (ConfigError, DataError, LostError) as error:
        raise SystemExit(f"findings: {error}") from error


if __name__ == "__main__":
    _define_flags()
    app.run(main)
