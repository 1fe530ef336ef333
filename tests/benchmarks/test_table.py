"""docs/benchmarks.md is what `benchmarks.table` makes of the JSON files beside it."""

from __future__ import annotations

import pytest

from benchmarks import table
from tests.conftest import ROOT


def test_the_page_is_that_of_the_figures() -> None:
    reports = table.read()
    assert set(reports) <= set(table.TABLES), "a report without a table"
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == table.render(reports)


def test_every_report_says_what_was_compared_where_and_how_often() -> None:
    for name, report in table.read().items():
        beside = {"pipeline": "openai", "pipeline_vllm": "openai", "evaluation": "jax"}.get(
            name, "transformers"
        )
        assert report["versions"].keys() >= {"jax", beside}, name
        assert report["settings"]["repeats"] >= 3, name
        assert report["rows"], name


def test_shares_and_ratios_are_those_of_the_figures_beside_them() -> None:
    for name, report in table.read().items():
        for row in report["rows"]:
            if "share" in row and "server_per_second" in row:
                assert row["share"] == pytest.approx(
                    row["per_second"] / row["server_per_second"], rel=1e-3
                ), name
            if "ratio" in row and "median" in row["ours"]:
                assert row["ratio"] == pytest.approx(row["hf"]["median"] / row["ours"]["median"], rel=1e-3), (
                    name
                )
