"""The pipeline's benchmark at a tiny size: what is asked, what is resumed, and what is written. No timing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pipeline, table
from tests.benchmarks import run


def test_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"items": 24, "shard_size": 10, "latency": 1, "slots": 2, "sweep": "1,2", "records": "1000"}
    report = run.report(monkeypatch, pipeline, tmp_path / "out.json", **sizes)
    found = [(row["what"], row.get("under_way"), row["items"]) for row in report["rows"]]
    best = report["rows"][2]["under_way"]
    assert found == [
        *(("server", 1, 6), ("server", 2, 8)),
        *(("job", best, 24), ("job", 2 * best, 24), ("resume", None, 1000)),
    ]
    assert best in (1, 2)
    assert all(row["per_second"] > 0 for row in report["rows"][:-1])
    assert all(row["share"] > 0 for row in report["rows"][2:4])
    assert len(list(table.pipeline(report))) == 1 + len(report["rows"])
