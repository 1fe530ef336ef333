"""The directory of a run: refusals that name fields, stages on one line of time, and resuming after every
step."""

from __future__ import annotations

import errno
import json
import logging
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import hosts, workdir
from fundus_jax.data import batches
from fundus_jax.records import ConfigError, DataError
from fundus_jax.workdir import BEST_BY, BusyError, Workdir, differences

CONFIG = {"name": "run", "sft": {"steps": 5, "optim": {"lr": 1e-3}}, "tags": ["a", "b"]}
STAGES = {"sft": 5, "grpo": 4}


class KilledError(Exception):
    """Stands for the end of the process."""


def open_work(path: Path) -> Workdir:
    work = Workdir(path, CONFIG)
    work.stages = dict(STAGES)
    return work


def train(work: Workdir, stage: str, params: Any, kill_after: tuple[str, int] = ("", 0)) -> Any:
    """A loop of the form that all stages have: the weights depend on every batch and on their order."""
    iterator = batches(11, 2, lambda index: index, seed=1)
    state, done = work.resume(stage, {"params": params, "count": jnp.int32(0)}, iterator)
    assert int(state["count"]) == done
    for step in range(done + 1, work.stages[stage] + 1):
        total = float(next(iterator).sum())
        state = {"params": {"w": state["params"]["w"] * 1.5 + total}, "count": state["count"] + 1}
        work.metrics.log(stage, step, {"total": total})
        if step % 2 == 0 or step == work.stages[stage]:
            work.save(stage, step, state, iterator)
        if (stage, step) == kill_after:
            work.close()
            raise KilledError
    work.checkpoints.wait()
    return state["params"]


def run(path: Path, kill_after: tuple[str, int] = ("", 0)) -> tuple[np.ndarray, list[str]]:
    """Both stages; final weights and the metrics without their times."""
    work = open_work(path)
    shape = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    params: Any = {"w": jnp.arange(3.0)}
    for stage in STAGES:
        params = work.params(stage, shape) if work.finished(stage) else train(work, stage, params, kill_after)
    work.close()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return np.asarray(params["w"]), [json.dumps({**line, "time": 0}) for line in lines]


@pytest.mark.parametrize(
    "stop", [(stage, step) for stage, steps in STAGES.items() for step in range(1, steps + 1)]
)
def test_a_run_stopped_after_any_step_ends_as_an_undisturbed_one(
    tmp_path: Path, stop: tuple[str, int]
) -> None:
    weights, lines = run(tmp_path / "undisturbed")
    assert len(lines) == 9
    with pytest.raises(KilledError):
        run(tmp_path / "stopped", stop)
    again, lines_again = run(tmp_path / "stopped")
    assert again.tobytes() == weights.tobytes()
    assert lines_again == lines
    steps = open_work(tmp_path / "stopped").checkpoints.steps()
    assert steps == open_work(tmp_path / "undisturbed").checkpoints.steps() == [5, 7, 9]


def test_stages_lie_on_one_line_of_time(tmp_path: Path) -> None:
    work = open_work(tmp_path)
    assert (work.offset("sft"), work.offset("grpo")) == (0, 5)
    train(work, "sft", {"w": jnp.zeros(3)})
    assert work.finished("sft")
    assert not work.finished("grpo")
    bundle = json.loads((tmp_path / "checkpoints" / "5" / "bundle.json").read_text())
    assert bundle["counters"] == {"stage": "sft", "step": 5}
    assert (
        bundle["config_hash"]
        == json.loads((tmp_path / "config.json").read_text())["hash"]
        == work.config_hash
    )


