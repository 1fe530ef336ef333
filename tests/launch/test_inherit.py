"""Stages of another run: what is taken, what is refused; an interruption leaves nothing half done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax.files import copy_tree
from fundus_jax.records import ConfigError, DataError
from fundus_jax.workdir import Workdir
from launch.config import ExamConfig, RunConfig, as_json
from launch.inherit import JOBS, Heir
from tests import small

PLAN = {"base": 3, "sft": 3, "grpo": 2}
WEIGHT = np.arange(6.0, dtype=np.float32).reshape(2, 3)


class Place:
    """A data iterator of which only the place is wanted."""

    def __init__(self, place: int) -> None:
        self.place = place

    def get_state(self) -> dict[str, int]:
        return {"next": self.place}

    def set_state(self, state: dict[str, int]) -> None:
        self.place = state["next"]


def state(more: float = 0) -> dict[str, Any]:
    """Arrays of their own: what resumes deletes those it is given."""
    return {"params": {"weight": jnp.asarray(WEIGHT + more)}}


def open_work(path: Path, config: RunConfig) -> Workdir:
    """A workdir with the plan, and data of which only the manifests are there."""
    work = Workdir(path, as_json(config))
    work.stages = dict(PLAN)
    for job in sorted({*JOBS} - {"reviewed"}):  # that one is only where people decided something
        (path / "data" / job).mkdir(parents=True, exist_ok=True)
        (path / "data" / job / "manifest.jsonl").write_text(f'{{"name": "{job}"}}\n')
    return work


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A run that has finished base and SFT, with metrics and an evaluation."""
    work = open_work(tmp_path / "parent", small.config())
    for stage in ("base", "sft"):
        for step in range(1, PLAN[stage] + 1):
            work.metrics.log(stage, step, {"loss": 1 / step, "odd": float("nan") if step == 2 else 0.0})
        work.save(stage, PLAN[stage], state(len(stage)), Place(PLAN[stage]))
    work.close()
    for kind in ("base-greedy", "sft-greedy", "sft-sampled"):
        folder = work.path / "evaluation" / kind
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(f'"{kind}"')
    return work.path


def heir(parent: Path, config: RunConfig) -> Heir:
    """A fresh run beside it."""
    return Heir(open_work(parent.parent / "child", config), as_json(config), parent)


def changed(**fields: Any) -> RunConfig:
    """The small run with other GRPO fields, as every variant of the process reward has."""
    tiny = small.config()
    return small.config(**{"name": "child", "grpo": dataclasses.replace(tiny.grpo, process="sum"), **fields})


def metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_a_stage_is_taken_as_if_it_had_been_run_here(parent: Path) -> None:
    child = heir(parent, changed())
    assert [bool(child.take(stage)) for stage in PLAN] == [True, True, False]
    work = child.work
    assert work.finished("base")
    assert work.finished("sft")
    assert not work.finished("grpo")
    assert metrics(work.path) == metrics(parent)
    found = work.checkpoints.restore(6, state())
    assert np.array_equal(found.state["params"]["weight"], WEIGHT + 3)
    assert (found.data_state, found.counters) == ({"next": 3}, {"stage": "sft", "step": 3})
    texts = [json.loads((path / "checkpoints/6/bundle.json").read_text()) for path in (parent, work.path)]
    assert texts[0].pop("config_hash") != texts[1].pop("config_hash") == work.config_hash
    assert texts[0] == texts[1]
    assert {path.name for path in (work.path / "evaluation").iterdir()} == {"sft-greedy", "sft-sampled"}
    assert any(
        path.stat().st_nlink > 1 for path in (parent / "checkpoints/6/state").rglob("*") if path.is_file()
    )
    assert [child.take(stage) for stage in PLAN] == [{}, {}, {}]  # there already
    work.close()


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"name": "other", "stages": "sft", "max_prompt": 99}, ["base", "sft"]),
        ({"prompt": dataclasses.replace(small.config().prompt, think=False)}, ["base"]),
        ({"sft": dataclasses.replace(small.config().sft, batch=2)}, ["base"]),
        ({"compute": "bfloat16"}, ["base"]),
        ({"base": dataclasses.replace(small.config().base, seed=1)}, []),
        ({"data": dataclasses.replace(small.config().data, seed=1)}, []),
        ({"data": dataclasses.replace(small.config().data, workers=2)}, ["base", "sft"]),
        ({"data": dataclasses.replace(small.config().data, sft_part=0.5)}, ["base"]),
        ({"policy": dataclasses.replace(small.config().policy, mlp=32)}, []),
        ({"attention": "splash"}, []),
        ({"grpo": dataclasses.replace(small.config().grpo, max_new_tokens=3)}, ["base", "sft"]),
    ],
)
def test_what_a_stage_depends_on_has_to_agree(parent: Path, fields: dict[str, Any], taken: list[str]) -> None:
    child = heir(parent, changed(**fields))
    assert [stage for stage in PLAN if child.take(stage)] == taken
    child.work.close()


