"""docs/benchmarks.md is what `benchmarks.table` makes of the JSON files beside it."""

from __future__ import annotations

from benchmarks import table
from tests.conftest import ROOT


def test_the_page_is_that_of_the_figures() -> None:
    reports = table.read()
    assert set(reports) <= set(table.TABLES), "a report without a table"
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == table.render(reports)


def test_every_report_says_what_was_compared_where_and_how_often() -> None:
    for name, report in table.read().items():
        beside = "openai" if name.startswith("pipeline") else "transformers"
        assert report["versions"].keys() >= {"jax", beside}, name
        assert report["settings"]["repeats"] >= 3, name
        assert report["rows"], name