def test_a_half_done_stage_is_not_finished_and_has_no_parameters(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(work := open_work(tmp_path), "sft", {"w": jnp.zeros(3)}, ("sft", 4))
    assert work.checkpoints.steps() == [2, 4]
    assert not work.finished("sft")
    with pytest.raises(DataError, match="5 is not a finished bundle; finished steps are"):
        work.params("sft", {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_resuming_drops_what_later_stages_measured(tmp_path: Path) -> None:
    work = open_work(tmp_path)
    work.metrics.log("base", 1, {"loss": 1.0})
    for stage in STAGES:
        work.metrics.log(stage, 1, {"loss": 1.0})
    work.resume("sft", {"w": jnp.zeros(3)}, batches(11, 2, lambda index: index, seed=1))
    work.close()
    kept = [json.loads(line)["stage"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == ["base"]


def test_of_an_exam_that_is_owed_one_number_is_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = open_work(tmp_path)
    for stage, accuracy in (("sft", math.nan), ("grpo", 0.5)):
        work.metrics.log(stage, 1, {BEST_BY: accuracy})
    monkeypatch.setattr(hosts, "gather", lambda value: pytest.fail(f"{value} goes to all"))
    assert [work.owes(stage) for stage in ("sft", "grpo", "base")] == [True, False, False]


def test_a_step_that_is_there_is_not_saved_again(tmp_path: Path) -> None:
    work, iterator = open_work(tmp_path), batches(11, 2, lambda index: index, seed=1)
    for value in (1.0, 2.0):
        work.save("sft", 2, {"params": {"w": jnp.full(3, value)}}, iterator)
        work.checkpoints.wait()
    work.close()
    restored = open_work(tmp_path).checkpoints.restore(2, {"params": {"w": jnp.zeros(3)}})
    assert np.asarray(restored.state["params"]["w"]).tolist() == [1.0, 1.0, 1.0]


def test_the_same_configuration_goes_on(tmp_path: Path) -> None:
    first = Workdir(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    second = Workdir(tmp_path, json.loads(json.dumps(CONFIG)) | {"tags": ("a", "b")})
    assert second.config_hash == first.config_hash
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"steps": 6, "optim": {"lr": 1e-3}}}, r"\(sft\.steps: 5 there, 6 here\)"),
        ({"sft": {"steps": 5, "optim": {"lr": 0.1}}}, r"\(sft\.optim\.lr: 0\.001 there, 0\.1 here\)"),
        ({"new": 1}, r"\(new: 'nothing' there, 1 here\)"),
        (
            {"name": "other", "tags": []},
            r"\(name: 'run' there, 'other' here; tags: \['a', 'b'\] there, \[\] here\)",
        ),
    ],
)
def test_another_configuration_is_refused_naming_the_fields(
    tmp_path: Path, changes: dict, message: str
) -> None:
    Workdir(tmp_path, CONFIG).close()
    with pytest.raises(ConfigError, match=message + "; go on with that one, or choose another --workdir"):
        Workdir(tmp_path, CONFIG | changes)
    assert Workdir(tmp_path, CONFIG).config_hash, "the refused one has changed nothing"


def test_a_number_written_otherwise_is_the_same_configuration(tmp_path: Path) -> None:
    """A recipe says 2 epochs and a command line 2.0: what was saved under the one is read under the other."""
    work = open_work(tmp_path)
    work.save("sft", 2, {"params": {"w": jnp.ones(3)}}, batches(11, 2, lambda index: index, seed=1))
    work.close()
    again = Workdir(tmp_path, json.loads(json.dumps(CONFIG).replace('"steps": 5', '"steps": 5.0')))
    assert again.config_hash == work.config_hash
    assert (
        again.checkpoints.restore(2, {"params": {"w": jnp.zeros(3)}}).state["params"]["w"].tolist()
        == [1.0] * 3
    )
    again.close()


def test_a_bucket_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--workdir=gs://bucket/run is no path here: mount the bucket"):
        Workdir("gs://bucket/run", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_not_be_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"--workdir={path} can not be made or written to"):
            Workdir(path, CONFIG)


HOLDER = """import sys; from pathlib import Path; from fundus_jax import workdir
held = workdir.lock(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()"""


def test_two_runs_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves is waited for; one that stays is named; one that was killed holds nothing."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(workdir, "PATIENCE", 0)
            with pytest.raises(
                BusyError, match=f"another run writes to {tmp_path}: stop that one, or choose"
            ):
                Workdir(tmp_path, CONFIG)
        assert not (tmp_path / "config.json").exists()
        threading.Timer(0.5, other.kill).start()
        Workdir(tmp_path, CONFIG).close()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir.fcntl, "lockf", none)
    with caplog.at_level(logging.WARNING):
        Workdir(tmp_path, CONFIG).close()
    assert f"{tmp_path} can not be locked ([Errno {errno.ENOLCK}] No locks available)" in caplog.text


def test_differences_are_named_by_their_path() -> None:
    assert differences(CONFIG, CONFIG) == []
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == [
        "a.b: 1 there, 'nothing' here",
        "a.c: 'nothing' there, 1 here",
    ]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} there, 2 here"]
