"""The rollout benchmark at a tiny size: what it writes, and that its bytes are counted right. No timing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from absl import flags
from flax import nnx

from benchmarks import rollout
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL

SIZES = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 96, "vocab": 512}
SIZES |= {"prompts": 2, "prompt_tokens": 8, "new_tokens": 4}


def arguments(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """The parsed flags of the command."""
    values = flags.FlagValues()
    for kind in ("string", "enum", "bool", "list", "integer"):
        original = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(
            flags, f"DEFINE_{kind}", lambda *a, _define=original, **k: _define(*a, flag_values=values, **k)
        )
    rollout.define_flags()
    values(["rollout", *(f"--{name}={value}" for name, value in (SIZES | more).items())])
    monkeypatch.setattr(flags, "FLAGS", values)
    return values


@pytest.mark.parametrize("reference", [True, False])
def test_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reference: bool
) -> None:
    if reference:
        pytest.importorskip("torch")
    out = tmp_path / "out.json"
    arguments(monkeypatch, groups="1,3" if reference else "2", hf=reference, out=out)
    rollout.main(["rollout"])
    report = json.loads(out.read_text())
    assert report["settings"].items() >= SIZES.items()
    assert report["bandwidth"]["gb_per_second"] > 0
    assert report["versions"].keys() >= {"jax"} | ({"torch", "transformers"} if reference else set())
    assert [row["group_size"] for row in report["rows"]] == ([1, 3] if reference else [2])
    for row in report["rows"]:
        assert row["ours"]["tokens_per_second"] * row["ours"]["seconds"] == pytest.approx(
            2 * 4 * row["group_size"]
        )
        assert row["bound_ms"] == pytest.approx(
            sum(row["step_bytes"].values()) / report["bandwidth"]["gb_per_second"] / 1e6
        )
        assert ("hf" in row) == ("ratio" in row) == reference
    assert len(capsys.readouterr().out.splitlines()) == len(report["rows"]) + 3


def test_the_bytes_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(monkeypatch, dtype="bfloat16")
    model = nnx.eval_shape(
        lambda: Qwen2_5_VL(rollout.make_config(args), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    )
    attention = 64 * 64 * 2 + 64 * 32 * 2 + 64 + 32 * 2
    weights = 512 * 64 + 64 + 2 * (attention + 3 * 64 * 96 + 2 * 64)
    token = 2 * 2 * 32 * 2  # keys and values, layers, K x C, bytes
    assert rollout.step_bytes(model, args, 5) == {
        "weights": 2 * weights,
        "prompts": 2 * 8 * token,
        "rollouts": 2 * 5 * 2 * token,
    }
