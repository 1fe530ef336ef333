"""A training loop of ten steps that kills itself at a named point; started by test_checkpoint_kill.py.

Arguments: directory, name of the point ("" for none), the step at which to die.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fundus_jax import files
from fundus_jax.checkpoints import Checkpoints

TOTAL, FINAL, KEEP = 10, 2, 2


def first_state() -> dict[str, jax.Array]:
    """The state before step 1."""
    return {"w": jnp.linspace(0.0, 1.0, 50_000), "seen": jnp.int32(0)}


@jax.jit
def train_step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Something that gives other bits if a step is left out or repeated."""
    seen = state["seen"] + 1
    return {"w": state["w"] * 1.25 + jnp.float32(0.1) * seen, "seen": seen}


def arm(point: str) -> None:
    """Replace the function at `point` by one that kills this process."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_rename(source: Any, target: Any) -> None:
        (die if Path(target).name == files.MANIFEST else rename)(source, target)

    def half_deletion(path: Path) -> None:
        next(entry for entry in sorted(path.rglob("*")) if entry.is_file()).unlink()
        die()

    rename = os.replace
    places = {
        "before Orbax commits": (ocp.PyTreeCheckpointHandler, "finalize", die),
        "between commit and manifest": (files, "write_manifest", die),
        "before the manifest's rename": (os, "replace", half_rename),
        "before pruning": (Checkpoints, "_prune", die),
        "while pruning": (shutil, "rmtree", half_deletion),
    }
    if point in places:
        setattr(*places[point])


def main(directory: str, point: str, at: int) -> None:
    """Resume, train, save every step, die at `at`."""
    checkpoints = Checkpoints(directory, config_hash="abc", keep=KEEP)
    state, done = first_state(), checkpoints.latest() or 0
    if done:
        bundle = checkpoints.restore(done, jax.eval_shape(first_state))
        state = bundle.state
        assert bundle.data_state == {"next": done}
    for step in range(done + 1, TOTAL + 1):
        state = train_step(state)
        if step == at:
            checkpoints.wait()
            arm(point)
        checkpoints.save(step, state, data_state={"next": step}, counters={}, final=step == FINAL)
        if step == at and point == "while Orbax writes":
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
