"""One tiny run of everything, from data to export, that the tests of this folder look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    **{"data.train": 64, "data.test": 24, "data.workers": 1, "policy.width": 64, "policy.vision_width": 64},
    **{"policy.layers": 2, "policy.vision_layers": 2, "policy.mlp": 96, "policy.vision_mlp": 96, "unroll": 1},
    **{"base.steps": 4, "base.batch": 8, "base.optim.warmup": 1},
    **{"sft.steps": 40, "sft.batch": 8, "sft.optim.warmup": 2, "sft.save_every": 2},
    **{"grpo.steps": 4, "grpo.prompts_per_step": 4, "grpo.micro_batch": 16, "grpo.save_every": 2},
    **{"grpo.max_new_tokens": 24, "evaluate.before": 8, "evaluate.sampled": 8, "evaluate.batch": 24},
}


def command(workdir: Path, *more: str, **overrides: object) -> list[str]:
    """The command line of a tiny run in `workdir`."""
    fields = [f"--config.{name}={value}" for name, value in (TINY | overrides).items()]
    return [
        sys.executable,
        "launch/run.py",
        "--config=configs/demo.py:quick",
        f"--workdir={workdir}",
        *fields,
        *more,
    ]


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """One thread, so that sums have one order; `devices` CPU devices; compiled programs kept in `cache`."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    known = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1"}
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return os.environ | known | kept


def run(words: list[str], env: dict[str, str], *, timeout: int = 540) -> subprocess.CompletedProcess[str]:
    """Run a command of the project to its end."""
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The workdir of a tiny run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    done = run(command(workdir), environment(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("report.html")
    return workdir
