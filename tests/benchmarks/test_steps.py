"""The other benchmarks at a tiny size: both sides compute the same, and what is written. No timing."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import (
    common,
    convert,
    evaluation,
    forward,
    grpo_step,
    images,
    pipeline,
    rollout,
    sft_step,
    table,
)
from fundus_jax.records import ConfigError
from tests.benchmarks import run

ROWS = run.MODEL | {"prompts": 2, "image_side": 8, "text_tokens": 8, "text_length": 12}


def test_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    report = run.report(monkeypatch, forward, tmp_path / "out.json", **ROWS)
    assert [(row["rows"], row["result"]) for row in report["rows"]] == [
        (rows, result) for rows in ("image", "text") for result in ("logits", "logprobs")
    ]
    assert [row["shape"] for row in report["rows"][::2]] == [[2, 16 + 2 + 8], [2, 12]]
    assert all(row["difference"] < 1e-5 for row in report["rows"])


def test_sft_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    more = {"answer_tokens": 6, "remat": "block"}
    report = run.report(monkeypatch, sft_step, tmp_path / "out.json", **ROWS | more)
    assert [row["rows"] for row in report["rows"]] == ["image", "text"]
    assert all(row["difference"] < 1e-5 for row in report["rows"])
    assert report["attention"] == "xla"
    for row in report["rows"]:
        assert (row["flops"]["vision"] > 0) == (row["rows"] == "image")
        assert row["flops_per_second"].keys() == {"ours", "hf"}
        total = row["flops_per_second"]["ours"] * row["ours"]["median"]
        assert total == pytest.approx(sum(row["flops"].values()), rel=1e-3)
        assert "mfu" not in row, "a CPU's peak is not known"
    assert len({len(line) for line in table.sft_step(report)}) == 1
    assert "ViT TFLOP" in next(iter(table.sft_step(report)))


def test_grpo_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    sizes = {name: value for name, value in ROWS.items() if name != "text_length"}
    report = run.report(monkeypatch, grpo_step, tmp_path / "out.json", group=4, new_tokens=4, **sizes)
    assert [row["phase"] for row in report["rows"]] == [*grpo_step.PHASES, "step"]
    assert max(report["difference"].values()) < 1e-4
    for side in ("ours", "hf"):
        spent = {row["phase"]: row[side]["median"] for row in report["rows"]}
        assert 0 < sum(spent[phase] for phase in grpo_step.PHASES) <= spent["step"]


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    common.Image.new("RGB", (90, 70), "red").save(tmp_path / "one.png")
    sizes = {"sizes": "56x56,300x200", "count": 2}
    report = run.report(monkeypatch, images, tmp_path / "out.json", images=tmp_path, **sizes | {})
    assert [(row["pictures"], row["number"]) for row in report["rows"]] == [
        ("56x56", 2), ("300x200", 2), ("files", 1),
    ]  # fmt: skip
    assert report["rows"][0]["tokens"] == 4


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"questions": 10, "side": 90, "pixels": 56, "slots": 4, "new_tokens": 5}
    report = run.report(monkeypatch, evaluation, tmp_path / "out.json", **sizes)
    assert [row["way"] for row in report["rows"]] == ["slots", "batches"]
    for row in report["rows"]:
        assert row["questions_per_second"]["median"] > 0
        assert 0 <= row["idle"]["median"] <= 1


def test_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here = {"hf": False, "shard_mb": 1, "folder": tmp_path, "vocab": 16384}  # a table of 2 MB
    monkeypatch.setattr(convert, "apart", convert.measure)  # a process each takes a minute
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    report = run.report(monkeypatch, convert, tmp_path / "out.json", **run.MODEL | run_here)
    assert jax.config.jax_platforms == before  # pyright: ignore[reportAttributeAccessIssue]
    assert [row["task"] for row in report["rows"]] == [task for task in convert.TASKS if "transf" not in task]
    assert report["shards"] > 1
    assert report["rows"][0]["of_copy"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def sides(**more: Any) -> dict[str, Any]:
    return {"ours": lambda: None, "hf": lambda: more}


def test_turns_and_phases() -> None:
    found = common.in_turns(sides(first=1.0, second=2.0), repeats=2)
    assert found.keys() == {"ours", "hf", "hf/first", "hf/second"}
    assert found["hf/second"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert all(found[side].keys() == {"median", "least", "most", "processor"} for side in ("ours", "hf"))
    found = common.in_turns(sides(first=common.Spent(1.0, 3.0)), repeats=3)
    assert found["hf/first"] == {"median": 1.0, "least": 1.0, "most": 1.0, "processor": 3.0}


@pytest.mark.parametrize(
    ("module", "more", "message"),
    [
        (rollout, {"groups": "1,a"}, "--groups=1,a: give whole numbers from 1"),
        (rollout, {"groups": ""}, "--groups=: give whole numbers"),
        (
            rollout,
            {"image_side": 96},
            "--image_side=96: the processor makes 70 x 70 patches of such an image",
        ),
        (rollout, {"image_side": 7}, "--image_side=7: the processor makes 8 x 8"),
        (sft_step, {"answer_tokens": 200}, "--answer_tokens=200 of 128 tokens of text; take at most so many"),
        (images, {"sizes": "224"}, "--sizes: '224' is not WIDTHxHEIGHT"),
        (images, {"images": "/nowhere"}, "--images=/nowhere: nothing under it ends with"),
        (pipeline, {"sweep": "0"}, "--sweep=0: give whole numbers from 1"),
        (pipeline, {"address": "https://host/v1"}, "must begin with http://"),
    ],
)
def test_flags_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, module: Any, more: dict[str, Any], message: str
) -> None:
    model = {} if module in (images, pipeline) else run.MODEL | {"hf": False}
    args = run.arguments(monkeypatch, module, **model | more)
    with pytest.raises(ConfigError, match=re.escape(message)):
        module.run(args)


def test_an_accelerator_is_not_compared_with_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    with pytest.raises(ConfigError, match=r"JAX is on a gpu and torch .* on the CPU.*--nohf"):
        common.in_torch(None)  # type: ignore[arg-type]


def test_what_differs_is_not_compared() -> None:
    assert common.agree("x", [1.0, 2.0], [1.0, 2.002], 0.01) == pytest.approx(0.001, rel=0.01)
    for other in ([1.0, 2.1], [1.0], [1.0, np.nan]):
        with pytest.raises(RuntimeError, match="x differ by"):
            common.agree("x", [1.0, 2.0], other, 0.01)
