"""What the tests that compile for absent machines share: a small model, and readers of its compiled text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from launch import hlo, planning, programs
from launch.chips import parse_topology
from launch.config import RunConfig

VOCAB, WIDTH = 2048, 256
SIDE, SLOTS = 168, 192  # of the image, in pixels; 12 x 12 patches lie in three windows of 64 slots
LONG = 8192  # the vocabulary of long rows


def small(folder: Path, layers: int = 2, width: int = WIDTH, vocab: int = VOCAB) -> RunConfig:
    """A model of two blocks in the vision tower, with the head widths of the real one's kernels."""
    heads = width // 4
    model = Qwen2_5_VLConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(heads // 8, 3 * heads // 16, 3 * heads // 16),
        image_token_id=vocab - 1,
        video_token_id=vocab - 2,
        vision_start_token_id=vocab - 3,
        vision_end_token_id=vocab - 4,
        eos_ids=(vocab - 5,),
        vision=VisionConfig(
            depth=2, hidden_size=160, intermediate_size=256, num_heads=2, out_hidden_size=width,
            full_attention_layers=(1,),
        ),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    return RunConfig(name="small", model=str(folder), compute="bfloat16", remat="block", max_pixels=SIDE**2)


def short_run(folder: Path) -> RunConfig:
    """The small model with short rows, in two micro-batches each."""
    run = small(folder)
    run.max_prompt = 128
    run.sft.batch, run.sft.micro_batches, run.sft.max_length = 16, 2, 256
    run.grpo.prompts_per_step, run.grpo.micro_batch, run.grpo.max_new_tokens = 16, 32, 64
    return run


def both_stages(config: RunConfig, machine: str, mesh: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of SFT and GRPO; their texts go to `folder`."""
    return {
        stage: planning.plan(config, parse_topology(machine), mesh, stage, hlo_folder=str(folder))
        for stage in ("sft", "grpo")
    }


def partly(
    config: RunConfig, machine: str, mesh: str, stage: str, names: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """The figures of some programs of a stage, which need no others' results."""
    whole = programs.STAGES[stage]

    def part(policy: programs.Abstract) -> programs.Stage:
        built = whole(policy)
        return built._replace(programs=[one for one in built.programs if one.name in names])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(programs.STAGES, stage, part)
        return planning.plan(config, parse_topology(machine), mesh, stage, hlo_folder=str(folder))


def gathers(source: str, shape: tuple[int, ...]) -> float:
    """How often an array of `shape` is gathered."""
    found = [one for one in hlo.report(source).collectives if one.kind == "all-gather"]
    return sum(one.times for one in found if shape in [sizes for _, sizes in hlo.arrays(one.shape)])


def shapes(source: str) -> set[tuple[int, ...]]:
    """Those of all arrays of a program, within fusions too."""
    return {sizes for op, _, _ in hlo.walk(hlo.parse(source)) for _, sizes in hlo.arrays(op.shape)}


def text(folder: Path, program: str) -> str:
    return (folder / f"small-{program}.txt").read_text()
