"""Folders to review: finished stages of a few made-up cases with pictures, by the real job runner."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore
from PIL import Image, ImageDraw

from data_pipeline import decisions, files, jobs
from data_pipeline.decisions import trace_sha256
from data_pipeline.quality import MOST_WORDS
from fundus_jax.records import Claim, Example, Findings, Knowledge, Passage, Trace, text_sha256, to_json
from tests.data_pipeline.made import example

GOOD = (
    "The image shows microaneurysms and haemorrhages. Haemorrhages beyond microaneurysms without "
    "neovascularisation fit moderate disease. So the answer is Moderate NPDR."
)
MILD = "The image shows microaneurysms. Microaneurysms alone fit mild disease. So the answer is Mild NPDR."
BAD = "The image shows drusen. So the answer is Moderate NPDR."
SEEN = ("haemorrhage", "microaneurysm")
NOTE = "Moderate disease shows more than microaneurysms."


def knowledge(label: str, required: tuple[str, ...], **changes: object) -> Knowledge:
    """What is known of a label in photographs, from one passage."""
    passage = Passage(
        text=NOTE, source="notes", address="https://example.org/dr", licence="CC-BY-4.0",
        sha256=text_sha256(NOTE),
    )  # fmt: skip
    values = {
        "label": label, "modality": "CFP", "text": NOTE, "required": required,
        "supportive": ("hard exudate",), "excluded": ("neovascularisation",), "passages": (passage,),
        "claims": tuple(
            Claim(finding=name, role="required", quote="more than microaneurysms", passage=passage.sha256)
            for name in required
        ),
    }  # fmt: skip
    return Knowledge(**{**values, **changes})  # type: ignore[arg-type]


BOOK = (
    knowledge("Moderate NPDR", SEEN),
    knowledge("Mild NPDR", ("microaneurysm",)),
)


@dataclasses.dataclass(frozen=True)
class Made:
    """A case: its example, what was found, its trace, and the shard that holds it."""

    example: Example
    found: Findings | None
    trace: Trace
    shard: str = "train-00000"


def case(number: int, think: str = GOOD, reasons: tuple[str, ...] = (), **changes: object) -> Made:
    """Case `number`: a photograph with two findings by votes."""
    about = {"id": f"made/{number}", "patient": str(number), "image": f"train-00000.array_record#{number}"}
    asked = example(**about | changes)
    votes = {"haemorrhage": 4, "microaneurysm": 5, "hard exudate": 1, "neovascularisation": 0}
    found = Findings(example=asked.id, present=SEEN, votes=votes, n=5, origin="votes")
    trace = Trace(example=asked.id, think=think, answer=asked.answer, kept=not reasons, reasons=reasons)
    return Made(asked, found, trace)


def make(
    folder: Path, cases: Sequence[Made], book: Sequence[Knowledge] = BOOK, pictures: bool = True
) -> Path:
    """The four stages of these cases in a folder."""
    shards = sorted({one.shard for one in cases})
    check = {"check": {"version": 1, "most_words": MOST_WORDS}}
    write(folder / "examples", {s: [c.example for c in cases if c.shard == s] for s in shards}, {}, pictures)
    write(folder / "findings", {s: [c.found for c in cases if c.shard == s and c.found] for s in shards})
    write(folder / "traces", {s: [c.trace for c in cases if c.shard == s] for s in shards}, check)
    write(folder / "knowledge", {"all": book})
    return folder


def write(out: Path, shards: dict, config: dict | None = None, pictures: bool = False) -> None:
    """A finished directory of these records."""
    inputs = [
        jobs.ShardInput(name, files.digest([to_json(item) for item in items]), tuple(items))
        for name, items in shards.items()
    ]
    jobs.run(jobs.Job("made", config or {}), inputs, partial(_same, pictures=pictures), out)


def _same(shard: jobs.ShardInput, folder: Path, *, pictures: bool) -> Sequence:
    if pictures:
        writer = ArrayRecordWriter(str(folder / f"{shard.name}.array_record"), "group_size:1")
        for number, _ in enumerate(shard.items):  # type: ignore[arg-type]
            writer.write(picture(number))
        writer.close()
    return shard.items  # type: ignore[return-value]


def picture(number: int) -> bytes:
    """A disc with a spot, as PNG."""
    image = Image.new("RGB", (640, 480))
    draw = ImageDraw.Draw(image)
    draw.ellipse((90, 10, 550, 470), fill=(150, 70, 30))
    draw.ellipse((100 + 20 * number, 100, 130 + 20 * number, 130), fill=(90, 10, 10))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def decide(folder: Path, reviewer: str, made: Made, outcome: str, reason: str = "", **text: str) -> None:
    """Write one decision as a session of `reviewer` would; `text` is a correction's think and answer."""
    ledger = decisions.Ledger.open(folder, reviewer)
    try:
        ledger.add(made.example.id, trace_sha256(made.trace), outcome, reason, **text)
    finally:
        ledger.close()
