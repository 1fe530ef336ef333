"""What answers questions: our sampler or a server, behind one Protocol.

An engine gets items and hands out their answers as they come, in any order. Both engines give the model the
same text and the same pixels, and with temperature 0 the same tokens (tests/vllm). Neighbours: predict.py
(our sampler), served.py (a server), journal.py (what was answered before), run.py (the command).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.report import Prediction
from fundus_jax.records import ConfigError, DataError

_PARTS = (".safetensors", ".json", ".jinja", ".txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How items are asked: `samples` responses to each, of at most `max_new_tokens`; temperature 0 takes the
    likeliest token."""

    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError for a number that makes no sense."""
        for name, low in {"max_new_tokens": 1, "samples": 1, "temperature": 0, "seed": 0}.items():
            if not getattr(self, name) >= low:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.samples > 1 and not self.temperature:
            raise ConfigError(
                f"group_size is {self.samples} with temperature 0, where all samples are alike; "
                "raise the temperature, or ask once"
            )


class Engine(Protocol):
    """Answers items.

    Attributes:
        facts: what its answers depend on, in JSON: kind, model, versions. Answers of engines with other facts
            are never put together.
        failures: index of an item -> why there is no answer to it: the last `answer` did without.
    """

    facts: dict[str, Any]
    failures: dict[int, str]

    def answer(
        self, items: Sequence[Item], wanted: Sequence[int], images: Images, asking: Asking
    ) -> Iterator[tuple[int, list[Prediction]]]:
        """(index, the answers to items[index]) of each wanted index, in any order, as soon as they are known.

        An answer depends on all `items` and its index, never on which are wanted: so an evaluation that was
        interrupted, or is dealt out to several hosts, gets the answers that it would have got.

        A question whose picture can not be read is a failure. Raises Stopped where the run is to stop.
        """
        ...

    def work(self) -> dict[str, float]:
        """What it did so far, for the report: seconds, questions a second, shares of waiting."""
        ...


def identity(folder: str | Path) -> str:
    """sha256 of what a Hugging Face directory answers with: weights, configuration, tokenizer and template.

    Raises ConfigError where there is no such directory."""
    paths = [path for path in sorted(Path(folder).glob("*")) if path.suffix in _PARTS and path.is_file()]
    if not paths:
        raise ConfigError(f"{folder} is no Hugging Face directory: it has neither weights nor a config.json")
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def without_failures(items: Sequence[Item], failures: Mapping[int, str]) -> None:
    """Raises DataError, naming the first, where there are questions without an answer."""
    for index, reason in failures.items():
        more = f", nor to {len(failures) - 1} others" if len(failures) > 1 else ""
        raise DataError(f"there is no answer to {items[index].id}{more}: {reason}")


def in_order(engine: Engine, items: Sequence[Item], images: Images, asking: Asking) -> list[Prediction]:
    """The answers to all items, item after item. Raises DataError where one has none."""
    found = dict(engine.answer(items, range(len(items)), images, asking))
    without_failures(items, engine.failures)
    return [one for index in range(len(items)) for one in found[index]]
