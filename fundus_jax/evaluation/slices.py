"""More than accuracy: faithfulness of traces, agreement among samples, length; over all answers and by data
set, modality and disease.

Pure. Neighbours: faithfulness.py and repeats.py (the measures), report.py (the rest of a report), table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from fundus_jax import dialog, findings
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.faithfulness import Trace, evaluate_faithfulness
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.repeats import Repeats, evaluate_repeats
from fundus_jax.records import Findings

DIAGNOSIS = ("L4", "DD", "disease")  # levels and tasks whose answer is a disease
UNNAMED = ("disease_presence", "dme_risk", "progression")  # tasks of these levels whose answer is none
_FOLDERS = ("Images", "images")  # above the folders of data sets, in benchmarks of several


def dataset_of(item: Item) -> str:
    """The data set that an item's image is of, as its unit's path says; "" where it says none."""
    parts = [part for part in PurePosixPath(item.unit).parts if part not in _FOLDERS]
    return parts[0] if len(parts) > 1 else ""


def disease_of(item: Item) -> str:
    """The right answer to a question on the diagnosis; "" for other questions."""
    named = item.task not in UNNAMED and {item.level, item.task} & set(DIAGNOSIS)
    return item.answer if named else ""


BY: dict[str, Callable[[Item], str]] = {
    "by_dataset": dataset_of,
    "by_modality": lambda item: item.modality,
    "by_disease": disease_of,
}


def evaluate_more(
    items: Sequence[Item],
    texts: Sequence[str],
    extracted: Sequence[Sequence[str] | None],
    tokens: Sequence[int],
    *,
    votes: Mapping[str, Findings] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The report's `more`, of answers [N]: to `items`, their texts, the options that they choose, lengths.

    votes: item id -> findings by a model's votes, for images without masks.

    Keys: those of `_entry`, and by_dataset, by_modality, by_disease: name -> the same of a part.
    """

    def entry(index: Sequence[int]) -> dict[str, Any]:
        def chosen(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in index]

        return _entry(chosen(items), chosen(texts), chosen(extracted), chosen(tokens), votes or {}, seed)

    found = entry(range(len(items)))
    for name, key in BY.items():
        members: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            if key(item):
                members.setdefault(key(item), []).append(i)
        found[name] = {value: entry(members[value]) for value in sorted(members)}
    return found


def _entry(
    items: Sequence[Item],
    texts: Sequence[str],
    extracted: Sequence[Sequence[str] | None],
    tokens: Sequence[int],
    votes: Mapping[str, Findings],
    seed: int,
) -> dict[str, Any]:
    """accuracy; length (all, right, wrong: mean tokens; median, p90); faithfulness (by masks, by votes);
    repeats (see `evaluate_repeats`). None for what there is nothing of."""
    units = [item.unit for item in items]
    hits = np.array([set(one or ()) == set(item.answers) for one, item in zip(extracted, items, strict=True)])
    lengths = np.asarray(tokens, float)

    def length(index: np.ndarray) -> dict[str, Any] | None:
        if not len(index):
            return None
        ours = [units[i] for i in index]
        return scores.mean(lengths[index], units=ours, seed=seed).as_dict()

    return {
        "accuracy": scores.accuracy(hits, units=units, seed=seed).as_dict(),
        "length": {
            "all": length(np.arange(len(items))),
            "right": length(np.flatnonzero(hits)),
            "wrong": length(np.flatnonzero(~hits)),
            "median": float(np.median(lengths)),
            "p90": float(np.percentile(lengths, 90)),
        },
        "faithfulness": {
            "masks": _faithful(
                items,
                texts,
                {one.id: (one.findings, one.searched) for one in items if one.findings is not None},
                seed,
            ),
            "votes": _faithful(
                items,
                texts,
                {
                    one.id: (votes[one.id].present, votes[one.id].searched)
                    for one in items
                    if one.findings is None and one.id in votes
                },
                seed,
            ),
        },
        "repeats": evaluate_repeats(_repeats(items, extracted), seed=seed),
    }


def _faithful(
    items: Sequence[Item], texts: Sequence[str], known: Mapping[str, tuple[Any, Any]], seed: int
) -> dict[str, Any] | None:
    """The faithfulness of the traces about items of which somebody knows what there is: id -> its findings,
    and what was looked for."""
    traces = [
        Trace(
            text=dialog.without_boxes(dialog.parse(text).think or ""),
            there=frozenset(known[item.id][0]),
            diagnosis=bool(disease_of(item)),
            unit=item.unit,
            unknown=findings.unknown(item.modality, known[item.id][1]),
        )
        for item, text in zip(items, texts, strict=True)
        if item.think and item.task not in dialog.WITHOUT_FINDINGS and item.id in known
    ]
    return evaluate_faithfulness(traces, seed=seed)


def _repeats(items: Sequence[Item], extracted: Sequence[Sequence[str] | None]) -> list[Repeats]:
    given: dict[str, list[frozenset[str] | None]] = {}
    for item, one in zip(items, extracted, strict=True):
        given.setdefault(item.id, []).append(None if one is None else frozenset(one))
    named = {item.id: item for item in items}
    return [
        Repeats(tuple(answers), frozenset(named[name].answers), named[name].unit)
        for name, answers in given.items()
    ]
