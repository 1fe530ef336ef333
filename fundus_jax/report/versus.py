"""The page of a comparison: differences between two evaluations, and the questions whose answers flipped.

What a policy said is shown on it, so everything is escaped and the page forbids itself scripts and requests,
as the report does. Neighbours: `page` (the templates), `claims` (traces with their claims marked), and
evaluation/compare.py, which writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fundus_jax import dialog
from fundus_jax.records import DataError
from fundus_jax.report import figures
from fundus_jax.report.page import templates
from fundus_jax.report.pictures import data_uri

MOST = 60  # flipped questions of each kind that the page shows; compare.json lists all
SAID = 1200  # characters of a trace that it shows
_GROUPS = {"by_modality": "Modality", "by_level": "Level", "by_task": "Task", "by_disease": "Disease"}


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one run said: the trace (all, without one), the option read from it, and whether it is right."""

    said: str
    chosen: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A question that one run answers rightly and the other does not. kind: gained or lost."""

    kind: str
    id: str
    about: str
    prompt: str
    answer: str
    pictures: tuple[tuple[str, str], ...]  # data URI, or "" and what is wrong
    first: Side
    second: Side

    @classmethod
    def of(
        cls,
        kind: str,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        load: Callable[[str], Image.Image],
    ) -> Flip:
        """From the lines of predictions.jsonl of both runs."""
        about = (first["modality"], first["level"], first["task"])
        return cls(
            kind=kind,
            id=first["id"],
            about=" · ".join(part for part in about if part),
            prompt=first["prompt"],
            answer=", ".join(first["answers"]),
            pictures=tuple(_picture(load, key) for key in first["images"]),
            first=_side(first),
            second=_side(second),
        )


def _side(one: Mapping[str, Any]) -> Side:
    text = dialog.parse(one["response"]).think or one["response"]
    text = dialog.without_boxes(text)
    cut = text if len(text) <= SAID else text[:SAID] + " …"
    return Side(said=cut, chosen=", ".join(one["extracted"] or ()) or "no option", right=bool(one["correct"]))


def _picture(load: Callable[[str], Image.Image], key: str) -> tuple[str, str]:
    try:
        return data_uri(load(key)), ""
    except (DataError, OSError) as error:  # the page says so where the picture would stand
        return "", f"{key}: {error}"


def render(first: str, second: str, pages: Sequence[tuple[str, Mapping[str, Any], Sequence[Flip]]]) -> str:
    """The page as one HTML document.

    first, second: what the runs are called. pages: for each benchmark its name, the report of
    `evaluation.compare.compare`, and its flips.
    """
    shown = [
        {
            "name": name,
            "all": _rows("all questions", report["all"]),
            "groups": [
                (title, [row for key, entry in report[group].items() for row in _rows(key, entry)])
                for group, title in _GROUPS.items()
                if report[group]
            ]
            + _published(report["published"]),
            "partial": report["partial"],
            "p": f"{report['all']['p']:.2g}",
            "flips": [
                (kind, [one for one in found if one.kind == kind][:MOST], len(report["flips"][kind]))
                for kind in ("lost", "gained")
            ],
        }
        for name, report, found in pages
    ]
    scored = any("funbench" in report["all"] for _, report, _ in pages)
    context = {"first": first, "second": second, "pages": shown, "most": MOST, "scored": scored}
    return templates().get_template("compare.html.jinja").render(context)


def _rows(name: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row of an entry, and where it has FunBench's score one below it."""
    return [
        _row(name, entry),
        *([_row("FunBench score", entry["funbench"], below=True)] if "funbench" in entry else []),
    ]


def _row(name: str, entry: Mapping[str, Any], *, below: bool = False) -> dict[str, Any]:
    """gained and lost are None of a score that is no mean over questions."""
    found = {key: figures.figure(entry, key) for key in ("first", "second", "difference")}
    return {"name": name, "below": below, **found} | {key: entry.get(key) for key in ("gained", "lost")}


def _published(published: Mapping[str, Any] | None) -> list[tuple[str, list[dict[str, Any]]]]:
    """The group of FunBench's published score; none where there is none."""
    if published is None:
        return []
    title = f"FunBench as published, by the rules {published['extraction']} alone"
    lacking = f", no question of {', '.join(published['lacking'])}" if published["lacking"] else ""
    rows = [_row(level, pair) for level, pair in published["groups"].items()]
    return [(title, [_row(f"mean of the levels{lacking}", published["score"]), *rows])]
