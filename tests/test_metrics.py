"""A killed and resumed run leaves the same metrics file; progress is told at a bearable rate."""

from __future__ import annotations

import io
import json
import logging as std_logging
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax.metrics import Metrics, Progress
from fundus_jax.records import ConfigError, DataError


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The file without the times."""
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]


def test_a_line_holds_plain_numbers(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    before = time.time()
    metrics.log("sft", np.int64(3), {"loss": jnp.float32(0.5), "tokens": np.int32(7), "lr": 1e-5, "ok": True})
    metrics.log("grpo", 0, {"kl": jnp.nan, "reward/format": float("inf")})
    assert lines(tmp_path) == [
        {"stage": "sft", "step": 3, "loss": 0.5, "tokens": 7, "lr": 1e-5, "ok": 1},
        {"stage": "grpo", "step": 0, "kl": None, "reward/format": None},
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert '"tokens": 7,' in text
    assert before - 1 <= json.loads(text.splitlines()[0])["time"] <= time.time() + 1
    metrics.close()
    assert list((tmp_path / "tb" / "sft").iterdir())
    assert list((tmp_path / "tb" / "grpo").iterdir())


@pytest.mark.parametrize(("stage", "values"), [("train", {"loss": 1.0}), ("sft", {"step": 1.0})])
def test_unknown_stage_or_reserved_name_is_refused(
    tmp_path: Path, stage: str, values: dict[str, float]
) -> None:
    metrics = Metrics(tmp_path)
    with pytest.raises(ConfigError):
        metrics.log(stage, 1, values)
    with pytest.raises(ConfigError, match="'train'"):
        metrics.rewind({"train": 3})
    metrics.close()
    assert lines(tmp_path) == []


def train(workdir: Path, start: int, end: int) -> None:
    """A stage that resumes from `start`, the step of its checkpoint, and is cut off after `end`."""
    metrics = Metrics(workdir)
    metrics.rewind({"sft": start})
    for step in range(start + 1, end + 1):
        metrics.log("sft", step, {"loss": 1 / step})
        if step % 4 == 0:
            metrics.log("evaluate", step, {"accuracy": step / 100})
    metrics.close()


def test_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for workdir in (straight, broken):
        metrics = Metrics(workdir)
        metrics.log("base", 99, {"loss": 3.0})
        metrics.close()
    train(straight, 0, 12)
    train(broken, 0, 7)
    metrics = Metrics(broken)
    metrics.rewind({"evaluate": 5})  # the stage that is not named loses nothing, and 4 stays
    assert [entry["step"] for entry in lines(broken) if entry["stage"] == "evaluate"] == [4]
    metrics.close()
    train(broken, 5, 7)
    train(broken, 5, 12)
    assert lines(broken) == lines(straight)


def test_minus_one_drops_a_stage(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    metrics = Metrics(tmp_path)
    metrics.log("base", 1, {"loss": 2.0})
    metrics.rewind({"sft": -1, "grpo": -1})
    metrics.log("sft", 0, {"loss": 1.0})
    metrics.close()
    assert [(entry["stage"], entry["step"]) for entry in lines(tmp_path)] == [("base", 1), ("sft", 0)]


def test_a_line_is_amended_in_its_place(tmp_path: Path) -> None:
    train(tmp_path, 0, 4)
    metrics = Metrics(tmp_path)
    metrics.log("grpo", 4, {"loss": 1.0})
    metrics.log("sft", 5, {"loss": 0.2, "exam": jnp.nan})
    metrics.log("grpo", 5, {"loss": 2.0})
    before = lines(tmp_path)
    metrics.amend("sft", 5, {"exam": np.float32(0.5), "n": 7})
    metrics.log("grpo", 6, {"loss": 3.0})
    metrics.close()
    wanted = {"stage": "sft", "step": 5, "loss": 0.2, "exam": 0.5, "n": 7}
    after = [wanted if line["stage"] == "sft" and line["step"] == 5 else line for line in before]
    assert lines(tmp_path) == [*after, {"stage": "grpo", "step": 6, "loss": 3.0}]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_written_last_line_is_dropped(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with caplog.at_level(std_logging.WARNING):
        metrics = Metrics(tmp_path)
    assert "half-written last line" in caplog.text
    metrics.log("sft", 3, {"loss": 9.0})
    metrics.close()
    assert [(entry["step"], entry["loss"]) for entry in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    """The disk takes a part of a line and says so; later there is room again."""

    class Full(FileIO):
        def write(self, line: Any, /) -> int:
            return super().write(line[:7])

    train(tmp_path, 0, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    metrics = Metrics(tmp_path)
    with Full(tmp_path / "metrics.jsonl", "ab") as full:
        metrics._file, usual = full, metrics._file
        with pytest.raises(OSError, match=r"no room for a whole line: .*metrics\.jsonl"):
            metrics.log("sft", 3, {"loss": 9.0})
        metrics._file = usual
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    metrics.log("sft", 3, {"loss": 9.0})
    metrics.close()
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "bad", [b"{]\n", b"3\n", b'{"stage": "sft"}\n', b'{"stage": "sft", "step": "2"}\n', b"\xff\n", b"\n"]
)
def test_damage_in_the_middle_is_not_thrown_away(tmp_path: Path, bad: bytes) -> None:
    train(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + second)
    metrics = Metrics(tmp_path)
    with pytest.raises(DataError, match="metrics.jsonl:2"):
        metrics.rewind({"sft": 1})
    metrics.log("sft", 3, {})
    metrics.close()
    assert path.read_bytes().startswith(first + bad + second), "nothing was lost"


def test_a_kill_loses_no_line(tmp_path: Path, repo_root: Path) -> None:
    program = (
        "import sys; from fundus_jax.metrics import Metrics; metrics = Metrics(sys.argv[1]); step = 0\n"
        "while True: step += 1; metrics.log('sft', step, {'loss': 0.5}); print(step, flush=True)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    Metrics(tmp_path).close()
    steps = [entry["step"] for entry in lines(tmp_path)]
    assert len(steps) >= told
    assert steps == list(range(1, len(steps) + 1))


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    metrics = Metrics(tmp_path / "run")
    metrics.log("sft", 1, {"loss": 1.0})
    metrics.rewind({"sft": 0})
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_told_what_to_forget(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.log("sft", 8, {"loss": 1.0})
    metrics.rewind({"sft": 5})
    metrics.log("sft", 6, {"loss": 1.0})
    metrics.close()
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted((tmp_path / "tb" / "sft").iterdir()):
        data = path.read_bytes()
        while data:  # a record: length (8), checksum (4), content, checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            if event.session_log.status == SessionLog.START:
                found.append(event.step)
            data = data[16 + length :]
    assert found == [6]


class Clock:
    """time.monotonic under the test's control."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_progress_logs_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr("fundus_jax.metrics.time", clock)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # not a terminal
    with caplog.at_level(std_logging.INFO, logger="absl"):
        progress = Progress(140, "sft", start=100)
        for _ in range(24):
            clock.now += 1.0
            progress.update(note="loss 0.31")
        assert caplog.messages == [
            "sft 110/140, 1.00 steps/s, 30 s left, loss 0.31",
            "sft 120/140, 1.00 steps/s, 20 s left, loss 0.31",
        ]
        progress.close()
    assert caplog.messages[-1] == "sft 124/140, 1.00 steps/s, 16 s left"
    assert Progress(5, "sft").text() == "sft 0/5, 0.00 steps/s, no step yet"


