"""What is asked: items, which of them are selected, and what every benchmark offers.

An `Item` is one question about one image, or a few, in the form the scores need: level, task and question
file, the modality, and the unit (patient or image) that a bootstrap draws. Neighbours: benchmarks.py (the
readers), complete.py (what of a source is there), run.py (asks a model), report.py (scores the answers).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fundus_jax import dialog
from fundus_jax.evaluation.pictures import Images
from fundus_jax.findings import unknown
from fundus_jax.records import Box, ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question.

    Attributes:
        id: unique in its benchmark.
        images: the keys of its pictures (`Images`), one for each image part of the prompt, in their order.
        messages: the prompt, one user turn in Hugging Face's message format.
        options: the choices; () for a question without choices.
        answers: the right one, or all right ones where `multiple`.
        level: FunBench's, L1 to L4; "" where the benchmark has none, and no FunBench score.
        task, part: the task, by the benchmark's own name, and the question file.
        modality: CFP, OCT or UWF; or what the publisher calls it.
        unit: patient or image; the answers about one unit are not independent.
        lettered: whether the prompt numbers the options with letters.
        multiple: whether all suitable options are asked for.
        think: whether a trace is asked for before the answer.
        findings: what is in the image by its masks; None where there are none.
        searched: what the masks are about, as in `records.Example`.
        boxes: where it is, as far as the trace is asked to say; None where it is not asked, or nobody knows.
    """

    id: str
    images: tuple[str, ...]
    messages: tuple[dict[str, Any], ...]
    options: tuple[str, ...]
    answers: tuple[str, ...]
    level: str
    task: str
    part: str
    modality: str
    unit: str
    lettered: bool
    multiple: bool = False
    think: bool = True
    findings: tuple[str, ...] | None = None
    searched: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] | None = None

    @property
    def answer(self) -> str:
        """The right answer as one text."""
        return ", ".join(self.answers)

    @property
    def prompt(self) -> str:
        """The text of the user's turn."""
        parts = [part for turn in self.messages for part in turn["content"]]
        return "\n".join(part["text"] for part in parts if part["type"] == "text")

    @property
    def unknown(self) -> frozenset[str]:
        """The findings that the image may show or not: the masks are not about them."""
        return unknown(self.modality, self.searched)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which items of a benchmark are asked, and how.

    Attributes:
        style, think, instruct, boxes: the prompt, as in `dialog.messages`. A benchmark with its own prompts
        keeps them and only adds the instruction.
        tasks: keep these tasks only; () keeps all.
        modalities: of OmniMedVQA and GMAI-MMBench keep these, in the publisher's words; () keeps the default.
        limit: at most this many items, drawn by the hash of their id, so the same ones every time; 0 keeps
        all. split: the split of Examples. images: the folder under which a benchmark's images lie, where it
        does not bring them itself. allow_partial: go on without what is missing, and say so at every score.
        emode, preprocess, side: FunBench's evaluation mode (3: the image alone, 2: with a description), its
        preprocess_info.json where the images are raw, and the side in pixels that its own script resizes
        images to (0: as they are).
    """

    style: str = "options"
    think: bool = True
    instruct: bool = True
    boxes: int = 0
    tasks: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    limit: int = 0
    split: str = "test"
    images: str = ""
    allow_partial: bool = False
    emode: int = 3
    preprocess: str = ""
    side: int = 0

    def choose(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """The selected items, in their order.

        Raises:
            ConfigError: a task that no item has; nothing is left.
            DataError: two items with one id.
        """
        ids = {item.id for item in items}
        if len(ids) != len(items):
            raise DataError(f"{len(items)} items have only {len(ids)} ids: a question is there twice")
        known = sorted({item.task for item in items})
        unknown = [task for task in self.tasks if task not in known]
        if unknown:
            raise ConfigError(
                f"no item has task {', '.join(unknown)}: there are {', '.join(known) or 'none'}"
            )
        kept = [item for item in items if not self.tasks or item.task in self.tasks]
        if self.limit and len(kept) > self.limit:
            drawn = sorted(kept, key=lambda item: hashlib.sha256(item.id.encode()).digest())[: self.limit]
            ids = {item.id for item in drawn}
            kept = [item for item in kept if item.id in ids]
        if not kept:
            raise ConfigError(f"no item is left to ask (split {self.split!r}): check source and selection")
        return tuple(kept)


class Benchmark(Images, Protocol):
    """Items and their images, and how complete they are.

    Attributes:
        published: under which name the paper prints its score (`scores.PAPER_GROUPS`); "" where it has none.
        missing: the image keys that were not found, or are no images; their items are left out.
        partial: why a score is not of the whole benchmark, one reason a line; () where it is.
        notes: what was read and what a rule left out, with counts, for people.
    """

    name: str
    published: str
    items: tuple[Item, ...]
    missing: tuple[str, ...]
    partial: tuple[str, ...]
    notes: tuple[str, ...]


def turn(text: str, selection: Selection, images: int = 1) -> tuple[dict[str, Any], ...]:
    """A prompt of a benchmark's own, as one user turn: images first, the instruction how to answer last."""
    if selection.instruct:
        text += "\n" + (dialog.THINK_INSTRUCTION if selection.think else dialog.ANSWER_INSTRUCTION)
    content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": text}]
    return ({"role": "user", "content": content},)


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question as VLMEvalKit asks it (image_mcq.py), by whom OmniMedVQA and GMAI-MMBench
    are asked; the blank before the last line break is its own."""
    asked = "Please select the correct answer from the options above. \n"
    return f"Question: {question}\n{dialog.option_lines(options)}\n{asked}"


def counted(groups: Iterable[str]) -> str:
    """How often each name occurs, in the order of the names: "AI 439, DD 769"."""
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(groups).items()))
