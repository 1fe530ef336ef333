"""Small items, answers and stage directories that the tests of the evaluation share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from data_pipeline.jobs import Job, ShardInput, run
from fundus_jax.data import Size
from fundus_jax.evaluation import run as evaluation
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.report import Prediction
from fundus_jax.records import Example

DISEASES = ("Normal", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR", "Glaucoma", "AMD")


def item(name: str = "q1", answer: str = "PDR", **changes: Any) -> Item:
    """A lettered disease question about a CFP image; `changes` replace fields."""
    content = [{"type": "image"}, {"type": "text", "text": "Which disease?"}]
    fields: dict[str, Any] = {
        "id": name,
        "images": (f"{name}.png",),
        "messages": ({"role": "user", "content": content},),
        "options": DISEASES,
        "answers": (answer,),
        "level": "L4",
        "task": "disease",
        "part": "disease",
        "modality": "CFP",
        "unit": name,
        "lettered": True,
    }
    return Item(**{**fields, **changes})


def reply(answer: str, think: str = "I look.") -> str:
    """A well-formed response."""
    return f"<think>{think}</think> <answer>{answer}</answer>"


def answered(one: Item, answer: str, think: str = "I look.", sample: int = 0) -> Prediction:
    """A well-formed prediction of an item."""
    return Prediction(item=one, response=reply(answer, think), sample=sample, tokens=9)


def example(number: int, **changes: Any) -> Example:
    """A test Example whose picture is record `number` of its shard; `changes` replace fields."""
    fields: dict[str, Any] = {
        "id": f"e{number}",
        "dataset": "toy",
        "split": "test",
        "patient": f"p{number}",
        "eye": "OD",
        "modality": "CFP",
        "image": f"toy.images.array_record#{number}",
        "labels": ("Normal",),
        "task": "disease",
        "question": "Which disease does the image show?",
        "options": ("Normal", "Glaucoma", "AMD"),
        "answer": "Normal",
        "findings": (),
        "boxes": (),
    }
    return Example(**{**fields, **changes})


def picture(number: int, side: int = 56) -> Image.Image:
    """A plain picture whose red channel says its number."""
    return Image.new("RGB", (side, side), (number, 80, 10))


def command_flags(monkeypatch: pytest.MonkeyPatch) -> flags.FlagValues:
    """The flags of the evaluation command, as if it were the program; call it with a command line."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for kind in ("string", "enum", "bool", "list", "integer", "float"):
        original = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(
            flags, f"DEFINE_{kind}", lambda *a, _define=original, **k: _define(*a, flag_values=values, **k)
        )
    evaluation.define_flags()
    return values


@dataclass(frozen=True)
class Pictures:
    """What `load` gives, as the pictures of a benchmark."""

    load: Callable[[str], Image.Image]

    def load_image(self, image: str) -> Image.Image:
        return self.load(image)

    def image_size(self, image: str) -> Size:
        return Size(*self.load(image).size)


def stage(out: Path, examples: Sequence[Example], *, side: int = 56) -> Path:
    """A finished data/examples directory with one picture for each example."""
    run(Job("ingest", {}), [ShardInput("toy", "key", list(examples))], partial(_write, side=side), out)
    return out


def _write(shard: ShardInput, scratch: Path, *, side: int) -> Iterator[Example]:
    writer = ArrayRecordWriter(str(scratch / "toy.images.array_record"), "group_size:1")
    for number, one in enumerate(shard.items):  # type: ignore[arg-type]
        stream = io.BytesIO()
        picture(number, side).save(stream, "PNG")
        writer.write(stream.getvalue())
        yield one
    writer.close()
