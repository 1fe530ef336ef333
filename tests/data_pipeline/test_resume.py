"""A job that is given again looks at the lines of its manifest and the sizes of its files, not at records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import files, jobs, manifest
from fundus_jax.records import Findings
from tests.conftest import ROOT
from tests.data_pipeline import resumed_job

SHARDS, RECORDS, LINE = 300, 5_000, 150  # records that a shard is made to say it has; bytes of one


def lose_the_last(out: Path) -> None:
    """Take the last shard's line away."""
    path = out / manifest.MANIFEST
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def pretend(out: Path) -> None:
    """Make every record file but the last as long as RECORDS records are, on the disk and in the manifest.

    The files have holes: they cost no room, and no record can be read from them.
    """
    *many, last = manifest.complete(out)
    lines = []
    for entry in many:
        name, size = f"{entry.name}.jsonl", RECORDS * LINE
        os.truncate(out / name, size)
        facts = entry.files | {name: entry.files[name] | {"bytes": size}}
        lines.append(replace(entry, items=RECORDS, answers=RECORDS, files=facts).line())
    (out / manifest.MANIFEST).write_text("".join([*lines, last.line()]))


def resumed(folder: Path) -> dict[str, Any]:
    """What the job did that lacks its last shard."""
    lose_the_last(folder / "second")
    command = [sys.executable, "-m", "tests.data_pipeline.resumed_job", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_neither_records_nor_memory_are_spent_on_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", lambda path: None)  # thousands of files, to be read in a moment
        one = Findings(example="item", present=(), votes={}, n=0, origin="pixels")
        inputs = [
            jobs.ShardInput(f"s{n:04d}", f"{n}", (replace(one, example=f"{n}"),)) for n in range(SHARDS)
        ]
        jobs.run(jobs.Job("first", {}), inputs, resumed_job.same, tmp_path / "first")
        resumed_job.second(tmp_path)
    few = resumed(tmp_path)
    for stage in ("first", "second"):
        pretend(tmp_path / stage)
    many = resumed(tmp_path)  # 1.5 million records
    last = f"s{SHARDS - 1:04d}"
    for told in (few, many):
        records = {
            one for one in told["opened"] if one.endswith(".jsonl") and not one.endswith("manifest.jsonl")
        }
        assert {Path(one).name.partition(".")[0] for one in records} == {last}
    assert many["peak"] < 1.25 * few["peak"], "larger numbers in the manifest, and nothing else"
