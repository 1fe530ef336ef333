"""Measured while it is trained: the best bundle is kept and found, also after a kill; nothing is trained on
the patients that are asked about."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fundus_jax import sft, stop, training
from fundus_jax.evaluation import exam as exams
from fundus_jax.evaluation.report import Outcome
from fundus_jax.grpo import stream
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.judge import RulesJudge
from fundus_jax.records import ConfigError
from launch.config import ExamConfig
from launch.stages import Trainer
from tests import small
from tests.multihost.test_two_processes import lines

EXAM = ExamConfig(every=1, part=0.3, questions=5)
STEPS = 6
SCORES = (0.2, 0.6, 0.5, 0.6, 0.1, 0.3)  # after each step: the first 0.6 is the best


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


class KilledError(Exception):
    """Stands for the end of the process."""


class Scripted:
    """Gives SCORES, and ends the process before it measures after step `kill`."""

    def __init__(self, kill: int = 0, done: int = 0) -> None:
        self.kill, self.step = kill, done

    def due(self, step: int, last: int) -> bool:
        self.step = step
        return True

    def __call__(self, model: Any) -> dict[str, float]:
        if self.step == self.kill:
            raise KilledError
        assert model.head is not None
        return {"exam/accuracy": SCORES[self.step - 1]}


def trainer_of(path: Path, source: Path, **exam: Any) -> Trainer:
    config = small.config(
        exam=dataclasses.replace(EXAM, **exam),
        sft=dataclasses.replace(small.config().sft, steps=STEPS, batch=2, save_every=1),
        grpo=dataclasses.replace(
            small.config().grpo, steps=3, prompts_per_step=2, micro_batch=4, save_every=1
        ),
    )
    trainer = small.open_run(path, source, config)
    trainer.plan = trainer.work.stages = {"sft": STEPS, "grpo": 3}
    return trainer


def train_sft(trainer: Trainer, exam: Any) -> Any:
    config = trainer.config.sft
    try:
        return sft.train(
            trainer.work,
            small.bigram(trainer),
            trainer.rows,
            trainer.processor,
            config,
            trainer.mesh,
            exam=exam,
        )
    finally:
        trainer.work.close()


def lines_of(path: Path) -> list[tuple[int, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["exam/accuracy"]) for line in lines if line["stage"] == "sft"]


def test_the_best_bundle_is_kept(source: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, source)
    train_sft(trainer, Scripted())
    assert lines_of(tmp_path) == list(enumerate(SCORES, 1))
    assert trainer.work.checkpoints.steps() == [2, 5, 6]
    again = trainer_of(tmp_path, source)
    assert again.work.best("sft") == 2
    again.work.close()


@pytest.mark.parametrize("kill", [1, 2, 3, 4, 6])
def test_the_same_best_after_a_kill(source: Path, tmp_path: Path, kill: int) -> None:
    whole = trainer_of(tmp_path / "whole", source)
    train_sft(whole, Scripted())
    with pytest.raises(KilledError):
        train_sft(trainer_of(tmp_path / "killed", source), Scripted(kill))
    again = trainer_of(tmp_path / "killed", source)
    train_sft(again, Scripted())
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    assert again.work.checkpoints.steps() == whole.work.checkpoints.steps()
    _, shapes = training.split(small.bigram(again))
    works = [trainer_of(tmp_path / name, source).work for name in ("whole", "killed")]
    found = [work.params("sft", shapes, best=True) for work in works]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), *found))
    last = works[1].params("sft", shapes)
    for work in works:
        work.close()
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), found[0], last))


def test_the_best_of_a_stage_outlives_the_next(source: Path, tmp_path: Path) -> None:
    train_sft(trainer_of(tmp_path, source), Scripted())
    trainer = trainer_of(tmp_path, source)
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    exam = trainer.exam()
    grpo.train(
        trainer.work,
        small.bigram(trainer),
        prompts,
        RulesJudge(),
        trainer.config.grpo,
        trainer.mesh,
        exam=exam,
    )
    trainer.work.close()
    work = trainer_of(tmp_path, source).work
    kept = work.checkpoints.steps()
    assert {2, 6, 9} <= set(kept)  # the best of SFT, and both last ones
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["stage"] == "grpo"]
    assert [line["exam/n"] for line in measured] == [5.0] * 3
    assert all(0 <= line["exam/accuracy"] <= 1 and line["time/exam"] > 0 for line in measured)
    best = work.best("grpo")
    work.close()
    assert best is not None
    assert STEPS + best in kept


def test_nothing_is_trained_on_whom_it_asks(source: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, source)
    trainer.work.close()
    exam = trainer.exam()
    assert exam is not None
    asked = {item.unit for item in exam.items}
    patients = {f"{one.dataset}/{one.patient}" for one in trainer.pool.examples}
    assert len(exam.items) == 5
    assert asked
    assert not asked & patients
    assert {one.split for one in trainer.held.examples} == {"train"}  # type: ignore[union-attr]
    used = {f"{one.dataset}/{one.patient}" for one, _ in trainer.rows.rows}
    used |= {f"{one.dataset}/{one.patient}" for one in trainer.grpo_pool().examples}
    assert not asked & used
    without = trainer_of(tmp_path / "none", source, every=0)
    without.work.close()
    assert without.exam() is None
    assert len(without.pool.examples) == len(trainer.pool.examples) + len(trainer.held.examples)  # type: ignore[union-attr]


def test_it_says_the_same_of_the_same_policy(source: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, source)
    trainer.work.close()
    exam = trainer.exam()
    assert exam is not None
    assert [exam.due(step, 5) for step in range(1, 6)] == [True] * 5
    model = small.bigram(trainer)
    said = exam(model)
    assert said == exam(model)
    assert said["exam/low"] <= said["exam/accuracy"] <= said["exam/high"]


def test_its_interval_takes_the_questions_of_a_patient_together(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one patient alone nothing can be resampled, however many questions there are."""
    trainer = trainer_of(tmp_path, source)
    trainer.work.close()
    exam = trainer.exam()
    assert exam is not None
    monkeypatch.setattr(
        exams,
        "outcome_of",
        lambda one: Outcome(extracted=("a",), correct=one.item.id == first, well_formed=True, claimed=None),
    )
    first, ends = exam.items[0].id, []
    for same in (False, True):
        exam.items = [dataclasses.replace(one, unit="one" if same else one.id) for one in exam.items]
        said = exam(small.bigram(trainer))
        ends.append((said["exam/low"], said["exam/high"]))
    assert ends[0][0] < 1 / len(exam.items) < ends[0][1]
    assert ends[1][0] == ends[1][1]


