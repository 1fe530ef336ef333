"""README.md of an exported model: what it is for and what not, what it learned from, and its scores.

The head is YAML as the Hugging Face hub reads it; every value is written as JSON, which YAML contains. What
is not known is said to be unknown. Neighbours: launch/stages.py (the facts of a run).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

USE = """## Intended use

Research on how models read images of the eye, and on how to train them. **It is not a medical device and not
for diagnosis.** No answer of it may decide what is done for a patient. Its explanations read like reasons;
whether they are true to the image is measured below, and not given.
"""
LIMITS = """## Limits

* It can be wrong while it sounds sure, and can name findings that are not there.
* It knows the diseases, cameras and populations of its data. Nothing is known of others; most publishers say
  little of their patients' age, sex and origin.
* Scores on a test split of the same publishers say little about other hospitals.
* Intervals resample patients or images. They do not say what another run of the training would have given.
"""
CONSTANT = "best constant answer"  # beside the scores, and none itself
_UNKNOWN = "unknown: see the publisher's page"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model learned from: a data set, or passages of knowledge. `count` of examples or passages."""

    name: str
    licence: str
    citation: str = ""
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says.

    Attributes:
        name: of the model. base: what it started from. stages: what it went through, in order.
        sources: data and knowledge. scores: test set -> name of a number -> figure (value, n, low, high).
        drawn: whether the images are phantoms. command: that made it.
    """

    name: str
    base: str
    stages: tuple[str, ...]
    sources: tuple[Source, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    drawn: bool = False
    command: str = ""


def render(card: Card) -> str:
    """The whole README.md."""
    parts = [_head(card), f"# {card.name}\n", _what(card), USE, _data(card.sources), _scores(card), LIMITS]
    if card.command:
        parts.append(f"## How it was made\n\n```bash\n{card.command}\n```\n")
    return "\n".join(parts)


def _head(card: Card) -> str:
    """The YAML that the hub reads. The licence follows from the sources', which differ: "other"."""
    results = [
        {
            "task": {"type": "visual-question-answering"},
            "dataset": {"name": test_set, "type": _slug(test_set)},
            "metrics": [
                {"type": _slug(name), "name": name, "value": round(figure["value"], 4)}
                for name, figure in figures.items()
                if figure["value"] is not None and not name.startswith(CONSTANT)
            ],
        }
        for test_set, figures in card.scores.items()
    ]
    results = [one for one in results if one["metrics"]]
    head: dict[str, Any] = {
        "language": ["en"],
        "license": "other",
        "license_name": "see-data-and-base-model",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["fundus", "ophthalmology", "medical", "research-only", *card.stages],
    }
    if results:
        head["model-index"] = [{"name": card.name, "results": results}]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()]
    return "\n".join(["---", *lines, "---", ""])


def _what(card: Card) -> str:
    stages = " -> ".join(card.stages) or "no training"
    drawn = (
        "\n**Its images are phantoms, drawn by a program. No number here has a clinical meaning.**\n"
        if card.drawn
        else ""
    )
    return (
        "A vision-language model of Qwen2.5-VL's architecture that answers questions about images of the\n"
        f"eye, with its reasons. It started from {card.base}; training: {stages}.\n{drawn}"
    )


def _data(sources: Sequence[Source]) -> str:
    rows = [
        f"| {' | '.join(map(_cell, (one.name, str(one.count), one.licence or _UNKNOWN, one.citation)))} |"
        for one in sources
    ]
    return "\n".join(
        [
            "## Data and knowledge\n",
            "Images and texts are not part of this repository. Whoever uses the model has to see to the",
            "terms of what it was made from, and of the model that it started from.\n",
            "| source | examples | licence | reference |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _scores(card: Card) -> str:
    lines = ["## Scores\n"]
    if not card.scores:
        return "\n".join([*lines, "It was not measured.\n"])
    lines += ["Per cent, with 95 % bootstrap intervals.\n", "| test set | measure | value | interval | n |"]
    lines.append("|---|---|---|---|---|")
    for test_set, figures in card.scores.items():
        for name, figure in figures.items():
            if figure["value"] is not None:
                value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
                lines.append(
                    f"| {_cell(test_set)} | {_cell(name)} | {value} | {low} to {high} | {figure['n']} |"
                )
    return "\n".join([*lines, ""])


def scores_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The numbers of a report that a card shows: accuracy with what a constant answer reaches by modality,
    the published score, and how true the traces are."""
    found: dict[str, Mapping[str, Any]] = {"accuracy": report["accuracy"]}
    published = report.get("published")
    if published:
        found[f"{published['benchmark']} score"] = published["score"]
    for name, entry in report["by_modality"].items():
        found[f"accuracy, {name}"] = entry["accuracy"]
        found[f"{CONSTANT}, {name}"] = entry["majority"]
    for origin, entry in report["more"]["faithfulness"].items():
        for name in ("precision", "recall", "contradictions"):
            if entry and entry[name]:
                found[f"findings in traces, {name} ({origin})"] = entry[name]
    return found


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
