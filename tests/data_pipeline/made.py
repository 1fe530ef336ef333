"""Small records and finished stage directories for the tests of the text stages."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline import jobs
from fundus_jax.records import Box, Example

OPTIONS = ("Normal", "Mild NPDR", "Moderate NPDR", "Severe NPDR", "PDR", "Glaucoma", "AMD")
GRADES = ("No DR", *OPTIONS[1:5])
SPREAD = (Box(finding="haemorrhage", x1=50, y1=50, x2=950, y2=950),)
SPOT = (Box(finding="haemorrhage", x1=100, y1=100, x2=200, y2=200),)


def example(**changes: object) -> Example:
    """A question about a photograph with moderate disease, changed as told."""
    values = {
        "id": "made/0",
        "dataset": "made",
        "split": "train",
        "patient": "0",
        "eye": "OD",
        "modality": "CFP",
        "image": "made.array_record#0",
        "labels": ("Moderate NPDR",),
        "task": "disease",
        "question": "What is the diagnosis for this image?",
        "options": OPTIONS,
        "answer": "Moderate NPDR",
        "findings": ("haemorrhage", "microaneurysm"),
        "boxes": SPOT,
    }
    return Example(**{**values, **changes})  # type: ignore[arg-type]


def write_examples(out: Path, shards: dict[str, Sequence[Example]]) -> Path:
    """A finished directory of Examples with these shards."""
    inputs = [jobs.ShardInput(name, name, tuple(items)) for name, items in shards.items()]
    jobs.run(jobs.Job("made", {}), inputs, _same, out)
    return out


def _same(shard: jobs.ShardInput, folder: Path) -> Sequence[Example]:
    del folder
    return shard.items  # type: ignore[return-value]
