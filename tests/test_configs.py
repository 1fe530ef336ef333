"""Every recipe builds, is valid and says how to run it; the command line overrides fields by their types."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fundus_jax.records import ConfigError
from launch.config import RunConfig, rates

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_gives_its_command(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("")
    assert isinstance(config, RunConfig)
    config.validate()
    assert f"--config=configs/{path.name}" in (module.__doc__ or "")


def test_rates_are_parsed_or_refused() -> None:
    assert rates("disease:1, modality:0.2,laterality") == {"disease": 1.0, "modality": 0.2, "laterality": 1.0}
    assert rates("") is None
    with pytest.raises(ConfigError, match="modality:x"):
        rates("modality:x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
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