class Left:
    """The exam; while it is sat after step `at`, the run is asked to stop."""

    def __init__(self, exam: Any, at: int, ask: Callable[[], None]) -> None:
        self.exam, self.at, self.ask = exam, at, ask

    def due(self, step: int, last: int) -> bool:
        if step == self.at:
            self.ask()
        return self.exam.due(step, last)

    def __call__(self, model: Any) -> dict[str, float]:
        return self.exam(model)


def train(path: Path, source: Path, stage: str, left: Callable[[Any], Any] = lambda exam: exam) -> Trainer:
    """`stage` with an exam after every second step and no bundle but the last and the best."""
    trainer = trainer_of(path, source, every=2)
    trainer.plan = trainer.work.stages = {stage: STEPS - 1}
    config, mesh, policy = trainer.config, trainer.mesh, small.bigram(trainer)
    config.sft.save_every = config.grpo.save_every = 0
    exam = left(trainer.exam())
    try:
        if stage == "sft":
            sft.train(trainer.work, policy, trainer.rows, trainer.processor, config.sft, mesh, exam=exam)
        else:
            prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, config.prompt, 512)
            grpo.train(trainer.work, policy, prompts, RulesJudge(), config.grpo, mesh, exam=exam)
        trainer.work.checkpoints.wait()
        assert trainer.work.finished(stage)
    finally:
        trainer.work.close()
    return trainer


@pytest.mark.parametrize(("stage", "at"), [("sft", 2), ("sft", 4), ("sft", 5), ("grpo", 4), ("grpo", 5)])
def test_an_exam_that_is_left_is_made_up_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    decode, whole, broken = stream.decode_slots, tmp_path / "whole", tmp_path / "broken"

    def signalled(*args: Any) -> Any:
        monkeypatch.setattr(stop, "_wanted", signal.SIGTERM)
        return decode(*args)

    def ask() -> None:
        monkeypatch.setattr(stream, "decode_slots", signalled)

    for _ in range(2):  # the second time it is the one that is made up for, before any step
        with pytest.raises(stop.Stopped):
            train(broken, source, stage, lambda exam: Left(exam, at, ask))
        monkeypatch.setattr(stop, "_wanted", 0)
        work = trainer_of(broken, source, every=2).work
        work.stages = {stage: STEPS - 1}
        assert work.checkpoints.latest() == at
        assert work.metrics.past(stage)[-1]["exam/accuracy"] is None, "it is no result"
        assert not work.finished(stage)
        work.close()
    monkeypatch.setattr(stream, "decode_slots", decode)
    found, wanted = (train(path, source, stage).work for path in (broken, whole))
    assert lines(broken) == lines(whole)
    assert [line["step"] for line in lines(whole) if "exam/accuracy" in line] == [2, 4, 5]
    shapes = training.split(small.bigram(trainer_of(tmp_path / "shapes", source)))[1]
    for best in (False, True):
        ours, theirs = (work.params(stage, shapes, best=best) for work in (found, wanted))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), ours, theirs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": -1}, "exam.every is -1"),
        ({"part": 1.0}, "exam.part is 1.0"),
        ({"questions": 0}, "exam.questions is 0"),
        ({"use": "first"}, "must be last or best"),
        ({"every": 0, "use": "best"}, "set exam.every"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small.config(exam=dataclasses.replace(EXAM, **changes)).validate()
