"""A small run compiled for TPUs that are not there, and what must hold of the programs on any size.

Needs the TPU compiler (`make test-aot`); nothing is run.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.models.lora import LoraConfig
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from fundus_jax.records import ConfigError
from launch import hlo, planning
from launch.chips import parse_topology
from launch.config import RunConfig
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.aot,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: make test-aot"
    ),
]
VOCAB, WIDTH = 2048, 256


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A model of two layers in either tower, with the head widths of the real one's kernels."""
    model = Qwen2_5_VLConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(8, 12, 12),
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
        eos_ids=(VOCAB - 5,),
        vision=VisionConfig(
            depth=2, hidden_size=160, intermediate_size=256, num_heads=2, out_hidden_size=WIDTH,
            full_attention_layers=(1,),
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    run = RunConfig(name="small", model=str(folder), compute="bfloat16", remat="block", max_pixels=224 * 224)
    run.max_prompt = 128
    run.sft.batch, run.sft.micro_batches, run.sft.max_length = 16, 2, 256
    run.grpo.prompts_per_step, run.grpo.micro_batch, run.grpo.max_new_tokens = 16, 32, 64
    return run


@pytest.fixture(scope="module")
def plans(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """SFT and GRPO on two slices of eight v5e each, and the compiled texts."""
    folder = tmp_path_factory.mktemp("hlo")
    mesh, machine = "data:2,fsdp:4,tensor:2", parse_topology("v5e:2x4x2")
    made = {
        stage: planning.plan(config, machine, mesh, stage, hlo_folder=str(folder))
        for stage in ("sft", "grpo")
    }
    return made, folder


def text(folder: Path, program: str) -> str:
    return (folder / f"small-{program}.txt").read_text()


PROGRAMS = [
    *("sft-update", "grpo-gather-layer", "grpo-gather-ends", "grpo-fill", "grpo-decode", "grpo-score"),
    "grpo-update",
]


def test_every_program_compiles_and_fits(plans: Any) -> None:
    found, folder = plans
    names = [f"{stage}-{row['program']}" for stage, plan in found.items() for row in plan["programs"]]
    assert [name.replace(" ", "-") for name in names] == PROGRAMS
    for plan in found.values():
        assert plan["fits"], plan["problems"]
        page = planning.table(plan)
        assert all(row["program"] in page for row in plan["programs"])
        assert "fits: at most" in page
    assert found["grpo"]["resident_gib"].keys() >= {
        "weights",
        "optimizer",
        "reference",
        "sampler",
        "keys and values",
    }


@pytest.mark.parametrize("program", ["sft-update", "grpo-fill", "grpo-score", "grpo-update"])
def test_whole_rows_are_read_by_the_flash_kernel(plans: Any, program: str) -> None:
    assert hlo.report(text(plans[1], program)).kernels["pallas"] > 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_parameter_crosses_the_network(plans: Any, program: str) -> None:
    """Between slices only sums travel: gradients, and a few numbers of the metrics."""
    source = text(plans[1], program)
    kinds = {
        op.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        for op, _, _ in hlo.walk(hlo.parse(source))
        if op.code == "send" and "megascale" in op.rest
    }
    assert kinds <= {"ALL_REDUCE"}, kinds
    report, chips = hlo.report(source), 8
    gathers = [one for one in report.collectives if one.kind in ("all-gather", "all-to-all")]
    assert not [one for one in gathers if len({chip // chips for chip in one.group}) > 1]


def test_between_slices_goes_the_gradient_and_no_more(plans: Any) -> None:
    """In bfloat16, half of what a master takes, once a micro-batch; small parameters are not split."""
    found, folder = plans
    weights = found["sft"]["resident_gib"]["weights"] * 2**30  # float32 masters, of one device
    sent = hlo.report(text(folder, "sft-update")).dcn_sent
    assert 0 < sent < 1.6 * found["sft"]["micro_batches"] * weights / 2


@pytest.mark.parametrize("program", ["sft-update", "grpo-score", "grpo-update"])
def test_the_vocabulary_stays_spread(plans: Any, program: str) -> None:
    """The head's width is gathered once a micro-batch, the embedding never; logits exist for a chunk."""
    config_pieces = {"sft-update": 2, "grpo-score": 2, "grpo-update": 2}[program]
    module = hlo.parse(text(plans[1], program))
    whole = [
        times
        for op, _, times in hlo.walk(module)
        if op.code.startswith("all-gather")
        and (VOCAB // 2, WIDTH) in [sizes for _, sizes in hlo.arrays(op.shape)]
    ]
    assert sum(whole) <= 6 * config_pieces, (
        "once a pass, in the few fusions that one gather may be split over"
    )
    largest = max(
        (sizes for op, _, _ in hlo.walk(module) for _, sizes in hlo.arrays(op.shape) if VOCAB in sizes[-1:]),
        default=(0,),
    )
    assert len([size for size in largest if size > 1]) <= 2


@pytest.mark.parametrize(("stage", "program"), [("sft", "update"), ("grpo", "update"), ("grpo", "decode")])
def test_what_is_replaced_is_donated(plans: Any, stage: str, program: str) -> None:
    """Results lie where arguments lay, but for a few numbers."""
    row = next(row for row in plans[0][stage]["programs"] if row["program"] == program)
    assert row["results_gib"] < 0.01 * row["arguments_gib"]


def test_decoding_gathers_no_weight(plans: Any) -> None:
    """Its weights were gathered over fsdp before the loop; what is left are sums over `tensor`."""
    report = hlo.report(text(plans[1], "grpo-decode"))
    gathered = [one.shape for one in report.collectives if one.kind == "all-gather"]
    assert not [shape for shape in gathered if "bf16" in shape], gathered
    assert report.open_loops, "it ends by what is sampled"


def test_decoding_takes_its_weights_as_they_lie(plans: Any) -> None:
    """None is turned or padded for its products. (What is as small as here is fetched ahead: copy-start.)"""
    copied = [
        op.shape
        for op, _, _ in hlo.walk(hlo.parse(text(plans[1], "grpo-decode")))
        if op.code == "copy" and any(math.prod(sizes) >= WIDTH * WIDTH for _, sizes in hlo.arrays(op.shape))
    ]
    assert not copied


def test_adapters_take_less(config: RunConfig, plans: Any) -> None:
    lora = dataclasses.replace(config, lora=LoraConfig(rank=4))
    plan = planning.plan(lora, parse_topology("v5e:2x4x2"), "data:2,fsdp:4,tensor:2", "sft")
    assert plan["fits"]
    assert plan["resident_gib"]["optimizer"] < 0.2 * plans[0]["sft"]["resident_gib"]["optimizer"]
    assert plan["resident_gib"]["frozen"] > 0


def test_too_large_is_one_line_with_what_to_change(config: RunConfig) -> None:
    large = copy.deepcopy(config)
    large.sft.batch, large.sft.micro_batches, large.sft.max_length, large.remat = 256, 1, 8192, "none"
    plan = planning.plan(large, parse_topology("v5e-1"), "data:1", "sft")
    assert not plan["fits"]
    assert len(plan["problems"]) == 1
    assert "update needs" in plan["problems"][0]
    assert "more micro-batches" in plan["problems"][0]
    assert "TOO LARGE" in planning.table(plan)


def test_a_mesh_that_the_slices_do_not_allow(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="2 slices and data:1 is no multiple"):
        planning.plan(config, parse_topology("v5e:2x4x2"), "fsdp:16", "sft")


def test_the_command(config: RunConfig, tmp_path: Path) -> None:
    words = [sys.executable, "launch/compile.py", "--config=configs/fundus_r1_3b.py", "--topology=v5e-3"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "no slice of 3 v5e chips is offered" in done.stderr
    out = tmp_path / "plan.json"
    words[3:] = [
        *(f"--config.model={config.model}", "--topology=v5e-1", "--stage=sft", f"--json={out}"),
        *("--config.sft.batch=2", "--config.sft.max_length=256", "--config.max_pixels=50176"),
        *("--config.grpo.prompts_per_step=2", "--config.grpo.micro_batch=8", "--config.sft.micro_batches=2"),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "fits: at most" in done.stdout
    assert "--mesh=auto on 1 x TPU v5 lite" in done.stderr
    assert [plan["stage"] for plan in json.loads(out.read_text())] == ["sft"]
