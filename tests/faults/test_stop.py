"""SIGTERM to real runs, wherever they are: they leave in time, and the next call ends as if nothing had
been."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import ROOT, environment
from tests.multihost.test_two_processes import lines
from tests.run_worker import command

IN_TIME = 25  # seconds that clouds give at least
EXAM = [f"--config.exam.{name}={value}" for name, value in {"every": 4, "part": 0.2, "questions": 5}.items()]


def stop(workdir: Path, cache: Path, point: str, number: int = signal.SIGTERM, **more: float) -> list[int]:
    """Run until it is stuck at `point`, send the signal, and return the steps of the finished bundles."""
    options = [*EXAM, *(f"--{name}={value}" for name, value in more.items())]
    log = workdir.parent / f"{point}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(workdir, point, *options), cwd=ROOT, env=environment(cache), stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 200
        while f"stuck at {point}" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"never came to {point}"
            time.sleep(0.05)
        process.send_signal(number)  # at STAGE:STEP the second SIGTERM, which changes nothing
        assert process.wait(timeout=IN_TIME) == 128 + number, log.read_text()[-3000:]
    finally:
        process.kill()
    folder = workdir / "checkpoints"
    finished = (path.parent for path in folder.glob("*/manifest.json"))
    return sorted(int(path.name) for path in finished)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def complete(workdir: Path, cache: Path) -> Path:
    """Run to the end."""
    words = command(workdir, *EXAM)
    done = subprocess.run(words, cwd=ROOT, env=environment(cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.mark.timeout(1800)  # about two minutes of processor time, which others may want too
def test_a_run_that_is_stopped_everywhere_ends_with_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    stopped, base, sft = tmp_path / "stopped", 2, 10
    assert stop(stopped, cache, "data") == []
    assert stop(stopped, cache, "compile", grace=4) == [base], "nothing was trained since: nothing to save"
    assert stop(stopped, cache, "sft:5") == [base, best := base + 4, base + 5]
    assert stop(stopped, cache, "exam") == [base, best, base + 5, base + 8], "the step that it was after"
    assert stop(stopped, cache, "next exam")[-1] == base + sft, "after that of step 8 the one after the last"
    assert stop(stopped, cache, "rollout")[-2:] == [base + sft, base + sft + 1], "the step before is saved"
    assert stop(stopped, cache, "judge", signal.SIGINT)[-1] == base + sft + 3
    assert stop(stopped, cache, "evaluate")[-1] == base + sft + 5
    complete(stopped, cache)

    whole = complete(tmp_path / "whole", cache)
    assert lines(stopped) == lines(whole)
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (stopped, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
