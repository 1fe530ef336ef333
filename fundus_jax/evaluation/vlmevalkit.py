"""The answers as VLMEvalKit's evaluation of multiple choice reads them, so that others can score them again.

Columns: index, question, A, B, ..., answer (a letter), category (the task), prediction; and our own
l2-category (level or question file), id and response. VLMEvalKit takes the right answers out of the data
set's own table, by index: `index` is the publisher's where the items' ids are that (GMAI-MMBench), else a
running number, which belongs to no table but this one. `prediction` is what our extraction reads, the inside
of the answer tags where there are some: VLMEvalKit does not know the tags, and would read letters out of a
trace. `response` is all that was said. Only questions with options and one right one can be in such a file;
of several samples it has the first. Neighbours: results.py, extract.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fundus_jax import dialog
from fundus_jax.evaluation.extract import answer_text
from fundus_jax.evaluation.report import Prediction

Rows = list[list[str | int]]


def rows(predictions: Sequence[Prediction]) -> Rows:
    """The table with its header; the header alone where no question fits."""
    fit = [
        one
        for one in predictions
        if one.sample == 0 and one.item.options and len(one.item.answers) == 1 and not one.item.multiple
    ]
    letters = dialog.LETTERS[: max((len(one.item.options) for one in fit), default=0)]
    head = [
        "index",
        "question",
        *letters,
        "answer",
        "category",
        "prediction",
        "l2-category",
        "id",
        "response",
    ]
    table: Rows = [list(head)]
    published = all(_is_number(one.item.id) for one in fit)
    for number, one in enumerate(fit):
        item = one.item
        index = int(item.id) if published else number
        options = dialog.lettered(item.options)
        answer = next(letter for letter, text in options.items() if text == item.answers[0])
        choices = [options.get(letter, "") for letter in letters]
        rest = [answer_text(one.response), item.level or item.part, item.id, one.response]
        table.append([index, item.prompt, *choices, answer, item.task, *rest])
    return table


def _is_number(name: str) -> bool:
    """Whether a name is a number as one writes it, so that different names are different numbers."""
    return name.isdecimal() and str(int(name)) == name


def as_tsv(table: Rows) -> str:
    """The table as tab-separated values, quoted as pandas reads and writes them."""
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(table)
    return stream.getvalue()
