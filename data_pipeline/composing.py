"""From the records about an image to a checked trace, by rule: the embedded back end of the traces stage.

Neighbours: `writer.py` writes, `quality.py` checks, `trace_server.py` is the other back end, `traces.py` the
job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import quality
from data_pipeline.writer import RuleWriter
from fundus_jax.records import Example, Findings, Knowledge, Trace


@dataclass(frozen=True, slots=True)
class Case:
    """An example with all that its trace is written from. `found` is None for an image that nobody looked
    at; `knowledge` is that of the answer, None where the answer is no label or nothing is known of it."""

    example: Example
    found: Findings | None
    knowledge: Knowledge | None

    @property
    def id(self) -> str:
        return self.example.id


def compose(
    example: Example,
    found: Findings | None,
    knowledge: Knowledge | None,
    writer: RuleWriter,
    most_words: int = quality.MOST_WORDS,
    boxes: int = 0,
) -> Trace:
    """The checked trace of one example; with `boxes`, it has to say where, as `quality.check` explains."""
    think = writer.write(example, found, knowledge)
    reasons = quality.check(
        example, found, knowledge, think, example.answer, most_words=most_words, boxes=boxes
    )
    return Trace(example=example.id, think=think, answer=example.answer, kept=not reasons, reasons=reasons)


@dataclass(frozen=True)
class Rules:
    """Traces by rule. `most_words`: bound of their length for the check. `boxes`: they say where each finding
    lies, with so many boxes at most; 0: they do not."""

    boxes: int = 0
    most_words: int = quality.MOST_WORDS
    name = "rules"
    through = None  # it asks nobody

    @property
    def config(self) -> dict:
        return RuleWriter(self.boxes).config

    def traces(self, items: Iterable[Case], side: Path) -> Iterator[Trace]:
        del side  # all that there is to say stands in the records
        writer = RuleWriter(self.boxes)
        for one in items:
            yield compose(one.example, one.found, one.knowledge, writer, self.most_words, self.boxes)
