"""SFT and GRPO with adapters, in miniature: from one Hugging Face directory to another, resumed in between.

The policy is random, so rewards are whims; what is tested is which arrays live where.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fundus_jax import training
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.rollout import generate
from fundus_jax.grpo.update import make_score
from fundus_jax.models import load_pretrained, lora, save_pretrained
from fundus_jax.models.lora import LoraConfig
from fundus_jax.records import ConfigError
from launch import stages
from launch.config import RunConfig
from tests import small

LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory of a policy in which everything depends on everything."""
    place = tmp_path_factory.mktemp("base")
    trainer = small.open_run(place / "run", source, small.config())
    return save_pretrained(small.stir(trainer.start()), trainer.processor, place / "hf")


def config(base: Path, **changes: Any) -> RunConfig:
    tiny = small.config()
    stages_of = {
        "sft": replace(tiny.sft, steps=1, max_length=384),
        "grpo": replace(tiny.grpo, steps=3, save_every=1, max_new_tokens=4),
    }
    return small.config(**{"model": str(base), "lora": LORA, **stages_of, **changes})


def whims(prompts: Any, index: Any, rollout: Any, judge: Any, config: GrpoConfig) -> tuple[list, list]:
    """Scores that reward every other rollout of a group."""
    none = grpo.Score(answer=0.0, format=0.0, process=0.0, total=0.0)
    group = [replace(none, answer=float(g % 2), total=float(g % 2)) for g in range(config.group_size)]
    return [["text"] * config.group_size for _ in index], [group for _ in index]


def run(trainer: stages.Trainer) -> None:
    try:
        for stage in trainer.plan:
            trainer.run(stage)
    finally:
        trainer.work.close()


