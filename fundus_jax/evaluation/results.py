"""What an evaluation leaves behind: predictions.jsonl, report.json, report.txt, and files for other programs.

Neighbours: run.py and launch/evaluate.py write, report.py and table.py make what is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fundus_jax.evaluation import paper, vlmevalkit
from fundus_jax.evaluation.consistency import consistency_table
from fundus_jax.evaluation.extract import Mode
from fundus_jax.evaluation.report import Prediction, Report, outcome_of
from fundus_jax.evaluation.table import table
from fundus_jax.evaluation.workbook import workbook
from fundus_jax.files import write_atomic


def write(out: Path, predictions: Sequence[Prediction], report: Report, mode: Mode = "tail") -> None:
    """Writes what there is to say of answers into the folder `out`.

    predictions.jsonl: every prompt, response, extraction and score. report.txt and report.json, the last to
    be written. paper.md, beside the paper's numbers, where it has the benchmark. vlmevalkit.tsv and .xlsx, to
    be scored by others, where the questions have options.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = {name: report["run"][name] for name in ("engine", "config")} if "run" in report else {}
    lines = [json.dumps(_as_json(one, mode) | run, ensure_ascii=False) + "\n" for one in predictions]
    write_atomic(out / "predictions.jsonl", "".join(lines))
    write_atomic(out / "report.txt", text_of(report))
    if report.get("published"):
        published = report["published"]
        page = paper.render({published["benchmark"]: published}, "this run", paper.notes_of(report))
        write_atomic(out / "paper.md", page)
    rows = vlmevalkit.rows(predictions)
    if len(rows) > 1:
        write_atomic(out / "vlmevalkit.tsv", vlmevalkit.as_tsv(rows))
        write_atomic(out / "vlmevalkit.xlsx", workbook(rows))
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "report.json", text + "\n")


def text_of(report: Report) -> str:
    """The report as a table of text."""
    return consistency_table(report) if "pooled" in report else table(report)


def _as_json(prediction: Prediction, mode: Mode) -> dict[str, Any]:
    item, outcome = prediction.item, outcome_of(prediction, mode)
    return {
        "id": item.id,
        "images": item.images,
        "level": item.level,
        "task": item.task,
        "part": item.part,
        "modality": item.modality,
        "unit": item.unit,
        "sample": prediction.sample,
        "prompt": item.prompt,
        "options": item.options,
        "answers": item.answers,
        "multiple": item.multiple,
        "response": prediction.response,
        "tokens": prediction.tokens,
        "finished": prediction.finished,
        "logprob": prediction.logprob,
        "extracted": outcome.extracted,
        "correct": outcome.correct,
        "well_formed": outcome.well_formed,
        "findings": item.findings,
        "claimed": outcome.claimed,
    }
