"""Every stage on the real IDRiD copy, at budgets that only prove that it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.e2e.conftest import environment, run


def test_idrid_to_the_export(shared_data: Path, tmp_path: Path, cache: Path) -> None:
    source = shared_data / "idrid"
    workdir = tmp_path / "idrid"
    small = {"policy.width": 64, "policy.vision_width": 64, "policy.layers": 2, "policy.vision_layers": 2}
    fields = [f"--config.{name}={value}" for name, value in ({"data.source": source} | small).items()]
    words = [
        sys.executable,
        "launch/run.py",
        "--config=configs/idrid_trial.py:quick",
        f"--workdir={workdir}",
        *fields,
    ]
    done = run(words, environment(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((workdir / "evaluation" / "summary.json").read_text())
    assert {"base", "sft", "grpo"} <= summary["stages"].keys()
    assert summary["stages"]["grpo"]["greedy"]["n"] == 20
    assert (workdir / "hf" / "model.safetensors").exists()
    manifest = [
        json.loads(line)
        for line in (workdir / "data" / "examples" / "manifest.jsonl").read_text().splitlines()
    ]
    assert sum(line["items"] for line in manifest) == 516 + 81
    assert sum(line["quarantined"] for line in manifest) == 0
