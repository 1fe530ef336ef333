"""What the entry prepares before jax sees a device."""

from __future__ import annotations

from typing import Any

import pytest
from absl import flags
from jaxlib import xla_client

from configs import demo
from fundus_jax.records import ConfigError
from launch import distributed, planning, run


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
    with pytest.raises(SystemExit, match="far enough"):
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