def test_the_best_bundle_is_taken_beside_the_last(tmp_path: Path) -> None:
    """The other run knew most in the middle of SFT: from there this one goes on, and keeps it."""
    scores, exam = {1: 0.2, 2: 0.9, 3: 0.4}, ExamConfig(every=1, use="best")
    work = open_work(tmp_path / "parent", small.config(exam=exam))
    work.save("base", PLAN["base"], state(), Place(0))
    for step, score in scores.items():
        values = {"exam/accuracy": score}
        work.metrics.log("sft", step, values)
        if work.leads("sft", step, values) or step == PLAN["sft"]:
            work.save("sft", step, state(step), Place(step))
    work.close()
    child = heir(work.path, changed(exam=exam))
    assert child.take("base")
    assert child.take("sft")
    taken = child.work
    assert taken.best("sft") == 2
    assert taken.checkpoints.steps() == [3, 5, 6]

    def weights(*, best: bool) -> np.ndarray:
        return taken.params("sft", state()["params"], best=best)["weight"]

    assert np.array_equal(weights(best=True), WEIGHT + 2)
    assert np.array_equal(weights(best=False), WEIGHT + 3)
    (taken.path / "checkpoints/6/manifest.json").rename(tmp_path / "manifest.json")  # a kill between the two
    assert not child.take("sft")
    assert taken.resume("sft", state(), Place(0))[1] == 2
    (tmp_path / "manifest.json").rename(taken.path / "checkpoints/6/manifest.json")
    _, done = taken.resume("grpo", state(), Place(0))
    assert done == 0
    for step in range(1, PLAN["grpo"] + 1):
        taken.save("grpo", step, state(), Place(step))
    taken.checkpoints.wait()
    assert np.array_equal(weights(best=True), WEIGHT + 2)
    taken.close()


def test_an_exam_in_sft_asks_as_grpo_does(tmp_path: Path) -> None:
    """What it measured with other questions, or longer answers, is not what this run would have measured."""
    exam = ExamConfig(every=1)
    work = open_work(tmp_path / "parent", small.config(exam=exam))
    for stage in ("base", "sft"):
        work.save(stage, PLAN[stage], state(), Place(0))
    work.close()
    told = small.config()
    for name, fields in {
        "longer": {"grpo": dataclasses.replace(told.grpo, max_new_tokens=told.grpo.max_new_tokens + 1)},
        "others": {"data": dataclasses.replace(told.data, probe_tasks="grading")},
    }.items():
        child = Heir(
            open_work(tmp_path / name, changed(exam=exam, **fields)),
            as_json(changed(exam=exam, **fields)),
            work.path,
        )
        assert [bool(child.take(stage)) for stage in ("base", "sft")] == [True, False], name
        child.work.close()


def test_data_with_other_boxes_in_their_traces_are_not_taken(parent: Path) -> None:
    (parent / "data" / JOBS[-1] / "summary.json").write_text("{}")
    prompt = small.config().prompt
    for name, fields, taken in (("boxes", {"boxes": 2}, False), ("plain", {"instruct": False}, True)):
        config = changed(prompt=dataclasses.replace(prompt, **fields))
        work = Workdir(parent.parent / name, as_json(config))
        assert bool(Heir(work, as_json(config), parent).take_data()) is taken, name
        work.close()


