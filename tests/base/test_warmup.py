"""The vision warm-up: it learns, its head is thrown away, and the rest of the model stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from fundus_jax import training
from fundus_jax.base import warmup
from fundus_jax.data import Pool
from fundus_jax.records import DataError
from launch.stages import Trainer
from tests import small

STEPS = 60


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, training.Params]:
    """A finished stage, and the parameters it returned."""
    config = small.config(base=warmup.BaseConfig(steps=STEPS, batch=8, save_every=20, optim=small.optim()))
    trainer = small.open_run(tmp_path_factory.mktemp("warm"), small.data(tmp_path_factory), config)
    params = warmup.warm_up(
        trainer.work, trainer.start(), trainer.processor, trainer.pool, config.base, trainer.mesh
    )
    trainer.work.close()
    return trainer, params


def test_it_learns(warm: tuple[Trainer, training.Params]) -> None:
    text = (warm[0].work.path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5), "the head is zero at first"
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    assert all(0 <= line["exact"] <= 1 for line in lines)


def test_only_the_vision_tower_has_changed(warm: tuple[Trainer, training.Params]) -> None:
    trainer, params = warm
    before = training.split(trainer.start())[1]
    assert jax.tree.structure(params) == jax.tree.structure(before), "there is no head"
    for name in before.keys() - {"visual"}:
        for one, other in zip(jax.tree.leaves(params[name]), jax.tree.leaves(before[name]), strict=True):
            assert np.array_equal(one, other), name
    moved = jax.tree.map(
        lambda one, other: not np.array_equal(one, other), params["visual"], before["visual"]
    )
    assert all(jax.tree.leaves(moved)), moved


def test_the_policy_after_it_comes_from_the_bundle(warm: tuple[Trainer, training.Params]) -> None:
    trainer, params = warm
    assert trainer.work.checkpoints.steps()[-1] == STEPS
    again = training.split(trainer.after("base"))[1]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))


def test_every_image_counts_once_whatever_is_asked_about_it(warm: tuple[Trainer, training.Params]) -> None:
    pool = warm[0].pool
    assert len(pool.examples) > small.TRAIN
    assert len({example.image for example in pool.examples}) == small.TRAIN
    state = json.loads((warm[0].work.path / "checkpoints" / str(STEPS) / "bundle.json").read_text())
    names, _ = warmup.targets_of(pool.examples)
    assert state["arrays"]["params.head.weight"][1][0] == len(names)


def test_targets_are_findings_and_labels_within_their_kind_of_image(
    warm: tuple[Trainer, training.Params],
) -> None:
    example = warm[0].pool.examples[0]
    eye = replace(example, modality="UWF", eye="OD", labels=("Normal",), findings=("drusen", "large cup"))
    scan = replace(example, modality="OCT", eye="", labels=("Normal", "DME"), findings=None)
    names, table = warmup.targets_of([eye, scan])
    assert names == [
        *("OCT: DME", "OCT: Normal", "drusen", "en face: Normal", "large cup", "right eye", "wide field")
    ]
    nobody_knows = float("nan")  # nobody looked for drusen in the scan; it can not show a cup
    np.testing.assert_array_equal(table, [[0, 0, 1, 1, 1, 1, 1], [1, 1, nobody_knows, 0, 0, 0, 0]])
    partly = replace(eye, findings=("drusen",), searched=("drusen",))
    _, table = warmup.targets_of([eye, partly])
    np.testing.assert_array_equal(table[1], [1, 1, nobody_knows, 1, 1])


def test_a_stage_without_anything_to_name_is_an_error(
    warm: tuple[Trainer, training.Params], tmp_path: Path
) -> None:
    trainer = warm[0]
    bare = tuple(replace(e, labels=(), findings=None) for e in trainer.pool.examples)
    pool: Pool = replace(trainer.pool, examples=bare)
    with pytest.raises(DataError, match="no finding or label is known of any of 36 images"):
        warmup.warm_up(
            trainer.work, trainer.start(), trainer.processor, pool, trainer.config.base, trainer.mesh
        )
