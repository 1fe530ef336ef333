"""SIGKILL at every point of a save: the newest step is always whole, and the end has the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fundus_jax.checkpoints import Checkpoints
from tests.faults.checkpoint_worker import FINAL, TOTAL, first_state, train_step

# point, step at which it strikes, newest finished steps that may be left
KILLS = [
    ("before Orbax commits", 3, {2}),
    ("between commit and manifest", 4, {3}),
    ("before the manifest's rename", 5, {4}),
    ("before pruning", 6, {6}),
    ("while pruning", 8, {8}),
    ("while Orbax writes", 9, {8, 9}),
]


def run(repo_root: Path, directory: Path, point: str, at: int) -> int:
    """Run the worker to its end, which may be its death; returns the exit code."""
    command = [sys.executable, "-m", "tests.faults.checkpoint_worker", str(directory), point, str(at)]
    return subprocess.run(command, cwd=repo_root, timeout=300).returncode


def test_killed_runs_end_with_the_same_bytes(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device starts faster than eight
    checkpoints = Checkpoints(tmp_path, config_hash="abc")
    for point, at, left in KILLS:
        assert run(repo_root, tmp_path, point, at) == -signal.SIGKILL, f"{point}: not killed at step {at}"
        newest = checkpoints.latest()
        assert newest in left, f"killed {point} of step {at}"
        state = checkpoints.restore(newest, jax.eval_shape(first_state)).state  # raises if it is not whole
        assert int(state["seen"]) == newest

    assert run(repo_root, tmp_path, "", 0) == 0
    assert checkpoints.steps() == [FINAL, TOTAL - 1, TOTAL]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, checkpoints.steps()))

    expected = first_state()
    for _ in range(TOTAL):
        expected = train_step(expected)
    state = checkpoints.restore(TOTAL, jax.eval_shape(first_state)).state
    assert int(state["seen"]) == TOTAL
    assert np.asarray(state["w"]).tobytes() == np.asarray(expected["w"]).tobytes()