def test_progress_is_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(std_logging.INFO, logger="absl"):
        progress = Progress(3, "grpo")
        progress.update(3, note="reward 2.1")
        progress.close()
    assert "grpo" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert caplog.messages == []


def test_progress_of_other_processes_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    with caplog.at_level(std_logging.INFO, logger="absl"):
        progress = Progress(3, "grpo")
        progress.update()
        progress.close()
    assert caplog.messages == []


class StandIn:
    """The seam to wandb where it is not installed: notes what it is called with, and is no test of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **named: Any) -> StandIn:
        self.calls.append(("init", named))
        return self

    def define_metric(self, name: str, **named: Any) -> None:
        self.calls.append((name, named["step_metric"]))

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_the_calls_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", there)  # type: ignore[arg-type]
    for step in (1, 2):
        metrics = Metrics(tmp_path / "demo")
        metrics.join_wandb("fundus", {"seed": 7})
        metrics.log("grpo", step, {"kl": 0.5, "reward/total": jnp.nan, "alarm/kl": 1.0})
        metrics.close()
    begun = [named for name, named in there.calls if name == "init"]
    assert begun[0] == begun[1], "a resumed workdir goes on with the same run"
    assert {name: begun[0][name] for name in ("project", "name", "resume", "config")} == {
        "project": "fundus", "name": "demo", "resume": "allow", "config": {"seed": 7}
    }  # fmt: skip
    assert ("grpo/*", "grpo/step") in there.calls
    logged = [values for name, values in there.calls if name == "log"]
    assert logged == [{"grpo/step": step, "grpo/kl": 0.5, "grpo/alarm/kl": 1.0} for step in (1, 2)]
    assert there.calls[-1][0] == "finish"


def test_without_wandb_the_flag_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    metrics = Metrics(tmp_path)
    with pytest.raises(ConfigError, match="project 'fundus'.*pip install wandb, or leave --wandb out"):
        metrics.join_wandb("fundus", {})
    metrics.log("grpo", 1, {"kl": 0.5})
    metrics.close()
    assert len(lines(tmp_path)) == 1


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional and not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = Metrics(tmp_path)
    metrics.join_wandb("fundus", {"seed": 7})
    metrics.log("grpo", 1, {"kl": 0.5})
    metrics.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):  # a process of its own writes it
        if b"grpo/kl" in file.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file.name} does not hold what was logged")