@pytest.fixture(scope="module")
def done(source: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> stages.Trainer:
    """A run that was never interrupted."""
    trainer = small.open_run(tmp_path_factory.mktemp("whole") / "run", source, config(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "score_all", whims)
        run(trainer)
    return trainer


def lines(trainer: stages.Trainer) -> list[dict]:
    """metrics.jsonl without what a clock wrote, and a compiler."""
    found = [json.loads(line) for line in (trainer.work.path / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith(("time/", "compiles"))}
        for line in found
    ]


def arrays(trainer: stages.Trainer, step: int) -> dict[str, Any]:
    return json.loads((trainer.work.path / "checkpoints" / str(step) / "bundle.json").read_text())["arrays"]


def test_bundles_hold_adapters_and_their_moments_only(done: stages.Trainer) -> None:
    for step in (1, 4):
        held = arrays(done, step)
        owned = [name for name, (_, shape) in held.items() if shape]
        assert len(owned) >= 2 * 14
        assert all("lora_" in name for name in owned)
        assert {kind for name, (kind, shape) in held.items() if shape} == {"float32"}
    assert [line["stage"] for line in lines(done)] == ["sft", "grpo", "grpo", "grpo"]
    assert all(line["grad_norm"] > 0 for line in lines(done))


def test_the_reference_is_what_the_stage_started_from(done: stages.Trainer) -> None:
    """SFT's adapters, not the base: these have moved, and the KL to them starts at the rounding of two
    programs."""
    kl = [line["kl"] for line in lines(done) if line["stage"] == "grpo"]
    assert 0 <= kl[0] < 1e-10
    assert kl[2] > 1e-7


def test_fresh_adapters_are_the_base_exactly(done: stages.Trainer, base: Path) -> None:
    """Without SFT before it the reference is the weights with the adapters off, to the last bit."""
    plain, _ = load_pretrained(base)
    adapted, processor = load_pretrained(base)
    lora.attach(adapted, LORA)
    prompts = grpo.Prompts(done.grpo_pool(), processor, done.config.prompt, 512)
    _, batch = prompts.build(np.arange(2))
    tokens = generate(plain, batch, max_new_tokens=4, group_size=2).tokens
    logprobs = []
    for model in (plain, adapted):
        skeleton, params = training.split(model)
        params, frozen = skeleton.divide(params)
        score = make_score(skeleton.merge, done.config.grpo, "float32")
        logprobs.append(np.asarray(score(params, batch, tokens, frozen)))
    assert np.array_equal(*logprobs)


def test_resumed_from_its_bundle_it_ends_with_the_same_bits(
    done: stages.Trainer, source: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill after GRPO's second bundle leaves: all but the last one, and a line of the third step."""
    work = tmp_path / "run"
    shutil.copytree(done.work.path, work, symlinks=True, ignore=shutil.ignore_patterns("4", "hf", "adapter"))
    again = small.open_run(work, source, config(base))
    assert again.work.checkpoints.steps() == [1, 3]
    assert len(lines(again)) == 4
    calls = []
    monkeypatch.setattr(grpo, "score_all", lambda *args: calls.append(args) or whims(*args))
    run(again)
    assert len(calls) == 1, "one step was left to do"
    assert lines(again) == lines(done)
    assert arrays(again, 4) == arrays(done, 4)
    ours, theirs = (training.split(trainer.after("grpo"))[1] for trainer in (again, done))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def test_the_export_is_the_policy_without_adapters(done: stages.Trainer, base: Path) -> None:
    directory = stages.export(done.work, done)
    model, processor = load_pretrained(directory)
    assert not lora.adapted(model)
    policy = done.after("grpo")
    assert len(lora.adapted(policy)) == 7
    prompts = grpo.Prompts(done.grpo_pool(), processor, done.config.prompt, 512)
    _, batch = prompts.build(np.arange(2))
    start, _ = load_pretrained(base)
    one, other, before = (jax.jit(lambda model: model(batch))(m) for m in (model, policy, start))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))
    assert np.abs(np.asarray(one) - before).max() > 1e-3, "it has learned something"
    kept, moved = (load_file(path / "model.safetensors") for path in (base, directory))
    changed = {name for name in kept if not np.array_equal(kept[name], moved[name])}
    layers = [name for name in kept if name.startswith("model.layers.") and name.endswith("_proj.weight")]
    assert changed == set(layers)
    assert (done.work.path / "adapter" / "adapter_config.json").exists()
    settings = json.loads((done.work.path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (LORA.rank, LORA.alpha)
    assert settings["base_model_name_or_path"] == str(base)


def test_a_frozen_part_comes_from_the_start(source: Path, base: Path, tmp_path: Path) -> None:
    """Vision and projector frozen, in bfloat16: the bundle lacks them, the policy has them in full."""
    frozen = config(base, lora=LoraConfig(), freeze="vision, projector", compute="bfloat16")
    frozen.grpo = replace(frozen.grpo, steps=1, kl_coef=0.0)
    trainer = small.open_run(tmp_path / "run", source, frozen)
    trainer.run("sft")
    trainer.work.close()
    assert not [name for name in arrays(trainer, 1) if "visual" in name]
    policy, start = (training.split(model)[1] for model in (trainer.after("sft"), trainer.start()))
    assert jax.tree.all(jax.tree.map(np.array_equal, policy["visual"], start["visual"]))
    moved = jax.tree.map(lambda one, two: not np.array_equal(one, two), policy["text"], start["text"])
    assert all(jax.tree.leaves(moved)), moved
    assert {leaf.dtype.name for leaf in jax.tree.leaves(policy)} == {"float32"}
    given = trainer.before("grpo")
    kinds = jax.tree.map(lambda leaf: leaf.dtype.name, training.split(given)[1])
    assert set(jax.tree.leaves(kinds["visual"])) == {"bfloat16"}
    assert set(jax.tree.leaves(kinds["text"])) == {"float32"}


def test_another_choice_is_refused_by_name(done: stages.Trainer, source: Path, base: Path) -> None:
    for changes, message in (
        ({"lora": replace(LORA, rank=4)}, "lora.rank: 2 there, 4 here"),
        ({"lora": LoraConfig(), "freeze": "vision"}, "freeze: '' there, 'vision' here"),
    ):
        with pytest.raises(ConfigError, match=message):
            small.open_run(done.work.path, source, config(base, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "vision", "lora": LORA}, "adapters freeze everything else already; clear one"),
        ({"remat": "all"}, "remat is 'all'; it must be one of block, attention, dots, none"),
        ({"lora": LoraConfig(rank=-2)}, "lora.rank is -2"),
    ],
)
def test_settings_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.config(**changes).validate()
