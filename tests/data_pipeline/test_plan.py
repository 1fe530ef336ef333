"""The projection: image tokens by Qwen2.5-VL's own rule, sums by hand, no assumption without effect."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline import plan
from fundus_jax.models.qwen2_5_vl.images import smart_resize
from fundus_jax.records import ConfigError
from tests.conftest import ROOT

SMALL = {
    "images": 110, "masked": 10, "samples": 5, "sizes": ["56x56:0.5", "560x560:0.5"], "max_pixels": 10**6,
    "vote_prompt": 98, "vote_answer": 20, "labels": 2, "label_prompt": 1000, "label_answer": 100,
    "traces": 100, "rejected": 0.5, "rewrites": 2, "trace_prompt": 10, "trace_answer": 5,
    "check_prompt": 20, "check_answer": 1, "prompt_tokens_a_second": 100.0, "tokens_a_second": 10.0,
    "share": 0.5, "gpus": 2, "start_minutes": 6.0, "replicas": ["1", "4"],
}  # fmt: skip


def given(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**SMALL | changes)


def test_tokens_are_those_of_the_model() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        height, width = draw.randint(10, 5000), draw.randint(30, 2000)
        most = draw.choice([448 * 448, 1_003_520, 12_845_056])
        tall, wide = smart_resize(height, width, 28, 3136, most)
        assert plan.image_tokens(width, height, most) == tall * wide // 784, (width, height, most)
    assert plan.mean_tokens(SMALL["sizes"], 10**6) == (4 + 400) / 2
    with pytest.raises(ConfigError, match="add up to 0.8"):
        plan.mean_tokens(["56x56:0.8"], 10**6)
    with pytest.raises(ConfigError, match="'56:1'; write WIDTHxHEIGHT:SHARE"):
        plan.mean_tokens(["56:1"], 10**6)


def test_the_sums() -> None:
    found = {one.stage: (one.requests, one.prompt, one.answer) for one in plan.work(given())}
    assert found == {
        "knowledge": (2, 2000, 200),
        "findings": (100, 100 * (202 + 98), 100 * 5 * 20),
        "traces: written": (175, 1750, 875),
        "traces: checked": (175, 3500, 175),
    }
    prompts, answers = 2000 + 30_000 + 1750 + 3500, 200 + 10_000 + 875 + 175
    work = (prompts / 100 + answers / 10) / 0.5 / 3600
    assert plan.hours(plan.work(given()), given(), 1) == pytest.approx((work + 0.1, 2 * (work + 0.1)))
    assert plan.hours(plan.work(given()), given(), 4) == pytest.approx((work / 4 + 0.1, 2 * (work + 0.4)))


def test_every_assumption_is_printed_and_changes_the_tables() -> None:
    assert plan.ASSUMED.keys() == SMALL.keys()
    shown, _, tables = plan.render(given()).partition("\n| stage")
    for name, value in SMALL.items():
        assert f"`--{name}=" in shown
        others = {"sizes": ["56x56"], "replicas": ["2"], "max_pixels": 112 * 112, "share": 0.9}
        changed = plan.render(given(**{name: others.get(name, 3 * value)})).partition("\n| stage")[2]  # type: ignore[operator]
        assert changed != tables, name


def test_the_document_has_what_the_command_prints() -> None:
    defaults = SimpleNamespace(**{name: default for name, (default, _) in plan.ASSUMED.items()})
    assert plan.render(defaults) in (ROOT / "docs" / "data_jobs.md").read_text(encoding="utf-8")
