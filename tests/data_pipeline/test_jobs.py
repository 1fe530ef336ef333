"""The shard runner: killed anywhere in its commit window, it ends with the bytes of an undisturbed run."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_pipeline import jobs, manifest
from data_pipeline.jobs import Job, Quarantine, ShardInput, Summary
from fundus_jax.records import ConfigError, DataError, Findings
from tests.data_pipeline import toy_job

ROOT = Path(__file__).resolve().parents[2]
POINTS = [
    *("before_process:1", "before_process:3", "after_process:2", "before_rename:1", "before_rename:4"),
    *("after_rename:1", "after_rename:2", "after_rename:3", "after_rename:8"),
    *("before_manifest:1", "before_manifest:4", "after_manifest:1", "after_manifest:4"),
]
JOB = Job("toy", {"size": 3, "model": {"name": "none"}})


def start(out: Path, *arguments: str, fault: str = "") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUNDUS_FAULT": fault}
    command = [sys.executable, "-m", "tests.data_pipeline.toy_job", str(out), *arguments]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def contents(out: Path) -> dict[str, bytes]:
    """Everything in a finished directory; the empty lock files, which hold no data, are left out."""
    assert not list(out.glob(".*.part-*")), "a finished run leaves no scratch folder"
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(out) == Summary(119, 1, 4, 0)
    return contents(out)


def run(out: Path, *, shards=None, job=JOB, process=toy_job.process, **more) -> Summary:
    return jobs.run(job, toy_job.shards() if shards is None else shards, process, out, **more)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_fault_point(point, tmp_path, undisturbed):
    out = tmp_path / "out"
    first = start(out, fault=point)
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL, "the fault point was not reached"
    published = len(manifest.load(out))
    assert run(out) == Summary(119, 1, 4 - published, published)
    assert contents(out) == undisturbed


def test_killed_again_and_again_still_moves_forward(tmp_path, undisturbed):
    out = tmp_path / "out"
    for done in range(1, 5):
        child = start(out, fault="after_manifest:1")
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
        assert len(manifest.load(out)) == done
    assert run(out) == Summary(119, 1, 0, 4)
    assert contents(out) == undisturbed


def test_killed_pool_leaves_no_worker_behind(tmp_path, undisturbed):
    out = tmp_path / "out"
    parent = start(out, "2", "0.02")
    deadline = time.monotonic() + 60
    while not list(out.glob(".*.part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "a worker outlived its parent"
    again = start(out, "2")
    text, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert text.split()[2:] == ["119", "1"]
    assert contents(out) == undisturbed


def test_parts_of_a_job_make_the_same_directory(tmp_path, undisturbed):
    out = tmp_path / "out"
    assert run(out, shard="1/2") == Summary(60, 0, 2, 0, shards_left=2)
    with pytest.raises(DataError, match="2 of 4 shards are not finished .first: toy-00000"):
        list(jobs.read(out, Findings))
    assert run(out, shard="0/2") == Summary(59, 1, 2, 0)
    assert contents(out) == undisturbed


def test_torn_manifest_line_is_cut_off(tmp_path, undisturbed):
    out = tmp_path / "out"
    run(out)
    path = out / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert len(manifest.load(out)) == 3
    assert run(out) == Summary(119, 1, 1, 3)
    assert contents(out) == undisturbed


def test_read_gives_all_records_in_order(tmp_path):
    out = tmp_path / "out"
    run(out)
    names = [record.example for record in jobs.read(out, Findings, side_files=True)]
    assert names == [f"item {i}" for i in range(120) if i != 17]
    line = json.loads((out / "toy-00000.quarantine.jsonl").read_text())
    assert line == {"key": "item 17", "reason": "is seventeen"}


def test_other_config_is_refused_by_field(tmp_path):
    out = tmp_path / "out"
    run(out)
    other = Job("toy", {"size": 4, "model": {"name": "none", "prompt": 2}})
    with pytest.raises(ConfigError, match="config.size: 3 there, 4 here") as error:
        run(out, job=other)
    assert "config.model.prompt: 'nothing' there, 2 here" in str(error.value)
    assert "model.name" not in str(error.value)
    with pytest.raises(ConfigError, match="name: 'toy' there, 'boy' here"):
        run(out, job=Job("boy", JOB.config))


def test_changed_input_is_done_again_and_lost_input_refused(tmp_path):
    out = tmp_path / "out"
    run(out)
    changed = [*toy_job.shards("other ")[:1], *toy_job.shards()[1:]]
    assert run(out, shards=changed) == Summary(119, 1, 1, 3)
    assert len(list(jobs.read(out, Findings))) == 119
    with pytest.raises(ConfigError, match="holds 1 shards that the input does not have .toy-00003"):
        run(out, shards=toy_job.shards()[:3])


@pytest.mark.parametrize("name", ["toy-00001.jsonl", "toy-00001.bin"])
def test_flipped_bit_is_found_on_read_and_mended_as_told(tmp_path, name, undisturbed):
    out = tmp_path / "out"
    run(out)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}.*sha256.*delete the file and run the job again"):
        list(jobs.read(out, Findings, side_files=True))
    (out / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        list(jobs.read(out, Findings))
    assert run(out) == Summary(119, 1, 1, 3)
    assert contents(out) == undisturbed


def test_foreign_directories_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no job\.json here"):
        list(jobs.read(tmp_path, Findings))
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no job\.json"):
        run(tmp_path)
    out = tmp_path / "out"
    run(out)
    (out / "manifest.jsonl").write_text('{"name": "x"}\n')
    with pytest.raises(DataError, match=r"manifest\.jsonl:1: not a manifest line"):
        run(out)


def bad(shard, scratch, *, every: int):
    for item in shard.items:
        yield (
            Quarantine(f"item {item}", "is bad")
            if item % every == 0
            else Findings(example=f"item {item}", present=(), votes={}, n=0, origin="pixels")
        )


def test_too_many_quarantined_stops(tmp_path):
    shards = [ShardInput(f"s{i}", str(i), range(i * 30, i * 30 + 30)) for i in range(10)]
    with pytest.raises(DataError, match="3 of 60 items are quarantined, more than 2.0%") as error:
        run(tmp_path / "a", shards=shards, process=partial(bad, every=20))
    assert "item 0: is bad" in str(error.value)
    assert set(manifest.load(tmp_path / "a")) == {"s0"}, "the shard that stops the job is not published"
    assert run(tmp_path / "b", shards=shards, process=partial(bad, every=20), limit=0.1).quarantined == 15
    with pytest.raises(DataError, match="1 of 30 items"):  # few items are judged at the end
        run(tmp_path / "c", shards=shards[:1], process=partial(bad, every=30))


def test_failing_process_publishes_nothing_and_is_resumed(tmp_path):
    out = tmp_path / "out"

    def full(shard, scratch):
        if shard.name == "toy-00002":
            raise OSError(errno.ENOSPC, "No space left on device")
        return toy_job.process(shard, scratch)

    with pytest.raises(ConfigError, match="the disk is full .*No space left.*; make room: the same command"):
        run(out, process=full)
    assert set(manifest.load(out)) == {"toy-00000", "toy-00001"}
    assert not list(out.glob(".*.part-*"))
    assert run(out) == Summary(119, 1, 2, 2)


def test_little_room_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(ConfigError, match="10 MB are free"):
        run(tmp_path / "out")


def test_two_processes_on_one_part_are_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (
        manifest.running(out, "0/1"),
        pytest.raises(ConfigError, match="another process runs part 0/1"),
    ):
        run(out)


def test_late_items_are_loaded_for_missing_shards_only(tmp_path):
    loaded = []
    shards = [ShardInput(f"s{i}", "k", lambda i=i: loaded.append(i) or [10 * i + 1]) for i in range(3)]
    run(tmp_path, shards=shards[:2], process=partial(bad, every=100))
    run(tmp_path, shards=shards, process=partial(bad, every=100))
    assert loaded == [0, 1, 2]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no input"),
        ([ShardInput("a", "k", [1])] * 2, "not unique: ..a"),
        ([ShardInput("../a", "k", [1])], "shard name '../a'"),
        ([ShardInput("manifest", "k", [1])], "shard name 'manifest'"),
    ],
)
def test_bad_input_lists(shards, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, shards=shards)


@pytest.mark.parametrize("part", ["1/1", "0", "2/1", "a/b"])
def test_bad_parts(part, tmp_path):
    with pytest.raises(ConfigError, match="write i/n"):
        run(tmp_path, shard=part)


def test_side_files_carry_the_shards_name(tmp_path):
    def process(shard, scratch):
        (scratch / "other.bin").write_bytes(b"")
        return []

    with pytest.raises(ValueError, match="must be a plain file named toy-00000.something"):
        run(tmp_path, process=process)
