"""What the entry prepares before jax sees a device, and how it ends where something has to be changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from jaxlib import xla_client

from configs import demo
from fundus_jax import hosts
from fundus_jax.chat import LostError
from fundus_jax.records import ConfigError, DataError
from launch import distributed, planning, run
from launch.config import model_config, unknown_field


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is said about a GPU's memory."""
    for name in run.MEMORY_FLAGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # restored afterwards, whatever is set meanwhile
    return monkeypatch


def test_a_gpu_gives_what_is_planned_with(environment: pytest.MonkeyPatch) -> None:
    """Before the devices are asked for; jaxlib reads it."""
    read: dict[str, Any] = {}

    def initialise(*_: Any) -> None:
        read.update(xla_client.generate_pjrt_gpu_plugin_options())
        raise ConfigError("far enough")

    environment.setattr(distributed, "initialise", initialise)
    environment.setattr(flags.FLAGS["config"], "value", demo.get_config(""))
    with pytest.raises(SystemExit):
        run.main(["run"])
    assert planning.USABLE < read["memory_fraction"] < 1


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("XLA_CLIENT_MEM_FRACTION", "0.4", {"memory_fraction": 0.4}),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5", {"memory_fraction": 0.5}),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform", {"allocator": "platform"}),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", {"preallocate": False}),
    ],
)
def test_what_the_user_says_of_it_holds(
    environment: pytest.MonkeyPatch, name: str, value: str, wanted: dict[str, Any]
) -> None:
    given = {name: value}
    run.claim_memory(given)
    assert given == {name: value}
    environment.setenv(name, value)
    found = xla_client.generate_pjrt_gpu_plugin_options()
    assert {key: found.get(key) for key in wanted} == wanted
    assert ("memory_fraction" in found) == ("memory_fraction" in wanted)


ABSENT = "ConfigError: --config: [Errno 2] No such file or directory: 'configs/nope.py'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.py", "--config=configs/nope.py"], ABSENT),
        (["compile.py", "--config=configs/nope.py", "--config.unroll=1", "--topology=v5e-4"], ABSENT),
        (["run.py", "--config=configs/demo.py:quick", "--config.sft.batch=x"], "sft.batch"),
        (["run.py", "--config=configs/demo.py:quick", "--config.sft.bach=1"], "the nearest is sft.batch"),
        (["run.py"], "--config is missing"),
        (["compile.py", "--topology=v5e-4"], "--config and --topology are needed"),
        (
            ["compile.py", "--config=configs/demo.py", "--topology=v5e-3"],
            "no slice of 3 v5e chips",
        ),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_short(
    words: list[str], message: str, repo_root: Path
) -> None:
    line = [sys.executable, f"launch/{words[0]}", *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(line, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=300)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == hosts.REFUSED


def test_a_refusal_and_a_stop_have_exit_codes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (ConfigError, DataError):
        with pytest.raises(SystemExit) as ended, run.ending():
            raise kind("change this")
        assert ended.value.code == 78
        assert capsys.readouterr().err == f"{kind.__name__}: change this\n"
    with pytest.raises(KeyError), run.ending():  # what may pass goes on, and Python exits with 1
        raise KeyError


def test_a_server_that_stays_away_ends_it_with_a_line_and_is_no_refusal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, run.ending():
        raise LostError("gone")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "LostError: gone\n"


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("--config.sft.optim.lrr=1", "--config.sft.optim.lrr: .* no such field; the nearest is sft.optim.lr"),
        ("--noconfig.lora.rnk", "--config.lora.rnk: there is no such field; the nearest is lora.rank"),
        ("--config.sft.batch.size=1", "--config.sft.batch.size: .* nearest is sft.batch"),
        ("--config.sft.optim.lr=1", ""),
        ("--config.max_pixels", ""),
        ("--configuration.x=1", ""),
    ],
)
def test_a_field_that_is_not_there_is_named_with_the_nearest(word: str, complaint: str) -> None:
    assert re.fullmatch(complaint, unknown_field(["run", "--config=configs/demo.py", word]))


def test_a_run_that_makes_its_policy_has_nothing_to_plan() -> None:
    with pytest.raises(ConfigError, match="demo names no model: .* give --config.model=DIR, or a published"):
        model_config(demo.get_config(""))
