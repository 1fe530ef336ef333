"""Findings by masks: the embedded back end of the findings stage, called `pixels`.

Where the publisher gives masks, the findings are those of the masks, as the paper (3.2.2) does for the 6 % of
its data that has them; what the masks are not about stays unknown. Neighbours: `votes.py` is the
other back end, `findings.py` the job.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline import jobs, stages
from fundus_jax import findings
from fundus_jax.records import Example, Findings


def from_masks(example: Example) -> Findings | jobs.Quarantine | None:
    """What the masks of an example's image show; None where there are none, or they are about nothing. What
    the modality can not show is a fault of the builder, and the example is quarantined with it."""
    if example.findings is None or example.searched == ():
        return None
    named = {*example.findings, *(example.searched or ())}
    foreign = sorted(named - set(findings.vocabulary(example.modality, extended=True)))
    if foreign:
        reason = f"the masks are of {foreign}, which {example.modality} can not show; mend the builder"
        return jobs.Quarantine(example.id, reason)
    return Findings(
        example=example.id,
        present=example.findings,
        votes={},
        n=0,
        origin="pixels",
        searched=example.searched,
    )


class PixelSource:
    """The findings of the publisher's masks; nothing for an example without them."""

    name = "pixels"
    through = None  # it asks nobody

    @property
    def ways(self) -> list[dict]:
        return [{"name": self.name, "version": 2}]  # of what the same masks give

    def inputs(self, examples: Path) -> list[jobs.ShardInput]:
        return stages.shards(examples, Example)

    def find(
        self, items: Iterable[Example], side: Path | None = None
    ) -> Iterator[Findings | jobs.Quarantine]:
        del side  # all that there is to say stands in the records
        return filter(None, map(from_masks, items))
