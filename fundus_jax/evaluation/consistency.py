"""Clinical consistency of written reports: rightly mentioned findings over those that had to be or were
mentioned.

FundusExpert (Liu, Song, ICCV 2025) defines it for a report and the labels of its image as Score / Total:
the positive findings that the report claims and the negative ones that it denies, over all positive
findings and the negative ones that it mentions. What no label says is positive counts as negative there; here
only what somebody looked for, and what nobody did is left out of the report before it is scored. There a
language model counts; here the two sets of mentions are read from the report, by rules or by a language
model (by_server.py), and the counting is ours, so that it can be checked. Is the published figure the mean
of the reports' shares, or the share of the sums? Its text does not say; `mean` and `pooled` are both given.
Pure. Neighbours: describe.py (the questions), findings (the parser).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fundus_jax import dialog, findings
from fundus_jax.evaluation import scores
from fundus_jax.evaluation.bootstrap import figure
from fundus_jax.evaluation.extract import answer_text
from fundus_jax.evaluation.report import Prediction
from fundus_jax.evaluation.table import line
from fundus_jax.findings import Mentions
from fundus_jax.records import ConfigError


def score_and_total(positive: Collection[str], mentions: Mentions) -> tuple[int, int]:
    """Score and Total of one report.

    A finding that is both claimed and denied is mentioned, and not rightly.

    >>> six = frozenset("abcdef")
    >>> score_and_total({"exudate", "aneurysm"}, Mentions(frozenset({"exudate"}), six))
    (7, 8)
    """
    claimed, denied = mentions.present - mentions.absent, mentions.absent - mentions.present
    negative = (mentions.present | mentions.absent) - set(positive)
    right = len(claimed & set(positive)) + len(denied & negative)
    return right, len(set(positive)) + len(negative)


def read_by_rules(response: str) -> Mentions:
    """The findings that a report claims and denies, by the parser of mentions; boxes and tags apart."""
    return findings.parse_mentions(dialog.without_boxes(answer_text(response)))


def evaluate_reports(
    answers: Sequence[Prediction],
    mentions: Sequence[Mentions | None] | None = None,
    *,
    reader: str = "rules",
    seed: int = 0,
    partial: Sequence[str] = (),
) -> dict[str, Any]:
    """The clinical consistency of reports [N] about images whose findings are known.

    Args:
        mentions: what each report says, None where it could not be read; None reads them by rules.
        reader: who read them, for the report.

    Keys:
        n, items, units, partial, reader: what was scored, and who read it.
        mean: of the reports' Score / Total; pooled: the sum of Scores over that of Totals; n counts reports
            in the first, findings in the second.
        empty: the reports about an image without findings that mention none: their Total is 0, and they count
            in neither. unread: those whose mentions could not be read, likewise; unread_ids: which.
        precision, recall, f1: of the claimed findings.

    Raises:
        ConfigError: no report, or one about an image whose findings are unknown.
    """
    unknown = [answer.item.id for answer in answers if answer.item.findings is None]
    if not answers or unknown:
        raise ConfigError(f"{len(answers)} reports to score; findings are unknown for {unknown[:3]}")
    said = [read_by_rules(one.response) for one in answers] if mentions is None else mentions
    read = [i for i, one in enumerate(said) if one is not None]
    pairs = [
        (answers[i], one.without(answers[i].item.unknown)) for i, one in enumerate(said) if one is not None
    ]
    counts = np.array([score_and_total(a.item.findings or (), one) for a, one in pairs], float).reshape(-1, 2)
    counted = counts[:, 1] > 0
    units = [answer.item.unit for answer, _ in pairs]
    kept = [unit for unit, one in zip(units, counted, strict=True) if one]
    counts = counts[counted]
    shares = np.stack([counts[:, 0] / counts[:, 1], np.ones(len(counts))], axis=1)
    _, table = scores.finding_table(
        [set(answer.item.findings or ()) for answer, _ in pairs], [one.present for _, one in pairs]
    )

    def ratio(rows: np.ndarray, n: int) -> dict[str, Any]:
        quotient = figure(rows, lambda s: scores.ratio(s[..., 0], s[..., 1]), n=n, units=kept, seed=seed)
        return quotient.as_dict()

    found = {
        name: one.as_dict() for name, one in scores.finding_figures(table, units=units, seed=seed).items()
    }
    missing = sorted(set(range(len(answers))) - set(read))
    return {
        "n": len(answers),
        "items": len({answer.item.id for answer in answers}),
        "units": len({answer.item.unit for answer in answers}),
        "partial": list(partial),
        "reader": reader,
        "mean": ratio(shares, len(counts)),
        "pooled": ratio(counts, int(counts[:, 1].sum())),
        "empty": int((~counted).sum()),
        "unread": len(missing),
        "unread_ids": [f"{answers[i].item.id}#{answers[i].sample}" for i in missing],
        **found,
    }


def consistency_table(report: dict[str, Any]) -> str:
    """The report as a plain text table; of a partial benchmark every line says so."""
    mark = "  PARTIAL" if report["partial"] else ""
    names = {
        "mean": "clinical consistency, mean of reports",
        "pooled": "clinical consistency, pooled",
        "precision": "findings precision",
        "recall": "findings recall",
        "f1": "findings f1",
    }
    scope = f"{report['n']} reports about {report['units']} patients or images; read by {report['reader']}"
    lines = [line(shown, report[name]) + mark for name, shown in names.items()]
    notes = [f"PARTIAL: {reason}" for reason in report["partial"]]
    notes += [f"without findings, and mentioning none: {report['empty']}; not read: {report['unread']}"]
    apart = consistency_table(report["server"]) if "server" in report else ""
    return "\n".join([scope, *lines, *notes]) + "\n" + apart
