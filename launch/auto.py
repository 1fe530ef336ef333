"""`--mesh=auto`: the mesh, what is recomputed and how a batch is cut, by the kind and number of devices.

An estimate in closed form, on the safe side, with its arithmetic printed; `launch/compile.py` gives the
compiler's own figures for what was chosen, and docs/scaling.md holds them for the usual machines. None of the
choices changes a number that is trained (a step's gradient does not depend on how it is cut), so they are
not part of a run's configuration: it can go on on another machine. Neighbours: `chips.py`, `programs.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.params import table
from fundus_jax.records import ConfigError
from launch.chips import CHIPS, GIB, Chip, kind_of
from launch.config import RunConfig, model_config

BUDGET = 0.85  # of a device's memory is planned for
AGAIN = {"none": 0.0, "dots": 0.05, "block": 0.65}  # of a forward pass is computed twice, by the compiler
CHUNK = 1024  # rows of logits at a time, as in models.logprobs
TENSOR = (1, 2, 4, 8)  # within a node, and no finer than heads are
MOST_ROWS = 8  # of a device in a micro-batch: more hide no more traffic


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and the estimate it rests on, GiB a device (None: there is none)."""

    mesh: str
    remat: str
    sft_micro_batches: int
    grpo_micro_batch: int
    grpo_slots: int
    estimate_gib: float | None
    memory_gib: float | None
    device: str

    def apply(self, config: RunConfig) -> RunConfig:
        """`config` cut and recomputed as chosen; the original is left as it is."""
        changed = dataclasses.replace(config, remat=self.remat)
        changed.sft = dataclasses.replace(config.sft, micro_batches=self.sft_micro_batches)
        cut = {"micro_batch": self.grpo_micro_batch, "slots": self.grpo_slots}
        changed.grpo = dataclasses.replace(config.grpo, **cut)
        if self.memory_gib is not None:  # an evaluation decodes as a step of GRPO does
            most = self.grpo_slots or config.grpo.prompts_per_step
            changed.evaluate = dataclasses.replace(config.evaluate, batch=min(config.evaluate.batch, most))
        return changed

    def __str__(self) -> str:
        text = (
            f"--mesh=auto on {self.device}: {self.mesh}, remat {self.remat}, sft in {self.sft_micro_batches} "
            f"micro-batches, grpo in pieces of {self.grpo_micro_batch} rollouts, decoded "
            + (f"{self.grpo_slots} prompts at a time" if self.grpo_slots else "all together")
        )
        if self.estimate_gib is None:
            return text
        return f"{text}; estimated {self.estimate_gib:.1f} of {self.memory_gib:.1f} GiB a device"


class Sizes:
    """What a run needs on one device of a mesh, in bytes, by its model's numbers."""

    def __init__(self, config: RunConfig, model: Qwen2_5_VLConfig) -> None:
        self.config, self.model = config, model
        slots = table(model)
        self.total = sum(math.prod(slot.shape) for slot in slots.values())
        self.layer, self.text, self.vision = (
            sum(math.prod(slot.shape) for name, slot in slots.items() if part in name)
            for part in (".layers.0.", ".layers.", "visual.")
        )
        self.patches = (config.max_pixels or 1280 * 784) / model.vision.patch_size**2  # of an image
        matrices = [slot.shape for name, slot in slots.items() if len(slot.shape) == 2 and ".layers." in name]
        adapters = config.lora.rank * sum(map(sum, matrices))  # as if every layer had one
        self.trained = adapters or self.total
        self.frozen = self.total if adapters else 0

    def lasting(self, fsdp: int, tensor: int) -> float:
        """Masters, moments, frozen weights, and the reference's copy of what is trained."""
        own = (12 + (2 if self.config.grpo.kl_coef else 0)) * self.trained
        spread = fsdp * tensor
        return own / (1 if self.frozen else spread) + 2 * self.frozen / spread  # half of an adapter is whole

    def update(self, rows: int, length: int, remat: str, fsdp: int, tensor: int, *, cut: bool) -> float:
        """Gradients, twice where a batch is `cut` (the sum, and those of one piece), and what a micro-batch
        of `rows` rows of `length` tokens and an image takes."""
        model, vision = self.model, self.model.vision
        text = _activations(
            model.hidden_size, model.intermediate_size / tensor, remat, model.num_hidden_layers
        )
        image = _activations(vision.hidden_size, vision.intermediate_size / tensor, remat, vision.depth)
        logits = 3 * 4 * max(CHUNK, rows) * model.vocab_size / tensor
        gathered = 2 * (3 * self.layer + 2 * model.vocab_size * model.hidden_size) / tensor
        gradients = 4 * (1 + cut) * self.trained / (fsdp * tensor)
        return rows * (length * text + self.patches * image) + logits + gathered + gradients

    def seconds(
        self, cuts: Sequence[tuple[int, int]], remat: str, data: int, fsdp: int, tensor: int, chip: Chip
    ) -> float:
        """Of a step of SFT and one of GRPO, products and traffic one after the other, at the public peaks;
        it serves to compare ways to cut a batch. `cuts`: (rows, micro-batches) of a device in each.

        A pass over a micro-batch gathers all weights forward and again backward, and its gradient is sent
        once; GRPO has two passes (prompts, responses), and those of the reference.
        """
        model, kl = self.model, bool(self.config.grpo.kl_coef)
        weights, sent = 2 * self.total / tensor * (1 - 1 / fsdp), 0 if self.frozen else 1
        crossing = 4 * self.trained / (fsdp * tensor) * (1 - 1 / data)
        text = self.text + model.vocab_size * model.hidden_size
        seconds = 0.0
        for (rows, pieces), length, passes in zip(cuts, lengths(self.config), (2, 4 + 2 * kl), strict=True):
            products = 2 * (3 + AGAIN[remat]) * rows * (length * text + self.patches * self.vision) / tensor
            seconds += chip.devices * products / chip.flops
            seconds += pieces * ((passes + sent) * weights / chip.wire + crossing / chip.network)
        return seconds

    def rollout(self, rows: int, fsdp: int, tensor: int) -> float:
        """The policy and the sampler's weights, and the keys and values of `rows` prompts and their
        responses."""
        model, grpo = self.model, self.config.grpo
        positions = self.config.max_prompt + grpo.group_size * grpo.max_new_tokens
        heads = model.num_key_value_heads / (1 if model.num_key_value_heads % tensor else tensor)
        cache = 2 * 2 * model.num_hidden_layers * heads * model.head_dim * positions
        weights = 2 * self.total / tensor + 2 * self.trained / (fsdp * tensor)
        return weights + rows * cache + 4 * rows * grpo.group_size * model.vocab_size


