"""The rollout benchmark at a tiny size: what it writes, and that its bytes are counted right. No timing."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import common, rollout
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from tests.benchmarks import run

SIZES = run.MODEL | {"prompts": 2, "text_tokens": 8, "new_tokens": 4}


@pytest.mark.parametrize("side", [0, 8])
def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    pytest.importorskip("torch")
    report = run.report(monkeypatch, rollout, tmp_path / "out.json", groups="1,3", image_side=side, **SIZES)
    assert report["bandwidth"]["gb_per_second"] > 0
    assert report["versions"].keys() >= {"jax", "torch", "transformers"}
    assert report["difference"] < 1e-5
    assert [row["group_size"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        made = row["ours"]["tokens_per_second"] * row["ours"]["seconds"]["median"]
        assert made == pytest.approx(2 * 4 * row["group_size"], rel=1e-3)
        bound = sum(row["step_bytes"].values()) / report["bandwidth"]["gb_per_second"] / 1e6
        assert row["bound_ms"] == pytest.approx(bound, rel=1e-3)
        token = 2 * 2 * 32 * 4  # keys and values, layers, K x C, bytes
        prompt = 8 + (16 + 2 if side else 0)  # the question; an image of 8 x 8 patches, and its marks
        assert row["step_bytes"]["prompts"] == 2 * prompt * token
        for one in ("ours", "hf"):  # of the same call as the seconds beside it, on at most all cores
            assert (
                0 < row[one]["seconds"]["processor"] < (os.cpu_count() or 1) * row[one]["seconds"]["most"] + 1
            )
        assert row["hf"].keys() == row["ours"].keys()


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run.report(
        monkeypatch, rollout, tmp_path / "out.json", groups="2", image_side=0, hf=False, **SIZES
    )
    assert [row.keys() & {"ours", "hf", "ratio"} for row in report["rows"]] == [{"ours"}]


def test_the_bytes_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run.arguments(monkeypatch, rollout, dtype="bfloat16", **SIZES)
    model = nnx.eval_shape(lambda: Qwen2_5_VL(common.make_config(args), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    attention = 64 * 64 * 2 + 64 * 32 * 2 + 64 + 32 * 2
    weights = 512 * 64 + 64 + 2 * (attention + 3 * 64 * 96 + 2 * 64)
    token = 2 * 2 * 32 * 2  # keys and values, layers, K x C, bytes
    assert rollout.step_bytes(model, args, 16 + 2 + 8, 5) == {
        "weights": 2 * weights,
        "prompts": 2 * 26 * token,
        "rollouts": 2 * 5 * 2 * token,
    }
