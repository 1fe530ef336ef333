"""Asks for reports of images whose findings are known: what FundusExpert's clinical consistency is measured
on.

FundusGen, on which it was published, is not released. Here any Examples with masks are asked about, once an
image: phantoms, or real data sets as ingest makes them. Findings that a data set has no masks for count
neither way. Neighbours: consistency.py (the score), benchmarks.py.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fundus_jax import findings
from fundus_jax.data import Size, read_stage
from fundus_jax.evaluation.items import Item, Selection, counted, turn
from fundus_jax.evaluation.pictures import Stage
from fundus_jax.records import ConfigError, Example

TASK = "report"
_NAMES = {"CFP": "colour fundus photograph", "OCT": "OCT scan", "UWF": "ultra-widefield fundus image"}


class Reports:
    """One report of every image of a finished stage directory whose findings are known."""

    name = "reports"
    published = ""

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        self.pictures = Stage(Path(source))
        selection = selection or Selection()
        known: dict[str, Example] = {}
        for example in read_stage(source, Example):
            if example.split == selection.split and example.findings is not None:
                known.setdefault(example.image, example)
        if not known:
            raise ConfigError(
                f"{source} has no {selection.split} image with masks, so no report can be scored"
            )
        self.items = selection.choose([_item(example, selection) for example in known.values()])
        self.missing: tuple[str, ...] = ()
        self.partial: tuple[str, ...] = ()
        self.notes = (f"{len(self.items)} images, {counted(one.modality for one in self.items)}",)

    def load_image(self, image: str) -> Image.Image:
        """The picture of an Example's `image`."""
        return self.pictures.load_image(image)

    def image_size(self, image: str) -> Size:
        """Its size."""
        return self.pictures.image_size(image)


def _item(example: Example, selection: Selection) -> Item:
    there = example.findings or ()
    prompt = (
        f"Write a report of this {_NAMES[example.modality]}: name every pathological finding that it shows, "
        "and say which important findings it does not show."
    )
    return Item(
        id=f"{example.id}/report",
        images=(example.image,),
        messages=turn(prompt, selection),
        options=(),
        answers=(findings.phrase(there) if there else "no finding",),
        level="",
        task=TASK,
        part=TASK,
        modality=example.modality,
        unit=f"{example.dataset}/{example.patient}",
        lettered=False,
        think=selection.think,
        findings=example.findings,
        searched=example.searched,
    )
