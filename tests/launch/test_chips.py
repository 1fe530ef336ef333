"""Machines by the names people know."""

from __future__ import annotations

import pytest

from fundus_jax.records import ConfigError
from launch.chips import CHIPS, DEEP, FLAT, Topology, parse_topology, target_config


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-1", "v5e:1x1", 1),
        ("V6E-8", "v6e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),  # eight cores
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p-8192", "v5p:16x16x16", 4096),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("tpu7x-8", "tpu7x:2x2x1", 4),
        ("v5litepod-16x2", "v5e:4x4x2", 32),
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e:4x4x2", "v5e:4x4x2", 32),
        ("v5p:2x2x2", "v5p:2x2x2", 8),
        ("v5p:2x2x2x3", "v5p:2x2x2x3", 24),
        ("h100-8", "h100:1x8", 8),
        ("h200-1", "h200:1x1", 1),
        ("h800-64", "h800:8x8", 64),
        ("h100:2x8", "h100:2x8", 16),
    ],
)
def test_names(text: str, name: str, chips: int) -> None:
    topology = parse_topology(text)
    assert (topology.name, topology.chips) == (name, chips)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100-8", "no machine known here; known are v5litepod-16"),
        ("v5e", "no machine known here"),
        ("v5e-12", r"no slice of 12 v5e chips is offered; there are \[1, 4, 8"),
        ("v6e:32x32", "no slice of 1024 v6e chips"),
        ("v5p-7", "named by its cores, two a chip, not 7"),
        ("v5p:4x4", "a slice of v5p has 3 dimensions"),
        ("h100-12", "up to 8 GPUs, or whole nodes of 8, not 12"),
        ("h100-0", "not 0"),
        ("h100:2x8x2", "a slice of h100 has 2 dimensions"),
        ("h100-8x2", "GPUs come in no slices; write nodes x GPUs, h100:2x8"),
        ("h200:1x16", "a node has up to 8 GPUs, not 16"),
        ("v5e:4x4x0", "has a 0"),
        ("v5e-4x0", "has a 0"),
    ],
)
def test_errors_name_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_topology(text)
    assert repr(text) in str(caught.value)


def test_the_tables_agree_with_themselves() -> None:
    for offered, axes in ((FLAT, 2), (DEEP, 3)):
        for chips, shape in offered.items():
            assert Topology("v5e", shape).chips == chips
            assert len(shape) == axes
    for kind, chip in CHIPS.items():
        assert chip.wire > chip.network, kind
        assert chip.bandwidth > chip.wire, kind


def test_what_reaches_what_without_the_network() -> None:
    assert parse_topology("v5e:4x4x2").devices_together == 16
    assert parse_topology("tpu7x-8").devices_together == 8  # two devices a chip
    assert parse_topology("h100-64").devices_together == 8


def test_a_gpus_description_names_its_own_memory() -> None:
    texts = {kind: target_config(kind) for kind in ("h100", "h800", "h200")}
    assert len(set(texts.values())) == 3
    for kind, text in texts.items():
        assert f"memory_bandwidth: {int(CHIPS[kind].bandwidth)}" in text
        assert kind.upper() in text
