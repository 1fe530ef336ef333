"""A resumed stage takes no more memory than a fresh one, and computes what an undisturbed one computes."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fundus_jax import sft
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.judge import RulesJudge
from tests import small


class KilledError(Exception):
    """Stands for the end of the process."""


class Scales:
    """In the place of an exam: weighs after each step what arrays are alive, and ends the process at step
    `kill`."""

    def __init__(self, kill: int = 0) -> None:
        self.kill, self.weights, self.before = kill, [], weigh()

    def due(self, step: int, last: int) -> bool:
        del last
        self.weights.append(weigh() - self.before)
        if step == self.kill:
            raise KilledError
        return False

    def __call__(self, model: Any) -> dict[str, float]:
        raise AssertionError("it is never due")


def weigh() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def train(path: Path, source: Path, stage: str, kill: int = 0) -> tuple[list[int], Any]:
    """Bytes that live arrays have gained after each step, and the parameters in the end. Whoever calls the
    loop holds on to the model that it starts from, as launch/stages.py does."""
    config = small.config(
        sft=dataclasses.replace(small.config().sft, save_every=1),
        grpo=dataclasses.replace(small.config().grpo, steps=3, save_every=1),
    )
    trainer = small.open_run(path, source, config)
    trainer.plan = trainer.work.stages = {stage: 3}
    model, prompt = small.bigram(trainer), config.prompt
    scales = Scales(kill)
    try:
        if stage == "sft":
            args = (trainer.rows, trainer.processor, config.sft, trainer.mesh)
            params = sft.train(trainer.work, model, *args, exam=scales)
        else:
            prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, prompt, 512)
            args = (prompts, RulesJudge(), config.grpo, trainer.mesh)
            params = grpo.train(trainer.work, model, *args, exam=scales)
    except KilledError:
        return scales.weights, None
    finally:
        trainer.work.close()
    return scales.weights, jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_weights_that_a_bundle_replaces_are_let_go(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, stage: str
) -> None:
    source = small.data(tmp_path_factory)
    whole, wanted = train(tmp_path / "whole", source, stage)
    assert len(whole) == 3
    train(tmp_path / "killed", source, stage, kill=2)
    resumed, found = train(tmp_path / "killed", source, stage)
    assert len(resumed) == 2, "it went on behind step 1: the bundle of step 2 was not yet there"
    assert resumed[0] <= whole[0], "after its first step; later ones may be saving the one before"
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, wanted, found)))
