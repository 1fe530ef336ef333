"""Adapters through the command: onto the export of another run, killed with SIGKILL in GRPO, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import command, environment, run
from tests.e2e.test_run import kill_when, metrics, seen

RANK = 4


def test_adapters_from_the_command_line(finished: Path, tmp_path: Path, cache: Path) -> None:
    workdir, env = tmp_path / "adapters", environment(cache)
    base = finished / "hf"
    fields = {"model": base, "lora.rank": RANK, "sft.steps": 4, "grpo.save_every": 1, "remat": "dots"}
    (workdir / "data").parent.mkdir()
    shutil.copytree(finished / "data", workdir / "data")
    sft = run(command(workdir, "--stage=sft", **fields), env)
    assert sft.returncode == 0, sft.stderr[-3000:]
    words = command(workdir, "--stage=grpo", **fields)
    kill_when(words, env, lambda: ("grpo", 2) in seen(workdir))
    for stage in ("grpo", "export"):
        done = run(command(workdir, f"--stage={stage}", **fields), env)
        assert done.returncode == 0, done.stderr[-3000:]
    assert [(line["stage"], line["step"]) for line in metrics(workdir)] == [
        *(("sft", step) for step in range(1, 5)), *(("grpo", step) for step in range(1, 5)),
    ]  # fmt: skip
    arrays = json.loads((workdir / "checkpoints" / "8" / "bundle.json").read_text())["arrays"]
    assert all("lora_" in name for name, (_, shape) in arrays.items() if shape)
    kept, moved = (load_file(path / "model.safetensors") for path in (base, workdir / "hf"))
    assert kept.keys() == moved.keys()
    changed = {name for name in kept if not np.array_equal(kept[name], moved[name])}
    assert changed
    assert all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in changed)
    assert json.loads((workdir / "adapter" / "adapter_config.json").read_text())["r"] == RANK
    transformers_computes_the_same(workdir / "hf", base, workdir / "adapter")


def transformers_computes_the_same(merged: Path, base: Path, adapter: Path) -> None:
    """The merged directory against the base with W + alpha / r * B A put in by hand, from the adapter."""
    torch = pytest.importorskip("torch", reason="the comparison needs torch (Python 3.11 environment)")
    from tests.models import tiny

    exported, other = (tiny.load_hf(path, attention="sdpa") for path in (merged, base))
    halves = load_file(adapter / "adapter_model.safetensors")
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / RANK
    with torch.no_grad():
        for name in {name.partition(".lora_")[0] for name in halves}:
            a, b = (torch.from_numpy(halves[f"{name}.lora_{half}.weight"]) for half in "AB")
            module = other.get_submodule(name.removeprefix("base_model.model."))
            module.weight += scale * (b @ a)
        tokens = torch.arange(3, 40)[None]
        one, two = (model(input_ids=tokens).logits for model in (exported, other))
    assert torch.allclose(one, two, atol=1e-5 * float(two.abs().max()))
