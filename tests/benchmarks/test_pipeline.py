"""The pipeline's benchmark at a tiny size: what is asked, what is resumed, and what is written. No timing."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipeline, serving, table
from tests.benchmarks import run

SIZES = {"items": 24, "shard_size": 10, "latency": 1, "slots": 2, "sweep": "1,2", "repeats": 3}


def test_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run.report(monkeypatch, pipeline, tmp_path / "out.json", **SIZES, records="1000")
    found = [(row["what"], row.get("under_way"), row["items"]) for row in report["rows"]]
    best = report["rows"][2]["under_way"]
    assert found == [
        *(("server", 1, 24), ("server", 2, 24)),
        *(("job", best, 24), ("job", 2 * best, 24), ("resume", None, 1000)),
    ]
    assert best in (1, 2)
    assert all(row["per_second"] > 0 for row in report["rows"][:-1])
    for row in report["rows"][2:4]:
        assert len(row["runs"]) == SIZES["repeats"]
        for name in ("per_second", "server_per_second", "memory_mb"):
            assert row[name] == statistics.median(one[name] for one in row["runs"])
        assert row["share"] == pytest.approx(row["per_second"] / row["server_per_second"], rel=1e-3)
    assert len(list(table.pipeline(report))) == 1 + len(report["rows"])


def test_no_two_runs_show_an_image_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the client and of the job, in one command and the next: a cache of the server would know it."""
    shown: list[str] = []
    plain, apart = serving.plain, pipeline.apart

    def url(messages: list[dict[str, Any]]) -> str:
        return messages[0]["content"][0]["image_url"]["url"]

    def seen_plain(address: str, bodies: list[dict[str, Any]], under_way: int) -> float:
        shown.extend(url(one["messages"]) for one in bodies)
        return plain(address, bodies, under_way)

    def seen_apart(call: functools.partial[float]) -> tuple[float, float]:
        if call.func is pipeline.job:
            shown.extend(url(pipeline.messages(item)) for item in call.args[3])
        return apart(call)

    args = run.arguments(monkeypatch, pipeline, **SIZES | {"repeats": 1}, records="")
    monkeypatch.setattr(serving, "plain", seen_plain)
    monkeypatch.setattr(pipeline, "apart", seen_apart)
    for _ in range(2):
        pipeline.run(args)
    assert len(shown) == len(set(shown)) == 2 * 24 * (1 + 2 + 2 * 2)
