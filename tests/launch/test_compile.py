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

from fundus_jax import hosts
from fundus_jax.models.lora import LoraConfig
from fundus_jax.models.qwen2_5_vl.params import table
from fundus_jax.records import ConfigError
from launch import hlo, planning
from launch.chips import parse_topology
from launch.config import RunConfig, model_config
from tests.conftest import ROOT
from tests.launch.compiled import (
    LONG,
    SLOTS,
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

pytestmark = [
    pytest.mark.aot,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: make test-aot"
    ),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """What is compiled for two slices, and where it says so for one."""
    return short_run(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plans(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """SFT and GRPO on two slices of eight v5e each, and the compiled texts."""
    folder = tmp_path_factory.mktemp("hlo")
    return both_stages(config, "v5e:2x4x2", "data:2,fsdp:4,tensor:2", folder), folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled texts of what learns from long rows, on one slice: SFT of two rows a device, in three
    chunks of logits, and GRPO of one prompt a device, in two. Layers are so many that they stay a loop."""
    folder = tmp_path_factory.mktemp("long")
    run = small(tmp_path_factory.mktemp("sft"), layers=4, width=2 * WIDTH, vocab=LONG)
    run.sft.batch, run.sft.max_length = 8, 1280
    partly(run, "v5e:2x4", "fsdp:4,tensor:2", "sft", ("update",), folder)
    run = small(tmp_path_factory.mktemp("grpo"), vocab=LONG)
    run.max_prompt = 128
    run.grpo.prompts_per_step, run.grpo.micro_batch, run.grpo.max_new_tokens = 2, 8, 288
    partly(run, "v5e:2x2", "fsdp:2,tensor:2", "grpo", ("score", "update"), folder)
    return folder


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


def test_attention_is_counted(plans: Any) -> None:
    """Per device: two pieces of one row; block remat makes each forward pass twice, and the kernel takes the
    192 slots of an image as 256."""
    decoder, tower = 2 * 2 * 256**2 * 64, 1 * 1 * 256**2 * 80  # layers, heads, T^2, C
    products = 2 * hlo.SPLASH["fwd"] + hlo.SPLASH["dq"] + hlo.SPLASH["dkv"]
    found = hlo.report(text(plans[1], "sft-update")).kernel_flops
    assert found == 2 * products * 2 * (decoder + tower)


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
def test_the_head_is_gathered_once_a_micro_batch(plans: Any, program: str) -> None:
    """And the embedding, which has its shape, never."""
    assert 0 < gathers(text(plans[1], program), (VOCAB // 2, WIDTH)) <= 2


@pytest.mark.parametrize(
    ("program", "width", "tokens"),
    [
        ("sft-update", 2 * WIDTH, 2 * 1279),
        ("grpo-score", WIDTH, 4 * 288),
        ("grpo-update", WIDTH, 4 * 288),
    ],
)
def test_logits_exist_for_a_chunk(long: Path, program: str, width: int, tokens: int) -> None:
    """[B,T,V] never does, not even a device's part of the vocabulary; the head's width is gathered once a
    pass, and not once a chunk. `tokens`: those of a device whose logits are asked for."""
    source = text(long, program)
    assert 0 < gathers(source, (LONG // 2, width)) <= (1 if program == "grpo-score" else 2)
    largest = max(shapes(source), key=math.prod)
    assert math.prod(largest) < tokens * LONG // 2, largest
    chunks = [sizes for sizes in shapes(source) if sizes[-1:] == (LONG // 2,) and len(sizes) > 2]
    assert max(map(math.prod, chunks)) >= tokens * LONG // 2 / 3, "these are the logits of a chunk"


def test_gradients_are_scattered_while_they_are_summed(long: Path) -> None:
    """Over fsdp go rings of permutations, reduce-scatters, or what a TPU writes for these: a fusion of an
    all-reduce with the cut. The head's alone is summed whole, by the compiler's own choice, and what is
    combined with it."""
    module = hlo.parse(text(long, "sft-update"))
    whole = [
        math.prod(sizes)
        for name, operations in module.computations.items()
        if not name.startswith("all-reduce-scatter")
        for op in operations.values()
        if op.code == "all-reduce" and len(hlo.chips_of(op)) == 4
        for _, sizes in hlo.arrays(op.shape)
    ]
    assert sum(whole) < 1.1 * LONG // 2 * 2 * WIDTH


def test_masters_and_moments_are_spread(long: Path, tmp_path: Path) -> None:
    """Three float32 numbers of every parameter, on each of eight devices its share."""
    module = hlo.parse(text(long, "sft-update"))
    model = model_config(small(tmp_path, layers=4, width=2 * WIDTH, vocab=LONG))
    numbers = sum(math.prod(slot.shape) for slot in table(model).values())
    held = sum(
        math.prod(sizes)
        for op in module.computations[module.entry].values()
        for kind, sizes in hlo.arrays(op.shape)
        if op.code == "parameter" and kind == "f32" and sizes != (2, SLOTS, 1176)  # pixels
    )
    assert 3 * numbers / 8 <= held < 1.05 * 3 * numbers / 8


def test_windows_are_not_padded(long: Path) -> None:
    """Scores of a window are 64 x 64, those of a row its slots x 64: of its images together, and nowhere
    those of an image, or of the longest one of each."""
    found = shapes(text(long, "sft-update"))
    assert not [sizes for sizes in found if sizes.count(SLOTS) > 1]
    scores = [sizes for sizes in found if sizes.count(64) == 2 and SLOTS // 64 in sizes]
    assert {math.prod(sizes) for sizes in scores} == {2 * SLOTS * 64}  # of two rows, and one head


@pytest.mark.parametrize(
    ("remat", "least", "most"),
    [
        ("block", WIDTH, WIDTH),  # its input
        ("dots", 8 * WIDTH, 8 * WIDTH),  # also q, k, v, o, gate and up: 1, 1/2, 1/2, 1, 2 and 2 times as much
        ("none", 16 * WIDTH, math.inf),
    ],
)
def test_what_is_kept_for_the_backward_pass(tmp_path: Path, remat: str, least: float, most: float) -> None:
    """Numbers of a token and layer that the loops over the layers carry."""
    layers, length = 8, 384
    config = dataclasses.replace(small(tmp_path, layers, vocab=512), remat=remat)
    config.sft.batch, config.sft.max_length = 4, length
    partly(config, "v5e:2x2", "fsdp:4", "sft", ("update",), tmp_path)
    carried = [
        sum(math.prod(sizes) for _, sizes in hlo.arrays(op.shape) if length in sizes and sizes[0] == layers)
        for op, _, _ in hlo.walk(hlo.parse(text(tmp_path, "sft-update")))
        if op.code == "while"
    ]
    assert least <= max(carried) / (layers * length) <= most


def test_slots_that_are_refilled_are_donated(config: RunConfig, tmp_path: Path) -> None:
    """With fewer slots than prompts: prompts are read into the slots, and answers written down, in place."""
    fewer = copy.deepcopy(config)
    fewer.grpo.slots = fewer.grpo.prompts_per_step // 2
    names = ("gather layer", "gather ends", "open", "fill", "decode")
    plan = partly(fewer, "v5e:2x2", "fsdp:4", "grpo", names, tmp_path)
    assert [row["program"] for row in plan["programs"]] == list(names)
    assert plan["fits"], plan["problems"]
    slots = plan["resident_gib"]["keys and values"]
    made = {row["program"]: row["results_gib"] for row in plan["programs"]}
    assert made["open"] > slots, "which then are filled"
    assert max(made["fill"], made["decode"]) < 0.01 * slots


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
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == hosts.REFUSED
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
