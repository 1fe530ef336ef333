"""A disk that is really full, at many moments of a job: it stops, says so, and goes on when there is room."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.full_disk import MOMENTS


def mounted(folder: Path, command: str, repo_root: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where `folder` is a disk of 2 MB, in a user namespace of its own."""
    mount = f"mount -t tmpfs -o size=2m none {shlex.quote(str(folder))}"
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{mount} && exec {command}"]
    return subprocess.run(words, cwd=repo_root, capture_output=True, text=True, timeout=300)


def test_the_job_stops_and_resumes(tmp_path: Path, repo_root: Path) -> None:
    if mounted(tmp_path, "true", repo_root).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    program = shlex.join([sys.executable, "-m", "tests.faults.full_disk", str(tmp_path)])
    done = mounted(tmp_path, program, repo_root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(MOMENTS), "it did not stop each time"
