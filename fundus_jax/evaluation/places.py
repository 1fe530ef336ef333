"""Scores where traces say that findings lie: matched IoU, F1 at IoU 0.5, hits, how often boxes are malformed.

The unit that is averaged is a finding of an answer, one that is there or that is said. Pure, as `scores.py`.
Neighbours: fundus_jax/localisation.py matches boxes, report.py puts this into the report.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fundus_jax import dialog, localisation
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.bootstrap import figure
from fundus_jax.evaluation.items import Item
from fundus_jax.records import Box

# Finding, agreement, boxes found, boxes there and boxes said, boxes said, those of them that point rightly.
Row = tuple[str, float, int, int, int, int]


def finding_rows(said: dialog.Places, there: Sequence[Box]) -> list[Row]:
    """A row for each finding of an answer; a finding with a malformed group has no box that counts."""
    bad = {localisation.canonical(name) for name, _ in said.malformed}
    ours = {name: boxes for name, boxes in localisation.by_finding(said.boxes).items() if name not in bad}
    theirs = localisation.by_finding(there)
    agreed = localisation.agreements(said.boxes, there, bad)
    rows = []
    for name in sorted(agreed):
        pair = ours.get(name, []), theirs.get(name, [])
        points = sum(_inside(box, pair[1]) for box in pair[0])
        found, both = localisation.hits(*pair), len(pair[0]) + len(pair[1])
        rows.append((name, agreed[name], found, both, len(pair[0]), points))
    return rows


def _inside(box: Box, there: Sequence[Box]) -> bool:
    """Whether the centre of a box lies in one of those there: the "pointing game"."""
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return any(one.x1 <= x <= one.x2 and one.y1 <= y <= one.y2 for one in there)


def evaluate_places(items: Sequence[Item], thinks: Sequence[str], *, seed: int = 0) -> dict[str, Any] | None:
    """The report's `localisation`, of the traces [N] that answer items [N]; None where no item has boxes.

    Keys:
        answers: how many traces were asked to say where.
        malformed: the share of them with a group of boxes that can not be read.
        iou: mean agreement (matched IoU, 0 for a box without partner); n counts findings of answers.
        f1: of boxes that share at least half (IoU 0.5); n counts boxes there or said, those found once.
        hit_rate: share of the boxes said whose centre lies in a box of the same finding; n counts boxes said.
        by_finding, by_modality: `iou`, `f1` and `hit_rate` of each.
    """
    known = [i for i, item in enumerate(items) if item.boxes is not None]
    if not known:
        return None
    said = {i: localisation.read(thinks[i], items[i].unknown) for i in known}
    rows = [(i, *row) for i in known for row in finding_rows(said[i], items[i].boxes or ())]
    by_finding: dict[str, list[int]] = {}
    by_modality: dict[str, list[int]] = {}
    for k, (i, name, *_) in enumerate(rows):
        by_finding.setdefault(name, []).append(k)
        by_modality.setdefault(items[i].modality, []).append(k)
    table = np.array([row[2:] for row in rows], float).reshape(-1, 5)
    table = np.insert(table, 1, 1.0, axis=1)  # [rows, 6]: agreement, 1, found, there and said, said, pointing
    units = [items[row[0]].unit for row in rows]

    def figures(index: Sequence[int]) -> dict[str, Any]:
        return _figures(table[list(index)], [units[k] for k in index], seed)

    broken = np.array([bool(said[i].malformed) for i in known], float)
    malformed = scores.mean(broken, units=[items[i].unit for i in known], seed=seed)
    return {
        "answers": len(known),
        "malformed": malformed.as_dict(),
        **figures(range(len(rows))),
        "by_finding": {name: figures(index) for name, index in sorted(by_finding.items())},
        "by_modality": {name: figures(index) for name, index in sorted(by_modality.items())},
    }


def _figures(table: np.ndarray, units: Sequence[Hashable], seed: int) -> dict[str, Any]:
    boxes = int((table[:, 3] - table[:, 2]).sum())
    iou = figure(table, lambda sums: scores.ratio(sums[..., 0], sums[..., 1]), units=units, seed=seed)
    f1 = figure(
        table, lambda sums: scores.ratio(2 * sums[..., 2], sums[..., 3]), n=boxes, units=units, seed=seed
    )
    said = int(table[:, 4].sum())
    hit = figure(table, lambda sums: scores.ratio(sums[..., 5], sums[..., 4]), n=said, units=units, seed=seed)
    return {"iou": iou.as_dict(), "f1": f1.as_dict(), "hit_rate": hit.as_dict()}
