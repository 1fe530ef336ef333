"""A small run compiled for two nodes of eight H100 that are not there, and what must hold on any size.

Needs the GPU compiler (`make test-aot AOT=gpu`) and no GPU; nothing is run. What a TPU's compiler makes of
the same programs is in `test_compile.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.models.lora import LoraConfig
from launch import hlo, planning
from launch.chips import parse_topology
from launch.config import RunConfig
from tests.launch.compiled import (
    LONG,
    VOCAB,
    WIDTH,
    both_stages,
    gathers,
    partly,
    shapes,
    short_run,
    small,
    text,
)

NODE = 8
MACHINE, MESH = "h100:2x8", "data:2,fsdp:4,tensor:2"
pytestmark = [
    pytest.mark.aot,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not parse_topology(MACHINE).has_compiler, reason="needs the GPU compiler: make test-aot AOT=gpu"
    ),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return short_run(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plans(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """SFT and GRPO, and the compiled texts."""
    folder = tmp_path_factory.mktemp("hlo")
    return both_stages(config, MACHINE, MESH, folder), folder


def test_every_program_compiles_and_fits(plans: Any) -> None:
    for plan in plans[0].values():
        assert plan["fits"], plan["problems"]
        assert "fits: at most" in planning.table(plan)


@pytest.mark.parametrize("program", ["sft-update", "grpo-fill", "grpo-score", "grpo-update"])
def test_whole_rows_are_read_by_the_flash_kernel(plans: Any, program: str) -> None:
    kernels = hlo.report(text(plans[1], program)).kernels
    assert kernels["cudnn attention"] > 0
    assert (kernels["cudnn attention backward"] > 0) == program.endswith("update")


@pytest.mark.parametrize(
    "program", ["sft-update", "grpo-gather-ends", "grpo-fill", "grpo-score", "grpo-update"]
)
def test_no_parameter_crosses_the_network(plans: Any, program: str) -> None:
    """Between nodes only sums travel: gradients, and a few numbers of the metrics."""
    crossing = [
        one
        for one in hlo.report(text(plans[1], program)).collectives
        if len({chip // NODE for chip in one.group}) > 1
    ]
    assert {one.kind for one in crossing} <= {"all-reduce", "reduce-scatter"}


def test_between_nodes_goes_the_gradient_and_no_more(plans: Any) -> None:
    """Half of what a master takes, once a micro-batch and twice in a ring; small parameters are not split."""
    found, folder = plans
    weights = found["sft"]["resident_gib"]["weights"] * 2**30  # float32 masters, of one device
    _, sent = hlo.report(text(folder, "sft-update")).sent(chips_per_node=NODE)
    assert 0 < sent < 1.6 * found["sft"]["micro_batches"] * weights


@pytest.mark.parametrize("program", ["sft-update", "grpo-score", "grpo-update"])
def test_the_head_is_gathered_once_a_micro_batch(plans: Any, program: str) -> None:
    """A GPU's compiler may turn it."""
    source = text(plans[1], program)
    assert 0 < gathers(source, (VOCAB // 2, WIDTH)) + gathers(source, (WIDTH, VOCAB // 2)) <= 2


def test_logits_exist_for_a_chunk(tmp_path: Path) -> None:
    """[B,T,V] never does, not even a device's part of the vocabulary."""
    run = small(tmp_path, layers=4, width=2 * WIDTH, vocab=LONG)
    run.sft.batch, run.sft.max_length = 8, 1280
    partly(run, "h100:1x8", "fsdp:4,tensor:2", "sft", ("update",), tmp_path)
    largest = max(shapes(text(tmp_path, "sft-update")), key=math.prod)
    assert math.prod(largest) < 2 * 1279 * LONG // 2, largest


@pytest.mark.parametrize(("stage", "program"), [("sft", "update"), ("grpo", "update"), ("grpo", "decode")])
def test_what_is_replaced_is_donated(plans: Any, stage: str, program: str) -> None:
    row = next(row for row in plans[0][stage]["programs"] if row["program"] == program)
    assert row["results_gib"] < 0.01 * row["arguments_gib"]


def test_decoding_gathers_no_weight(plans: Any) -> None:
    report = hlo.report(text(plans[1], "grpo-decode"))
    gathered = [one.shape for one in report.collectives if one.kind == "all-gather"]
    assert not [shape for shape in gathered if "bf16" in shape], gathered


def test_adapters_take_less(config: RunConfig, plans: Any) -> None:
    lora = dataclasses.replace(config, lora=LoraConfig(rank=4))
    plan = planning.plan(lora, parse_topology(MACHINE), MESH, "sft")
    assert plan["fits"]
    assert plan["resident_gib"]["optimizer"] < 0.2 * plans[0]["sft"]["resident_gib"]["optimizer"]
