"""The automatic choice of a mesh: on machines people have, and where nothing fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from jax.sharding import Mesh

from configs import demo, fundus_r1_3b, fundus_r1_7b, fundus_r1_32b
from fundus_jax import sharding
from fundus_jax.models.qwen2_5_vl.sizes import published
from fundus_jax.records import ConfigError
from launch import auto
from launch.chips import CHIPS
from launch.config import RunConfig, check_mesh


@dataclass(frozen=True)
class Device:
    """As much of a device as is looked at."""

    id: int
    device_kind: str = "NVIDIA H100 80GB HBM3"
    platform: str = "gpu"
    slice_index: int = 0
    process_index: int = 0


def machine(kind: str, count: int, slices: int = 1) -> list[Device]:
    """TPUs in `slices` slices; GPUs in nodes of eight, as jax tells them apart."""
    if kind.startswith("TPU"):
        return [Device(i, kind, "tpu", i * slices // count) for i in range(count)]
    return [Device(i, kind, "gpu", i // 8) for i in range(count)]


def choose(config: RunConfig, kind: str, count: int, slices: int = 1) -> auto.Choice:
    return auto.choose(config, machine(kind, count, slices))


def sizes(choice: auto.Choice) -> dict[str, int]:
    return {axis: int(size) for axis, size in (part.split(":") for part in choice.mesh.split(","))}


MACHINES = [
    ("NVIDIA H100 80GB HBM3", 8, 1),
    ("TPU v5 lite", 16, 1),
    ("TPU v5", 32, 1),
    ("TPU v6 lite", 64, 1),
    ("TPU v6 lite", 256, 1),
    ("TPU v5 lite", 32, 2),
]
SMALL = "TPU v5 lite"  # 16 of them hold 7B's weights and moments, and nothing beside


@pytest.mark.parametrize(
    ("recipe", "kind", "count", "slices"),
    [
        (recipe, *one)
        for recipe in (fundus_r1_3b, fundus_r1_7b)
        for one in MACHINES
        if recipe is fundus_r1_3b or one[0] != SMALL
    ],
)
def test_the_choice_is_one_that_runs(recipe: object, kind: str, count: int, slices: int) -> None:
    config = recipe.get_config()  # type: ignore[attr-defined]
    choice = choose(config, kind, count, slices)
    mesh = sizes(choice)
    assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == count
    assert mesh["data"] == slices
    assert choice.estimate_gib is not None
    assert choice.memory_gib is not None
    assert choice.estimate_gib <= auto.BUDGET * choice.memory_gib
    changed = choice.apply(config)
    changed.validate()
    rows = mesh["data"] * mesh["fsdp"]
    assert changed.sft.batch % (rows * changed.sft.micro_batches) == 0, "whole rows on every device"
    assert changed.grpo.micro_batch % (rows * config.grpo.group_size) == 0
    assert config.sft.micro_batches == recipe.get_config().sft.micro_batches, "the original stays as it is"  # type: ignore[attr-defined]
    assert all(part in str(choice) for part in (choice.mesh, choice.remat, "GiB a device"))


def test_less_memory_means_more_of_something() -> None:
    config = fundus_r1_7b.get_config()
    large, small = choose(config, "NVIDIA H200", 8), choose(config, "TPU v6 lite", 8)
    assert sizes(large)["tensor"] == 1
    assert sizes(small)["tensor"] > 1
    assert small.remat == "block"
    assert auto.AGAIN[large.remat] <= auto.AGAIN[small.remat]


def test_a_chip_of_two_devices_gives_each_half_of_its_memory() -> None:
    choice = choose(fundus_r1_3b.get_config(), "TPU7x", 8)
    assert choice.memory_gib == pytest.approx(CHIPS["tpu7x"].memory / 2, rel=0.01)
    assert choice.estimate_gib is not None
    assert choice.estimate_gib <= auto.BUDGET * choice.memory_gib


def test_slow_wires_mean_fewer_pieces_and_more_recomputing() -> None:
    """An H800 is an H100 with less than half of its NVLink."""
    config = fundus_r1_3b.get_config()
    fast, slow = choose(config, "NVIDIA H100 80GB HBM3", 8), choose(config, "NVIDIA H800", 8)
    assert auto.AGAIN[slow.remat] > auto.AGAIN[fast.remat]
    assert slow.sft_micro_batches < fast.sft_micro_batches
    assert slow.grpo_micro_batch > fast.grpo_micro_batch
    alone = choose(config, "NVIDIA H200", 1)
    assert alone.remat == "none", "nothing moves, so nothing is gained by larger pieces"


def cuts(rows: int, pieces: int, prompts: int, parts: int) -> dict[str, tuple[int, int]]:
    return {"sft": (rows, pieces), "grpo": (prompts, parts)}


def test_the_seconds_are_products_and_traffic() -> None:
    config = fundus_r1_3b.get_config()
    numbers, chip = auto.Sizes(config, published("3B")), CHIPS["h100"]
    one = numbers.seconds(cuts(8, 4, 16, 8), "none", (1, 8, 1), chip)
    assert one == pytest.approx(2.6, rel=0.2), "docs/scaling of 2026-11-28 had 0.38 + 1.39 and 0.16 + 0.77"
    more = numbers.seconds(cuts(8, 8, 16, 16), "none", (1, 8, 1), chip)
    wire = numbers.seconds(cuts(0, 4, 0, 8), "none", (1, 8, 1), chip)
    assert more - one == pytest.approx(wire)
    again = numbers.seconds(cuts(8, 4, 16, 8), "block", (1, 8, 1), chip) - wire
    assert again / (one - wire) == pytest.approx((3 + auto.AGAIN["block"]) / 3)
    assert numbers.seconds(cuts(8, 4, 16, 8), "none", (2, 8, 1), chip) > one, "gradients cross the network"


def test_an_axis_that_does_not_divide_the_widths_is_not_taken() -> None:
    """Six GPUs: 2048 and 1280 are no multiples of 6, and every device would hold all weights."""
    config = fundus_r1_3b.get_config()
    config.sft.batch, config.grpo.prompts_per_step = 60, 120
    with pytest.raises(
        ConfigError, match="fsdp:6,tensor:1 does not divide hidden_size 2048 and vision hidden_size"
    ):
        choose(config, "NVIDIA H100 80GB HBM3", 6)
    devices = np.asarray(machine("cpu", 6), dtype=object).reshape(1, 6, 1)
    with pytest.raises(ConfigError, match="fsdp:6 of the mesh does not divide hidden_size 2048 and vision"):
        check_mesh(config, Mesh(devices, sharding.AXES), ("sft",))
    check_mesh(config, Mesh(devices, sharding.AXES), ())  # data and export take any


def test_what_trains_nothing_needs_its_weights_alone() -> None:
    config = fundus_r1_7b.get_config()
    with pytest.raises(ConfigError, match="finds no mesh"):
        choose(config, "NVIDIA H200", 1)
    for stage in ("evaluate", "export"):
        choice = auto.choose(config, machine("NVIDIA H200", 1), (stage,))
        assert choice.estimate_gib is not None
        assert 28 < choice.estimate_gib < 100
    assert auto.choose(config, machine("NVIDIA A100", 3), ("data",)).estimate_gib is None


def test_a_part_of_a_gpu_has_its_own_memory() -> None:
    """A MIG slice has the name of the whole; a run claims 95 % of a whole one."""

    @dataclass(frozen=True)
    class Part(Device):
        limit: float = 0

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": int(self.limit * 2**30)}

    config = fundus_r1_3b.get_config("lora")
    usual = auto.choose(config, machine("NVIDIA H100 80GB HBM3", 8))
    assert auto.choose(config, [Part(i, limit=75.1) for i in range(8)]).memory_gib == usual.memory_gib
    with pytest.raises(ConfigError, match=r"\(9\.5 GiB"):
        auto.choose(config, [Part(i, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", limit=9.5) for i in range(1)])


def test_adapters_need_less() -> None:
    config = fundus_r1_7b.get_config()
    with pytest.raises(
        ConfigError, match=r"finds no mesh of 1 x NVIDIA H100 80GB HBM3 .*tensor:1 remat block needs"
    ):
        choose(config, "NVIDIA H100 80GB HBM3", 1)
    lora = replace(config, lora=replace(config.lora, rank=16))
    choice = choose(lora, "NVIDIA H200", 1)
    assert choice.mesh == "data:1,fsdp:1,tensor:1"
    numbers = auto.Sizes(lora, published("7B"))
    assert numbers.trained < 0.01 * numbers.total


def test_parameters_stay_within_a_node() -> None:
    """Between nodes there is the network, whichever way jax tells them apart; gradients alone cross it."""
    config, gpu = fundus_r1_7b.get_config(), "NVIDIA H100 80GB HBM3"
    assert choose(config, gpu, 16).mesh == "data:2,fsdp:8,tensor:1"
    assert choose(config, gpu, 32).mesh == "data:4,fsdp:8,tensor:1"
    by_process = [Device(i, process_index=i // 8) for i in range(16)]  # as devices to compile for are
    assert auto.choose(config, by_process) == choose(config, gpu, 16)
    alone = [Device(i, slice_index=i // 8, process_index=i) for i in range(16)]  # one process a GPU
    assert auto.choose(config, alone) == choose(config, gpu, 16)
    large = fundus_r1_32b.get_config()
    assert sizes(choose(large, gpu, 32))["data"] == 1, "no node holds it: all of them share it"
    assert choose(config, "NVIDIA H200", 4).mesh == "data:1,fsdp:4,tensor:1"


def test_packed_rows_take_what_they_hold() -> None:
    config = fundus_r1_3b.get_config()
    plain = choose(config, "NVIDIA H100 80GB HBM3", 8)
    config.sft.row_length = 8192
    packed = choose(config, "NVIDIA H100 80GB HBM3", 8)
    assert packed.sft_micro_batches > plain.sft_micro_batches
    row = auto.Sizes(config, published("3B")).rows()["sft"]
    assert row.tokens == 8192
    assert 15 < row.images < 19, "256 tokens of an image and as many of text each, and a tenth more room"


def test_7b_on_the_smallest_chips_wants_less_to_hold() -> None:
    config = fundus_r1_7b.get_config()
    without = replace(config, grpo=replace(config.grpo, kl_coef=0.0))
    lora = replace(config, lora=replace(config.lora, rank=16))
    for count, slices, needed in ((16, 1, 14), (32, 2, 15)):
        with pytest.raises(ConfigError, match=rf"tensor:4 remat block needs {needed}\..*LoRA.*grpo.kl_coef"):
            choose(config, SMALL, count, slices)
        assert sizes(choose(lora, SMALL, count, slices))["tensor"] <= 2
    assert sizes(choose(without, SMALL, 16))["tensor"] == 4
    with pytest.raises(ConfigError, match="tensor:4 remat block needs 14.5 GiB"):  # sums of pieces take more
        choose(without, SMALL, 32, 2)


def test_where_memory_is_short_fewer_prompts_are_decoded_at_a_time() -> None:
    config = fundus_r1_3b.get_config("lora")
    large = choose(config, "NVIDIA H200", 1).apply(config)
    assert large.grpo.slots == 0, "all of a step at once"
    assert large.evaluate.batch == config.evaluate.batch
    small = choose(config, "TPU v6 lite", 1)
    assert 0 < small.grpo_slots < config.grpo.prompts_per_step
    small.apply(config).validate()
    assert small.apply(config).evaluate.batch == small.grpo_slots
    assert f"decoded {small.grpo_slots} prompts at a time" in str(small)


def test_batches_that_the_devices_do_not_divide_are_said() -> None:
    config = fundus_r1_3b.get_config()
    config.sft.batch = 7
    with pytest.raises(ConfigError, match=r"data:2,fsdp:8,tensor:1 does not divide \(7, 128\) rows"):
        choose(config, "NVIDIA H100 80GB HBM3", 16)


def test_unknown_devices_and_cpus() -> None:
    config = fundus_r1_3b.get_config()
    with pytest.raises(ConfigError, match="'Radeon' are not known here; name the mesh"):
        choose(config, "Radeon", 1)
    choice = auto.choose(config, [Device(0, "cpu", "cpu")] * 8)
    assert choice.mesh == "data:8,fsdp:1,tensor:1"
    assert (choice.remat, choice.sft_micro_batches) == (config.remat, config.sft.micro_batches)
    config.model = ""
    assert choose(config, "Radeon", 4).mesh == "data:4,fsdp:1,tensor:1", "the small policy fits anywhere"


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (2, 1), (8, 4), (16, 1)])
def test_the_small_policy_is_spread_in_whole_rows(count: int, parts: int) -> None:
    config = demo.get_config()
    config.sft.micro_batches, config.grpo.prompts_per_step, config.grpo.micro_batch = 3, 32, 4 * parts
    choice = choose(config, "TPU v5 lite", count)
    changed = choice.apply(config)
    changed.validate()
    mesh = Mesh(np.empty((count, 1, 1), object), ("data", "fsdp", "tensor"))
    check_mesh(changed, mesh, changed.trained)
    assert changed.grpo.micro_batch >= config.grpo.micro_batch


def test_a_batch_that_the_small_policys_devices_do_not_divide() -> None:
    config = demo.get_config()
    with pytest.raises(ConfigError, match=r"base\.batch 16 does not divide by 32 x TPU v5 lite"):
        choose(config, "TPU v5 lite", 32)
    for wanted in ((), ("data",), ("evaluate", "export")):
        assert auto.choose(config, machine("TPU v5 lite", 5), wanted).mesh == "data:5,fsdp:1,tensor:1"
    config.stages, config.base.batch = "grpo", 64
    assert choose(config, "TPU v5 lite", 32).mesh == "data:32,fsdp:1,tensor:1"


def test_only_the_stages_of_the_run_are_planned_for() -> None:
    """7B without adapters on sixteen of the smallest chips: SFT fits (docs/scaling), GRPO does not."""
    config = fundus_r1_7b.get_config()
    for stages in ("sft,grpo", "grpo"):
        config.stages = stages
        with pytest.raises(ConfigError, match="finds no mesh"):
            choose(config, SMALL, 16)
    config.stages = "sft"
    config.grpo.prompts_per_step = 77  # which no mesh divides: not asked
    choice = choose(config, SMALL, 16)
    assert choice.estimate_gib is not None
    assert choice.estimate_gib < 0.9 * 15.75
    config.stages = "sft,grpo"
    assert auto.choose(config, machine(SMALL, 16), ("sft",)) == choice
    assert choice.grpo_micro_batch == config.grpo.micro_batch


def test_the_estimate_counts_what_the_model_has() -> None:
    numbers = auto.Sizes(fundus_r1_7b.get_config(), published("7B"))
    assert numbers.total == 16_584_333_312 // 2  # bytes of the hub's index
    whole = numbers.lasting(8, 1)
    assert whole == pytest.approx(14 * numbers.total / 8)
    assert numbers.lasting(4, 2) == whole, "both axes split what stays"
    assert numbers.rollout(1, 4, 2) < numbers.rollout(1, 8, 1)
    row = auto.Row(2048)
    block, none = (numbers.update(2, row, remat, 8, 1, cut=False) for remat in ("block", "none"))
    assert block < none
    assert numbers.update(2, row, "block", 8, 1, cut=True) == pytest.approx(block + 6 * numbers.total / 8)
    assert numbers.spread(2, 4) == 8, "7B has 4 heads of keys"
    part = numbers.keys / numbers.total
    assert numbers.keys == 28 * 2 * (3584 + 1) * 512
    assert numbers.lasting(2, 8) == pytest.approx(14 * numbers.total * ((1 - part) / 16 + part / 2))
    assert tuple(sizes(auto.Choice("data:1,fsdp:2,tensor:3", "", 1, 1, 0, 0, 0, ""))) == sharding.AXES
