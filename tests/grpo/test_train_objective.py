"""The loop with each objective switched on: what it logs and draws, and that a resumed run is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fundus_jax import training
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.abstentions import Abstentions
from fundus_jax.grpo.config import GrpoConfig
from tests.grpo.test_train import METRICS, SMALL, run, source

__all__ = ["source"]  # the fixture

REDRAW = {f"redraw/{name}" for name in ("batches", "replaced", "left", "unused", "flat", "reward")}
# name -> changes, metrics beyond the usual ones, those of them that may not be 0
SWITCHES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "DAPO": (
        {
            **{"clip_high": 0.28, "dual_clip": 1.5, "mu": 2, "kl_coef": 0.0},
            **{"extra_draws": 2, "flat_groups": "drop", "overlong_cache": 4, "overlong_weight": 1.0},
        },
        REDRAW | {"reward/overlong", "clip_dual"},
        {"redraw/batches", "redraw/replaced", "reward/overlong"},
    ),
    "RLOO": (
        {
            **{"baseline": "leave-one-out", "scale": "none", "aggregate": "constant", "constant_norm": 1},
            **{"kl": "k1", "kl_in": "reward", "kl_clamp": 1e-6},
        },
        {"reward/kl", "kl_clamped"},
        {"reward/kl", "kl_clamped"},
    ),
    "GSPO and UADT": (
        {
            **{"ratio": "sequence", "aggregate": "sequence-mean", "mu": 2, "uncertainty": 0.5},
            **{"sampler_correction": 2.0, "sampler_ratio": "sequence"},
        },
        {"uncertainty", "uncertainty_shift", "correction", "correction_capped"},
        {"uncertainty", "uncertainty_shift", "correction"},
    ),
}


def likes(prompts: Any, index: Any, rollout: Any, judge: Any, config: GrpoConfig) -> tuple[list, list]:
    """Rewards for what is said first, in every other way for every other prompt: some groups are flat."""
    first = np.asarray(rollout.tokens)[:, :, 0]
    totals = [[float((t + i) % 3 == 0) for t in group] for group, i in zip(first, index, strict=True)]
    good = grpo.Score(answer=0.0, format=0.0, process=0.0, total=0.0)
    scores = [[replace(good, total=total) for total in group] for group in totals]
    return [[f"prompt {i}"] * config.group_size for i in index], scores


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_is_read_and_told(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, more, alive = SWITCHES[name]
    config = replace(SMALL, steps=2, **changes)
    config.validate()
    monkeypatch.setattr(grpo, "score_all", likes)
    _, _, lines = run(tmp_path, source, config)
    usual = METRICS if config.kl_coef else METRICS - {"kl"}
    optional = {"time/score", "reward/process"}
    for line in lines:
        assert line.keys() >= (usual | more) - optional, (usual | more) - line.keys()
        assert line["grad_norm"] > 0
        assert not more.isdisjoint(line)
    for metric in alive:
        assert any(line[metric] != 0 for line in lines), f"{metric} is 0: the switch did nothing"
    told = {metric for line in lines for metric in line} - {"step", "stage", "time"}
    others = set().union(*(switch[1] for switch in SWITCHES.values())) - more
    assert told.isdisjoint(others), "what is off is not reported"


def test_a_resumed_run_draws_what_an_undisturbed_one_does(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamic sampling the number of prompts that a step takes depends on their answers."""
    monkeypatch.setattr(grpo, "score_all", likes)
    config = replace(SMALL, steps=4, save_every=2, extra_draws=2, kl_coef=0.0)
    _, straight, lines = run(tmp_path / "straight", source, config)
    assert sum(line["redraw/batches"] for line in lines[:2]) >= 1, "the iterator is where it would not be"
    assert sum(line["redraw/replaced"] for line in lines[2:]) >= 1

    check = training.check_finite

    def dies(values: Any, optim: Any, stage: str, step: int) -> None:
        check(values, optim, stage, step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "check_finite", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", source, config)
    _, resumed, again = run(tmp_path / "cut", source, config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, straight, resumed)))
    timeless = [{k: v for k, v in line.items() if not k.startswith(("time", "compiles"))} for line in lines]
    assert [
        {k: v for k, v in line.items() if not k.startswith(("time", "compiles"))} for line in again
    ] == timeless
    for step in ("000002", "000004"):
        one, two = (tmp_path / name / "rollouts" / f"{step}.jsonl" for name in ("straight", "cut"))
        assert one.read_text() == two.read_text()


def test_no_group_without_variance_is_left_where_draws_suffice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "score_all", likes)
    _, _, plain = run(tmp_path / "plain", source, replace(SMALL, steps=1, kl_coef=0.0))
    _, _, filled = run(tmp_path / "filled", source, replace(SMALL, steps=1, kl_coef=0.0, extra_draws=8))
    assert plain[0]["zero_variance"] > 0
    assert filled[0]["zero_variance"] == 0
    assert filled[0]["sampler/fills"] == 1 + filled[0]["redraw/batches"]
    assert filled[0]["sampler_gap"] < 1e-4, "rollouts and prompts were put together row by row"


def test_the_schedule_ends_with_the_updates_and_redrawn_prompts_count_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may have several updates, and a judge that fails on prompts drawn in vain fails too."""
    totals, counted = [], []
    make, add = training.make_optimizer, Abstentions.add

    def maker(optim: Any, total: int) -> Any:
        totals.append(total)
        return make(optim, total)

    def counts(self: Abstentions, scores: Any) -> dict[str, float]:
        counted.append(len(scores))
        return add(self, scores)

    monkeypatch.setattr(grpo, "score_all", likes)
    monkeypatch.setattr(training, "make_optimizer", maker)
    monkeypatch.setattr(Abstentions, "add", counts)
    config = replace(SMALL, steps=2, extra_draws=2, kl_coef=0.0, mu=2)
    _, _, lines = run(tmp_path, source, config)
    assert totals == [4]
    drawn = [config.prompts_per_step * (1 + line["redraw/batches"]) for line in lines]
    assert counted == drawn
    assert max(counted) > config.prompts_per_step