@pytest.mark.parametrize("field", ["questions", "sampled"])
def test_an_evaluation_with_other_questions_is_not_taken(parent: Path, field: str) -> None:
    evaluate = dataclasses.replace(small.config().evaluate, **{field: 3})
    child = heir(parent, changed(evaluate=evaluate))
    assert child.take("base")
    assert child.take("sft")
    assert not list((child.work.path / "evaluation").glob("*"))
    child.work.close()


def test_only_a_finished_stage_of_the_same_data_is_taken(parent: Path) -> None:
    child = heir(parent, changed())
    (parent / "checkpoints" / "6" / "manifest.json").rename(parent / "manifest.json")
    assert child.take("base")
    assert not child.take("sft")
    (parent / "manifest.json").rename(parent / "checkpoints" / "6" / "manifest.json")
    (parent / "data" / "examples" / "manifest.jsonl").write_text('{"name": "other"}\n')
    assert not child.take("sft")
    child.work.close()


def test_what_was_begun_here_goes_on_here(parent: Path) -> None:
    child = heir(parent, changed())
    child.take("base")
    child.work.save("sft", 1, state(), Place(1))
    child.work.checkpoints.wait()
    assert not child.take("sft")
    child.work.close()


def test_an_interrupted_taking_is_done_again(parent: Path) -> None:
    child = heir(parent, changed())
    child.take("base")
    half = (
        child.work.path / "checkpoints" / "6"
    )  # as a kill leaves it: no manifest, and metrics already there
    half.mkdir()
    copy_tree(parent / "checkpoints" / "6" / "state", half / "state")
    child.work.metrics.log("sft", 1, {"loss": 9.0})
    assert child.take("sft")
    assert metrics(child.work.path) == metrics(parent)
    child.work.checkpoints.restore(6, state())
    child.work.close()


def test_a_damaged_bundle_is_refused(parent: Path) -> None:
    path = parent / "checkpoints" / "3" / "bundle.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 3 '))
    child = heir(parent, changed())
    with pytest.raises(DataError, match="bundle.json"):
        child.take("base")
    assert not child.work.finished("base")
    child.work.close()


def test_data_are_linked_where_nothing_is_ever_appended(parent: Path) -> None:
    there = parent / "data"
    (there / "examples" / "train.array_record").write_bytes(b"images")
    (there / "examples" / ".lock").write_bytes(b"")
    config = changed()
    work = Workdir(parent.parent / "child", as_json(config))
    child = Heir(work, as_json(config), parent)
    assert child.take_data() == {}  # the other run's data are not finished
    (there / JOBS[-1] / "summary.json").write_text("{}")
    assert child.take_data() == {"from": str(parent)}
    ours = work.path / "data" / "examples"
    assert (ours / "train.array_record").samefile(there / "examples" / "train.array_record")
    assert not (ours / "manifest.jsonl").samefile(there / "examples" / "manifest.jsonl")
    assert not (ours / ".lock").exists()
    work.close()


def test_data_are_taken_for_other_decisions_and_not_for_none(parent: Path, tmp_path: Path) -> None:
    """The last jobs look again at what was decided; but SFT has then learned from other traces."""
    (parent / "data" / JOBS[-1] / "summary.json").write_text("{}")
    (tmp_path / "decisions").mkdir()
    tiny = small.config().data
    decided = changed(data=dataclasses.replace(tiny, decisions=str(tmp_path / "decisions")))
    child = heir(parent, decided)
    assert child.take_data() == {"from": str(parent)}
    assert child.take("sft") == {}
    (parent / "data" / "reviewed").mkdir()
    assert child.take_data() == {"from": str(parent)}
    child.work.close()
    other = Workdir(tmp_path / "other", as_json(changed()))
    assert Heir(other, as_json(changed()), parent).take_data() == {}, "ours are not reviewed"
    other.close()


def test_a_parent_that_is_no_workdir_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is no workdir"):
        heir(tmp_path / "nothing", changed())
