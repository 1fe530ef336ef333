"""Parts of a job: by the flag or a cluster's numbers, done by several processes at once in one directory."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import jobs, manifest, parts
from fundus_jax.records import ConfigError, DataError, Findings
from tests.conftest import ROOT
from tests.data_pipeline import toy_job

ARRAY = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "4", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(
    ("given", "environment", "part"),
    [
        ("", {}, "0/1"),
        ("1/3", {"JOB_COMPLETION_INDEX": "0", "FUNDUS_PARTS": "2"}, "1/3"),
        ("", {"JOB_COMPLETION_INDEX": "0", "FUNDUS_PARTS": "2"}, "0/2"),
        ("", ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, "4/5"),
        ("", {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, "1/2"),
        ("", {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}, "0/1"),
        ("", {"FUNDUS_PARTS": "2"}, "0/1"),
    ],
)
def test_the_part_is_the_flags_or_the_clusters(given: str, environment: dict[str, str], part: str) -> None:
    assert parts.chosen(given, environment) == part


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ("3/3", {}, "--shard is '3/3': write i/n"),
        (
            "",
            {"JOB_COMPLETION_INDEX": "0"},
            "JOB_COMPLETION_INDEX is set and FUNDUS_PARTS is not: set FUNDUS",
        ),
        ("", {"JOB_COMPLETION_INDEX": "2", "FUNDUS_PARTS": "2"}, "JOB_COMPLETION_INDEX with FUNDUS_PARTS is"),
        ("", ARRAY | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_ID": "1"}, "5 elements from 1 to 4"),
        (
            "",
            {**dict.fromkeys(ARRAY, "3"), "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_ID": "3"},
            "1 elements from 3 to 3; submit it with --array=0-LAST, or give --shard=i/n",
        ),
    ],
)
def test_what_would_leave_shards_to_nobody_is_refused(
    given: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parts.chosen(given, environment)


def test_parts_are_disjoint_and_cover_all() -> None:
    names = [f"s{i}" for i in range(11)]
    taken = [parts.take(names[::-1], f"{i}/4") for i in range(4)]
    assert sorted(name for one in taken for name in one) == sorted(names)
    assert taken == [parts.take(names, f"{i}/4") for i in range(4)], "whatever order they are listed in"


def toy(out: Path, shard: str, pause: float = 0.0) -> jobs.Summary:
    job = jobs.Job("toy", {"size": 3, "model": {"name": "none"}})

    def process(one: jobs.ShardInput, scratch: Path):
        return toy_job.process(one, scratch, pause=pause)

    return jobs.run(job, toy_job.shards(), process, out, shard=shard, limit=0.1)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock")}


def test_several_processes_at_once_make_the_directory_of_one(tmp_path: Path) -> None:
    toy(tmp_path / "whole", "0/1")
    context = multiprocessing.get_context("forkserver")
    for run in range(3):
        out = tmp_path / f"{run}"
        processes = [context.Process(target=toy, args=(out, f"{i}/4", 0.001)) for i in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert contents(out) == contents(tmp_path / "whole")


def test_an_unfinished_directory_is_refused_and_its_missing_parts_are_named(tmp_path: Path) -> None:
    toy(tmp_path, "2/4")
    toy(tmp_path, "0/4")
    told = "2 of 4 shards are not finished .first: toy-00001., of parts 1/4, 3/4: wait for them, or run them"
    with pytest.raises(DataError, match=told):
        list(jobs.read(tmp_path, Findings))
    toy(tmp_path, "3/4")
    with pytest.raises(DataError, match="of parts 1/4: wait"):
        list(jobs.read(tmp_path, Findings))
    toy(tmp_path, "1/4")
    assert len(list(jobs.read(tmp_path, Findings))) == 119


def test_what_other_parts_made_of_another_input_is_left_to_them(tmp_path: Path) -> None:
    """By the key of each shard, and not by its name alone; a shard without its files counts as missing."""
    assert [toy(tmp_path, f"{part}/2").shards_left for part in (0, 1)] == [2, 0]
    job, old = jobs.Job("toy", {"size": 3, "model": {"name": "none"}}), toy_job.shards()
    new = [replace(old[0], key="changed"), *old[1:]]

    def left(part: str, shards: list[jobs.ShardInput]) -> int:
        return jobs.run(job, shards, toy_job.process, tmp_path, shard=part, limit=0.1).shards_left

    assert (left("1/2", new), left("0/2", new), left("1/2", new)) == (1, 0, 0)
    (tmp_path / f"{old[0].name}.jsonl").unlink()
    assert (left("1/2", new), left("0/2", new)) == (1, 0)


def test_another_division_is_refused_while_a_part_runs(tmp_path: Path) -> None:
    with manifest.running(tmp_path, "1/2"):
        with pytest.raises(ConfigError, match="another process runs part 1/2 of the job"):
            toy(tmp_path, "0/3")
        toy(tmp_path, "0/2")
    toy(tmp_path, "1/3")
    with pytest.raises(DataError, match="1 of 4 shards .*of parts 0/3: wait"):
        list(jobs.read(tmp_path, Findings))


@pytest.mark.parametrize("stage", ["ingest", "knowledge_base", "findings", "traces", "decontaminate"])
def test_every_command_reads_the_clusters_numbers(stage: str, tmp_path: Path) -> None:
    flags = {
        "ingest": ["--dataset=phantom"],
        "knowledge_base": ["--pairs=CFP:PDR"],
        "findings": [f"--examples={tmp_path}"],
        "traces": [f"--{name}={tmp_path}" for name in ("examples", "findings", "knowledge")],
        "decontaminate": [f"--examples={tmp_path}"],
    }[stage]
    done = subprocess.run(
        [sys.executable, "-m", f"data_pipeline.{stage}", f"--out={tmp_path / 'out'}", *flags],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JOB_COMPLETION_INDEX": "2", "FUNDUS_PARTS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "JOB_COMPLETION_INDEX with FUNDUS_PARTS is '2/2': write i/n" in done.stderr
