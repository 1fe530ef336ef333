"""The table of benchmarks, and the one that is always there: the held-out Examples of a workdir.

A new benchmark is a class with the fields of `items.Benchmark` and a row of `BENCHMARKS`. Neighbours:
funbench.py, omnimedvqa.py, gmai.py and retinal_reason.py read what others publish, items.py says what an
item is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from fundus_jax import dialog, findings
from fundus_jax.data import load_image, read_stage
from fundus_jax.evaluation.describe import Reports
from fundus_jax.evaluation.funbench import FunBench
from fundus_jax.evaluation.gmai import GmaiMMBench
from fundus_jax.evaluation.items import Benchmark, Item, Selection, counted
from fundus_jax.evaluation.omnimedvqa import OmniMedVQA
from fundus_jax.evaluation.retinal_reason import RetinalReason
from fundus_jax.records import ConfigError, DataError, Example

LEVELS = {  # our tasks on FunBench's levels: modality, anatomy, lesion analysis, diagnosis
    "modality": "L1",
    "laterality": "L2",
    "lesion_presence": "L3",
    "lesion_location": "L3",
    "disease": "L4",
    "disease_presence": "L4",
    "dr_grade": "L4",
    "amd_grade": "L4",
    "dme_risk": "L4",
    "progression": "L4",
}


class PhantomBenchmark:
    """The held-out Examples of a finished stage directory (a workdir's data/examples), on FunBench's levels.

    It takes any Examples, drawn or real. Each shard must have the bytes that were published.
    """

    name = "phantom"
    published = ""

    def __init__(self, source: str | Path, selection: Selection | None = None) -> None:
        self.source = Path(source)
        self.missing: tuple[str, ...] = ()  # a finished stage directory is complete, or it is refused
        selection = selection or Selection()
        examples = (
            example for example in read_stage(self.source, Example) if example.split == selection.split
        )
        self.items = selection.choose([item_of(example, selection) for example in examples])
        self.partial: tuple[str, ...] = ()  # nobody else has numbers for these questions
        self.notes = (f"{len(self.items)} held-out questions, {counted(one.task for one in self.items)}",)

    def load_image(self, image: str) -> Image.Image:
        """The picture of a key "FILE#INDEX": record INDEX of the ArrayRecord file FILE."""
        return load_image(self.source, image)


def item_of(example: Example, selection: Selection) -> Item:
    """The item of an Example.

    Raises:
        DataError: a task without a level.
    """
    if example.task not in LEVELS:
        known = ", ".join(LEVELS)
        raise DataError(f"Example {example.id}: task {example.task!r} has no level; known tasks are {known}")
    style, think, boxes = selection.style, selection.think, selection.boxes
    messages = dialog.messages(example, style, think, instruct=selection.instruct, boxes=boxes)
    placed = boxes and example.findings is not None and example.task not in dialog.WITHOUT_FINDINGS
    return Item(
        id=example.id,
        images=(example.image,),
        messages=tuple(messages),
        options=example.options,
        answers=(example.answer,),
        level=LEVELS[example.task],
        task=example.task,
        part=_part(example),
        modality=example.modality,
        unit=f"{example.dataset}/{example.patient}",
        lettered=style == "options" and bool(example.options),
        think=think,
        findings=example.findings,
        searched=example.searched,
        boxes=dialog.positioned(example, boxes).boxes if placed else None,
    )


def _part(example: Example) -> str:
    """The question file that FunBench would put it in: its lesion tasks have a file for each lesion."""
    if not example.task.startswith("lesion_"):
        return example.task
    mentions = findings.parse_mentions(example.question)
    asked = sorted(mentions.present | mentions.absent)
    return f"{example.task}-{asked[0]}" if len(asked) == 1 else example.task


BENCHMARKS: dict[str, Callable[[str | Path, Selection], Benchmark]] = {
    "phantom": PhantomBenchmark,
    "funbench": FunBench,
    "omnimedvqa": OmniMedVQA,
    "gmai": GmaiMMBench,
    "retinal_reason": RetinalReason,
    "reports": Reports,
}


def open_benchmark(name: str, source: str | Path, selection: Selection) -> Benchmark:
    """The benchmark of a row of `BENCHMARKS`, read from its source.

    Raises:
        ConfigError: unknown name, or a selection that leaves nothing.
        DataError: the source is not as its publisher lays it out.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} is unknown: use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name](source, selection)