def _activations(width: float, mlp: float, remat: str, layers: int) -> float:
    """Bytes of one token: what every layer keeps, and twice what one layer computes with. The numbers of
    arrays of each width are fitted to the compiler's figures for 3B on eight H100 (docs/log.md)."""
    whole = 2 * (15 * width + 7.5 * mlp)
    kept = {"none": whole, "dots": 2 * (5 * width + 3 * mlp), "block": 2 * width}[remat]
    return layers * kept + 2 * whole


def choose(config: RunConfig, devices: Sequence[Any]) -> Choice:
    """The smallest tensor axis with which something fits; of the ways to recompute and cut that fit then, the
    one that should be fastest.

    devices: all of one kind; where they are several TPU slices these form the data axis. On CPUs, whose
    memory is not planned, and for the small policy, which fits anywhere, the batch is simply spread. Raises
    ConfigError where no mesh divides the batches or nothing fits, with the arithmetic.
    """
    name = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu" or not config.model:
        unchanged = (config.remat, config.sft.micro_batches, config.grpo.micro_batch, config.grpo.slots)
        return Choice(f"data:{len(devices)},fsdp:1,tensor:1", *unchanged, None, None, name)
    chip, sizes = CHIPS[kind_of(devices[0].device_kind)], Sizes(config, model_config(config))
    memory = chip.memory / chip.devices
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    slices = slices if devices[0].platform == "tpu" else 1
    batches, tried = (config.sft.batch, config.grpo.prompts_per_step), []
    for tensor in TENSOR:
        fsdp, rest = divmod(len(devices) // slices, tensor)
        parts = slices * fsdp
        if rest or any(rows % parts for rows in batches):
            tried.append(f"tensor:{tensor} does not divide {len(devices)} devices and {batches} rows")
            continue
        fitting = []
        for remat in AGAIN:
            each = [rows // parts for rows in batches]
            cut, need = _cut(sizes, each, remat, fsdp, tensor, BUDGET * memory * GIB)
            tried.append(f"tensor:{tensor} remat {remat} needs {need / GIB:.1f} GiB")
            if need > BUDGET * memory * GIB:
                continue
            slots = 0 if cut[2] == each[1] else cut[2] * parts
            pieces = [rows // size for rows, size in zip(each, cut, strict=False)]
            made = (pieces[0], cut[1] * parts * config.grpo.group_size, slots)
            mesh = f"data:{slices},fsdp:{fsdp},tensor:{tensor}"
            cuts = tuple(zip(each, pieces, strict=True))
            seconds = sizes.seconds(cuts, remat, slices, fsdp, tensor, chip)
            fitting.append((seconds, Choice(mesh, remat, *made, need / GIB, memory, name)))
        if fitting:
            return min(fitting, key=lambda one: one[0])[1]
    raise ConfigError(
        f"--mesh=auto finds no mesh of {name} ({memory:.1f} GiB, {BUDGET:.0%} of it planned) for "
        f"{config.name}: {'; '.join(tried)}; use more chips, LoRA (lora.rank), shorter lengths, or batches "
        "that the devices divide"
    )


def _cut(
    sizes: Sizes, each: list[int], remat: str, fsdp: int, tensor: int, room: float
) -> tuple[list[int], float]:
    """The most rows in a micro-batch of SFT and of GRPO, and the most slots to decode in, that fit into
    `room` bytes, of `each` rows a device has of them (1 where none fits); and the bytes needed then."""
    lasting, grpo = sizes.lasting(fsdp, tensor), sizes.config.grpo
    slots = -(-grpo.slots * each[1] // grpo.prompts_per_step) or each[1]
    while slots > 1 and slots % 2 == 0 and lasting + sizes.rollout(slots, fsdp, tensor) > room:
        slots //= 2
    cut, needs = [], [lasting + sizes.rollout(slots, fsdp, tensor)]
    for rows, length in zip(each, lengths(sizes.config), strict=True):
        found = [
            (n, lasting + sizes.update(n, length, remat, fsdp, tensor, cut=n < rows)) for n in divisors(rows)
        ]
        best = ([one for one in found if one[1] <= room] or found[:1])[-1]
        cut.append(best[0])
        needs.append(best[1])
    return [*cut, slots], max(needs)


def lengths(config: RunConfig) -> tuple[int, int]:
    """Tokens that a row of SFT, and a prompt of GRPO with its responses, has at most."""
    grpo = config.grpo
    return config.sft.max_length, config.max_prompt + grpo.group_size * grpo.max_new_tokens


def divisors(rows: int) -> list[int]:
    """Ways to cut `rows` into equal micro-batches of at most MOST_ROWS, ascending."""
    return [size for size in range(1, min(rows, MOST_ROWS) + 1) if rows % size == 0]
