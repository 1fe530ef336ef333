"""Every recipe builds, is valid and says how to run it; the command line overrides fields by their types."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.records import ConfigError
from fundus_jax.workdir import differences
from launch.config import RunConfig, as_json, check_warmup, rates

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.py"))
# Set-up -> the one that it builds on, and the fields besides `name` in which it differs.
NEIGHBOURS = {
    "a_base": ("b_sft", {"stages"}),
    "b_sft": ("d_sft_grpo", {"stages"}),
    "c_grpo": ("d_sft_grpo", {"stages"}),
    "d_sft_grpo": ("f_sft_grpo_traces", {"prompt.think"}),
    "e_sft_traces": ("f_sft_grpo_traces", {"stages"}),
    "f_sft_grpo_traces": ("g_fundus_r1", {"grpo.process_weight"}),
    "h_findings_only": ("g_fundus_r1", {"grpo.process"}),
    "i_knowledge_only": ("g_fundus_r1", {"grpo.process"}),
    "j_sum": ("g_fundus_r1", {"grpo.process"}),
}
SIZES = ("3b", "7b", "phantom", "quick")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_gives_its_command(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert isinstance(config, RunConfig)
    config.validate()
    assert f"--config={path.relative_to(ROOT)}" in (module.__doc__ or "")


def setup(name: str, size: str) -> RunConfig:
    """A set-up of configs/setups."""
    return importlib.import_module(f"configs.setups.{name}").get_config(size)


@pytest.mark.parametrize("name", [*NEIGHBOURS, "g_fundus_r1"])
@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_paper_recipes_run_on_idrid_too(name: str, size: str) -> None:
    """Its 184 rows with a trace are 5 updates of SFT, its 914 prompts 57 steps of GRPO."""
    config = setup(name, size)
    steps = {"sft": config.sft.total_steps(184), "grpo": config.grpo.total_steps(914)}
    assert (config.data.dataset, steps) == ("idrid", {"sft": 5, "grpo": 57})
    check_warmup(config, steps)


@pytest.mark.parametrize("size", SIZES)
def test_a_setup_differs_from_its_neighbour_by_what_it_is_for(size: str) -> None:
    configs = {name: setup(name, size) for name in ("g_fundus_r1", *NEIGHBOURS)}
    for name, (neighbour, fields) in NEIGHBOURS.items():
        configs[name].validate()
        lines = differences(as_json(configs[neighbour]), as_json(configs[name]))
        assert {line.partition(":")[0] for line in lines} == fields | {"name"}, name
    assert len({config.name for config in configs.values()}) == 10
    stages = {name[0]: (config.stages, config.prompt.think) for name, config in configs.items()}
    both = "sft,grpo"
    assert stages == {"a": ("", False), "b": ("sft", False), "c": ("grpo", False), "d": (both, False)} | {
        "e": ("sft", True), **dict.fromkeys("fghij", (both, True)),
    }  # fmt: skip
    judged = {name[0]: (config.grpo.process_weight, config.grpo.process) for name, config in configs.items()}
    assert judged["f"][0] == 0
    assert {letter: judged[letter] for letter in "ghij"} == {
        "g": (1, "selective"), "h": (1, "findings"), "i": (1, "knowledge"), "j": (1, "sum"),
    }  # fmt: skip


def test_g_is_the_recipe_of_its_size() -> None:
    for size, recipe in (("3b", "fundus_r1_3b"), ("7b", "fundus_r1_7b"), ("phantom", "demo")):
        theirs = importlib.import_module(f"configs.{recipe}").get_config()
        lines = differences(as_json(theirs), as_json(setup("g_fundus_r1", size)))
        assert [line.partition(":")[0] for line in lines] == ["name"]
    with pytest.raises(ConfigError, match="3b, 7b, phantom, quick, not '30b'"):
        setup("h_findings_only", "30b")


def test_the_papers_recipes_train_by_epochs_and_the_others_by_steps() -> None:
    recipes = [importlib.import_module(f"configs.fundus_r1_{size}").get_config() for size in SIZES[:2]]
    recipes += [importlib.import_module("configs.fundus_r1_32b").get_config("lora")]
    for config in (*recipes, *(setup(name, size) for name in NEIGHBOURS for size in SIZES[:2])):
        assert (config.sft.steps, config.sft.epochs) == (0, 2), config.name
        assert (config.grpo.steps, config.grpo.epochs) == (0, 8), config.name
    for config in (setup("g_fundus_r1", "phantom"), setup("c_grpo", "quick")):
        assert config.grpo.steps, config.name


@pytest.mark.parametrize("stages", ["grpo,sft", "sft,sft", "evaluate", "base,sft"])
def test_stages_are_left_out_not_moved(stages: str) -> None:
    config = setup("g_fundus_r1", "phantom")
    config.stages = stages
    with pytest.raises(
        ConfigError, match=f"stages is '{stages}'; it must be one of 'sft,grpo', 'sft', 'grpo', ''"
    ):
        config.validate()
    config.stages = " sft , grpo "
    config.validate()


def test_rates_are_parsed_or_refused() -> None:
    assert rates("disease:1, modality:0.2,laterality") == {"disease": 1.0, "modality": 0.2, "laterality": 1.0}
    assert rates("") is None
    with pytest.raises(ConfigError, match="modality:x"):
        rates("modality:x")


def test_every_field_can_be_overridden() -> None:
    """ml_collections reads the type off the class: not where annotations are strings."""

    def fields(value: Any, path: str) -> list[str]:
        texts = []
        for one in dataclasses.fields(value):
            inner = getattr(value, one.name)
            texts += fields(inner, f"{path}.{one.name}") if dataclasses.is_dataclass(inner) else []
            texts += [f"{path}.{one.name}"] if isinstance(one.type, str) else []
        return texts

    assert fields(RunConfig(), "config") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.judge.kind=oracle", "judge.kind is 'oracle'"),
        (
            "--config.data.findings=guesses",
            "data.findings is 'guesses'; it must be one of masks, votes, both",
        ),
        ("--config.grpo.optim.lr=0", "optim.lr is 0"),
        ("--config.grpo.learning_rate=1", "learning_rate"),
        ("--config.lora.rank=-1", "lora.rank is -1"),
    ],
)
def test_overrides_are_typed_and_unknown_fields_fail(override: str, message: str, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "launch/run.py",
        "--config=configs/demo.py:quick",
        f"--workdir={tmp_path / 'w'}",
        override,
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert not (tmp_path / "w").exists()
