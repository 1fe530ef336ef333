"""How well boxes agree: exact one-to-one matching by overlap, as the reward and the evaluation need it.

Overlap is IoU, the area that two boxes share over the area that they cover together. Boxes are matched within
a finding, so that their sum of IoU is the largest possible (Hungarian method; FundusExpert publishes no code
for its localisation score). Everything is pure. Neighbours: `dialog.py` reads and writes boxes,
`grpo/rewards.py` and `evaluation/places.py` ask.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from fundus_jax import dialog, findings
from fundus_jax.records import Box

HIT = 0.5  # IoU from which a box counts as found


def overlaps(first: Sequence[Box], second: Sequence[Box]) -> np.ndarray:
    """IoU [A, B] of each of A boxes with each of B, whatever finding they are of."""
    a, b = (
        np.array([[box.x1, box.y1, box.x2, box.y2] for box in boxes], float).reshape(-1, 4)
        for boxes in (first, second)
    )
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def agreement(first: Sequence[Box], second: Sequence[Box]) -> float:
    """Mean IoU of matched boxes, where a box without partner counts as a pair of IoU 0.

    1 exactly where both hold the same boxes, in any order; 0 where nothing overlaps, or only one has boxes;
    symmetric. Raises ValueError where neither has a box: there is nothing to agree on.
    """
    if not first and not second:
        raise ValueError("no boxes on either side: agreement is not defined")
    table = overlaps(first, second)
    return float(table[linear_sum_assignment(table, maximize=True)].sum()) / max(table.shape)


def hits(first: Sequence[Box], second: Sequence[Box]) -> int:
    """The largest number of disjoint pairs whose IoU is at least `HIT`."""
    found = overlaps(first, second) >= HIT
    return int(found[linear_sum_assignment(found, maximize=True)].sum())


def by_finding(boxes: Iterable[Box]) -> dict[str, list[Box]]:
    """Boxes by the canonical name of their finding; a name that is none stays as it is, in lower case."""
    groups: dict[str, list[Box]] = {}
    for box in boxes:
        groups.setdefault(canonical(box.finding), []).append(box)
    return groups


def canonical(name: str) -> str:
    """The canonical name of a finding as a text writes it."""
    return findings.canonical(name) or name.lower()


def agreements(
    said: Iterable[Box], there: Iterable[Box], malformed: Collection[str] = ()
) -> dict[str, float]:
    """Finding -> `agreement`, for every finding that either side has.

    malformed: names of groups that could not be read; each of these findings scores 0, also where another
    group of it is sound, so that nothing malformed is ever worth more than silence.
    """
    ours, theirs = by_finding(said), by_finding(there)
    scores = {name: agreement(ours.get(name, ()), theirs.get(name, ())) for name in ours | theirs}
    return scores | dict.fromkeys(map(canonical, malformed), 0.0)


def read(text: str, unknown: Collection[str] = ()) -> dialog.Places:
    """The boxes that a text says, without those of findings that nobody looked for: nothing speaks for or
    against these."""
    said = dialog.parse_boxes(text)
    return replace(said, boxes=tuple(box for box in said.boxes if canonical(box.finding) not in unknown))


def score(text: str, there: Sequence[Box], unknown: Collection[str] = ()) -> float | None:
    """What the boxes of a text are worth against those that are there: the mean of `agreements`, in [0, 1].
    Those of `unknown` findings count neither way.

    A finding that is missing, made up or malformed is one of the mean with 0. None where no box is there: the
    question of where does not apply, and a finding that is made up is for the process reward to punish.
    """
    if not there:
        return None
    said = read(text, unknown)
    malformed = [name for name, _ in said.malformed if canonical(name) not in unknown]
    scores = agreements(said.boxes, there, malformed)
    return sum(scores.values()) / len(scores)
