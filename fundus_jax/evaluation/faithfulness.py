"""Whether a trace is true to its image: the findings that it claims and denies against those that are there.

What is there is known from masks, or else from the votes of a model (`Findings`): the second is a weaker
witness, so the two are never pooled. Recall asks for the findings that are there to be named, which only a
diagnosis obliges a trace to do; precision and contradictions hold for every trace. As for the rules judge,
the label after "the answer is" is no claim. What nobody looked for is neither there nor absent: to claim or
to deny it counts neither way. Pure. Neighbours: findings (the parser), slices.py (by data set, modality and
disease).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fundus_jax.evaluation import scores
from fundus_jax.evaluation.bootstrap import figure
from fundus_jax.findings import Mentions, observations, parse_mentions


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace about an image: its text, the findings that are there, whether it has to name them all, the
    unit (patient or image), and the findings that may be there or not."""

    text: str
    there: frozenset[str]
    diagnosis: bool
    unit: Hashable
    unknown: frozenset[str] = frozenset()


def counts(
    there: Collection[str], mentions: Mentions, diagnosis: bool, unknown: Collection[str] = ()
) -> tuple[int, ...]:
    """(claimed rightly, claimed; named, to be named; denied though there, denied; contradicts) of one trace.

    It contradicts where it denies what is there, or claims and denies the same. What is `unknown` counts in
    that alone.

    >>> counts({"drusen", "pdr"}, Mentions(frozenset({"drusen", "cnv"}), frozenset({"pdr"})), True)
    (1, 2, 1, 2, 1, 1, 1)
    """
    both, known = bool(mentions.present & mentions.absent), set(there)
    mentions = mentions.without(unknown)
    claimed, denied = mentions.present, mentions.absent
    right, wrong = len(known & claimed), len(known & denied)
    recall = (right, len(known)) if diagnosis else (0, 0)
    return right, len(claimed), *recall, wrong, len(denied), int(wrong > 0 or both)


def evaluate_faithfulness(traces: Sequence[Trace], *, seed: int = 0) -> dict[str, Any] | None:
    """The faithfulness of traces; None where there are none.

    Keys, None where nothing is counted:
        traces: how many.
        precision: share of the claimed findings that are there; n counts claims.
        recall: share of the findings there that a diagnosis names; n counts findings.
        false_denials: share of the denied findings that are there; n counts denials.
        contradictions: share of the traces that deny what is there, or claim and deny the same.
    """
    if not traces:
        return None
    said = [parse_mentions(observations(one.text)) for one in traces]
    rows = np.array(
        [counts(one.there, told, one.diagnosis, one.unknown) for one, told in zip(traces, said, strict=True)],
        float,
    )
    rows = np.column_stack([rows, np.ones(len(rows))])
    units = [one.unit for one in traces]

    def share(above: int, below: int) -> dict[str, Any] | None:
        n = int(rows[:, below].sum())
        if not n:
            return None
        found = figure(
            rows, lambda s: scores.ratio(s[..., above], s[..., below]), n=n, units=units, seed=seed
        )
        return found.as_dict()

    return {
        "traces": len(traces),
        "precision": share(0, 1),
        "recall": share(2, 3),
        "false_denials": share(4, 5),
        "contradictions": share(6, 7),
    }
