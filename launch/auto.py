"""`--mesh=auto`: the mesh, what is recomputed and how a batch is cut, by the kind and number of devices.

An estimate in closed form, on the safe side, with its arithmetic printed; `launch/compile.py` gives the
compiler's own figures for what was chosen, and docs/scaling.md holds them for the usual machines. None of the
choices changes a number that is trained (a step's gradient does not depend on how it is cut), so they are
not part of a run's configuration: it can go on on another machine. Neighbours: `chips.py`, `programs.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.params import table
from fundus_jax.records import ConfigError
from fundus_jax.sft import PATCH_ROOM
from launch.chips import CHIPS, GIB, Chip, kind_of
from launch.config import RunConfig, model_config, undivided

BUDGET = 0.9  # of a device's memory is planned for
AGAIN = {"none": 0.0, "dots": 0.05, "block": 0.65}  # of a forward pass is computed twice, by the compiler
CHUNK = 1024  # rows of logits at a time, as in models.logprobs
TENSOR = (1, 2, 4, 8)  # within a node
TEXT = 256  # tokens that a conversation of a packed row has beside its image: a question and a trace
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


class Row(NamedTuple):
    """As much as a row has at most: tokens, and images of the largest size."""

    tokens: int
    images: float = 1


class Sizes:
    """What a run needs on one device of a mesh, in bytes, by its model's numbers."""

    def __init__(
        self, config: RunConfig, model: Qwen2_5_VLConfig, stages: Sequence[str] | None = None
    ) -> None:
        """`stages`: those that are planned for, by default all that the run trains."""
        self.config, self.model = config, model
        self.stages = config.trained if stages is None else stages
        slots = table(model)
        self.total = sum(math.prod(slot.shape) for slot in slots.values())
        self.layer, self.text, self.vision = (
            sum(math.prod(slot.shape) for name, slot in slots.items() if part in name)
            for part in (".layers.0.", ".layers.", "visual.")
        )
        self.keys = sum(
            math.prod(slot.shape)
            for name, slot in slots.items()
            if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name
        )
        self.patches = (config.max_pixels or 1280 * 784) / model.vision.patch_size**2  # of an image
        matrices = [slot.shape for name, slot in slots.items() if len(slot.shape) == 2 and ".layers." in name]
        adapters = config.lora.rank * sum(map(sum, matrices))  # as if every layer had one
        self.trained = adapters or self.total
        self.frozen = self.total if adapters else 0

    def spread(self, fsdp: int, tensor: int) -> float:
        """Devices that share the weights; keys and values are whole on a tensor axis finer than heads."""
        whole = self.keys / self.total if self.model.num_key_value_heads % tensor else 0.0
        return fsdp * tensor / (1 + whole * (tensor - 1))

    def lasting(self, fsdp: int, tensor: int) -> float:
        """Masters, moments, frozen weights, and the copy of what is trained that GRPO's reference is."""
        reference = "grpo" in self.stages and self.config.grpo.kl_coef
        if not self.stages:  # nothing is trained: the weights, as they are read
            return 4 * self.total / self.spread(fsdp, tensor)
        own = (12 + (2 if reference else 0)) * self.trained
        spread = self.spread(fsdp, tensor)
        # half of an adapter is whole over fsdp
        return own / (tensor if self.frozen else spread) + 2 * self.frozen / spread

    def update(self, rows: int, row: Row, remat: str, fsdp: int, tensor: int, *, cut: bool) -> float:
        """Gradients, and what a micro-batch of `rows` rows like `row` takes. Where a batch
        is `cut`, the gradients are there twice (the sum, and those of one piece), and once for all pieces the
        weights are rounded."""
        model, vision = self.model, self.model.vision
        adapted = self.frozen > 0
        mlp = model.intermediate_size / tensor
        text = _activations(model.hidden_size, mlp, remat, model.num_hidden_layers, adapted)
        mlp = vision.intermediate_size / tensor
        image = _activations(vision.hidden_size, mlp, remat, vision.depth, adapted)
        logits = 3 * 4 * max(CHUNK, rows) * model.vocab_size / tensor
        gathered = 2 * (3 * self.layer + 2 * model.vocab_size * model.hidden_size) / tensor
        gradients = (4 + 6 * cut) * self.trained / self.spread(fsdp, tensor)
        return rows * (row.tokens * text + row.images * self.patches * image) + logits + gathered + gradients

    def step(
        self, rows: int, row: Row, remat: str, fsdp: int, tensor: int, *, cut: bool, apart: bool = False
    ) -> float:
        """All that is there in an update. Where a batch is cut, and its sum crosses a network too (`apart`),
        the compiler takes more: by so much in the rows of docs/scaling.md on two slices."""
        most = 1.0 if not (cut and apart) else 1.2 if self.frozen else 1.06
        return most * (self.lasting(fsdp, tensor) + self.update(rows, row, remat, fsdp, tensor, cut=cut))

    def rows(self) -> dict[str, Row]:
        """A row of SFT, and a prompt of GRPO with its responses, as large as they can be. How many images a
        packed row has is not known before the data is: as many as fit with a short text each."""
        sft, grpo = self.config.sft, self.config.grpo
        packed = PATCH_ROOM * sft.row_length / (self.patches / self.model.vision.spatial_merge_size**2 + TEXT)
        return {
            "sft": Row(sft.row_length or sft.max_length, max(1, packed)),
            "grpo": Row(self.config.max_prompt + grpo.group_size * grpo.max_new_tokens),
        }

    def seconds(
        self,
        cuts: dict[str, tuple[int, int]],
        remat: str,
        axes: tuple[int, int, int],
        chip: Chip,
        *,
        over_network: bool = False,
    ) -> float:
        """Of a step of each stage, products and traffic one after the other, at the public peaks; it serves
        to compare ways to cut a batch. `cuts`: (rows, micro-batches) of a device in each. `axes`: data, fsdp
        and tensor. over_network: whether what fsdp gathers crosses it.

        A pass over a micro-batch gathers all weights forward and again backward, and its gradient is sent
        once; GRPO has two passes (prompts, responses), and those of the reference.
        """
        (data, fsdp, tensor), model = axes, self.model
        passes = {"sft": 2, "grpo": 4 + 2 * bool(self.config.grpo.kl_coef)}
        wire = chip.network if over_network else chip.wire
        wire *= 1 / chip.devices  # those of a chip share its wires
        weights, sent = 2 * self.total / tensor * (1 - 1 / fsdp), 0 if self.frozen else 1
        crossing = 4 * self.trained / (fsdp * tensor) * (1 - 1 / data)
        text = self.text + model.vocab_size * model.hidden_size
        seconds = 0.0
        for stage, (rows, pieces) in cuts.items():
            row = self.rows()[stage]
            seen = row.images * self.patches * self.vision
            products = 2 * (3 + AGAIN[remat]) * rows * (row.tokens * text + seen) / tensor
            seconds += chip.devices * products / chip.flops
            seconds += pieces * (passes[stage] + sent) * weights / wire
            seconds += pieces * crossing * chip.devices / chip.network
        return seconds

    def rollout(self, rows: int, fsdp: int, tensor: int) -> float:
        """The policy, the keys and values of `rows` prompts and their responses, and the larger of two: the
        sampler's weights, gathered, with which it decodes; and what reading the prompts takes, all at once: a
        second copy of their keys and values, what a layer computes with, and the pixels. The last is fitted
        to the compiler's figures for one H200 (docs/log.md)."""
        model, grpo = self.model, self.config.grpo
        positions = self.config.max_prompt + grpo.group_size * grpo.max_new_tokens
        heads = model.num_key_value_heads / (1 if model.num_key_value_heads % tensor else tensor)
        token = 2 * 2 * model.num_hidden_layers * heads * model.head_dim
        policy = 2 * self.trained / self.spread(fsdp, tensor)
        decoding = 2 * self.total / self.spread(1, tensor)
        pixels = self.patches * model.vision.patch_features
        reading = self.config.max_prompt * (token + 2 * model.intermediate_size / tensor) + 4 * pixels
        reading = rows * reading + 2 * self.total / self.spread(fsdp, tensor)
        return (
            policy
            + max(decoding, reading)
            + rows * (token * positions + 4 * grpo.group_size * model.vocab_size)
        )


def _activations(width: float, mlp: float, remat: str, layers: int, adapted: bool) -> float:
    """Bytes of one token: what every layer keeps, and twice what one layer computes with. The numbers of
    arrays of each width are fitted to the compiler's figures for 3B on eight H100, for keeping all to those
    on 256 v6e, and for the products of adapters, which "dots" keeps too, to those on one (docs/log.md)."""
    whole = 2 * (15 * width + 7.5 * mlp)
    dots = 2 * (5 * width + 3 * mlp) * (1.3 if adapted else 1)
    kept = {"none": 1.15 * whole, "dots": dots, "block": 2 * width}[remat]
    return layers * kept + 2 * whole


def choose(config: RunConfig, devices: Sequence[Any], wanted: Collection[str] | None = None) -> Choice:
    """The smallest tensor axis with which something fits; of the ways to recompute and cut that fit then, the
    one that should be fastest.

    devices: all of one kind; slices of TPUs and nodes of GPUs form the data axis, so that only gradients
    cross the network. Where nothing fits so, GPUs share the weights over all nodes. Planned for are the
    training stages of the run, those of `wanted` if it is given; they share a mesh. On CPUs, whose memory is
    not planned, and for the small policy, which fits anywhere, the batch is simply spread. Raises ConfigError
    where no mesh divides the batches or nothing fits, with the arithmetic.
    """
    name = f"{len(devices)} x {devices[0].device_kind}"
    stages = [stage for stage in config.trained if wanted is None or stage in wanted]
    only_data = wanted is not None and set(wanted) <= {"data"}
    if devices[0].platform == "cpu" or not config.model or only_data:
        return _spread(config, stages, len(devices), name)
    chip, sizes = CHIPS[kind_of(devices[0].device_kind)], Sizes(config, model_config(config), stages)
    chip = dataclasses.replace(chip, memory=memory(devices[0], chip))
    apart, tried = together(devices), []
    for groups in (apart,) if chip.platform == "tpu" else dict.fromkeys((apart, 1)):
        for tensor in TENSOR:
            fsdp, rest = divmod(len(devices) // groups, tensor)
            if rest:
                continue
            axes = (groups, fsdp, tensor)
            fitting = _fitting(sizes, axes, chip, tried, name, over_network=groups < apart)
            if fitting:
                return min(fitting, key=lambda one: one[0])[1]
    raise ConfigError(
        f"--mesh=auto finds no mesh of {name} ({chip.memory / chip.devices:.1f} GiB, {BUDGET:.0%} of it "
        f"planned) for {config.name}: {'; '.join(tried)}; use more chips, LoRA (lora.rank), no reference "
        "(grpo.kl_coef=0), shorter lengths, or batches that the devices divide"
    )


def memory(device: Any, chip: Chip) -> float:
    """GiB of the chip's memory; where the device has much less, as a part of a GPU (MIG) does, that."""
    stats = getattr(device, "memory_stats", lambda: None)
    try:
        limit = (stats() or {}).get("bytes_limit", 0) * chip.devices / GIB
    except RuntimeError:  # one to compile for, which is not there
        limit = 0
    return limit if 0 < limit < 0.8 * chip.memory else chip.memory


def _spread(config: RunConfig, stages: Sequence[str], count: int, name: str) -> Choice:
    """The batch over `count` devices, in no more pieces than the configuration says, and whole rows in each.
    Raises ConfigError where the devices do not divide a batch of one of the `stages`."""
    sft, grpo = config.sft, config.grpo
    batches = {
        "base": ("base.batch", config.base.batch),
        "sft": ("sft.batch", sft.batch),
        "grpo": ("grpo.prompts_per_step", grpo.prompts_per_step),
    }
    for field, rows in (batches[stage] for stage in stages):
        if rows % count:
            raise ConfigError(
                f"{field} {rows} does not divide by {name}; take a batch that they divide, or name a mesh "
                "whose data x fsdp divides it: --mesh=data:..,fsdp:..,tensor:.."
            )
    pieces, prompts = sft.micro_batches, grpo.micro_batch // grpo.group_size
    while pieces > 1 and sft.batch % (pieces * count):
        pieces -= 1
    while prompts < grpo.prompts_per_step and (prompts % count or grpo.prompts_per_step % prompts):
        prompts += 1
    slots = 0 if grpo.slots % count else grpo.slots
    cut = (pieces, prompts * grpo.group_size, slots)
    return Choice(f"data:{count},fsdp:1,tensor:1", config.remat, *cut, None, None, name)


def together(devices: Sequence[Any]) -> int:
    """Groups of devices with nothing but the network between them: slices of TPUs, nodes of GPUs. jax gives a
    node a slice_index of its own, but for devices to compile for, whose processes are the nodes."""
    slices = {getattr(device, "slice_index", None) or 0 for device in devices}
    processes = {getattr(device, "process_index", 0) for device in devices}
    if devices[0].platform == "tpu" or len(slices) > 1 or len(processes) == len(devices):
        return len(slices)
    return len(processes)


def _fitting(
    sizes: Sizes, axes: tuple[int, int, int], chip: Chip, tried: list[str], name: str, *, over_network: bool
) -> list[tuple[float, Choice]]:
    """What fits on a mesh of `axes` (data, fsdp, tensor): (seconds, choice) each. All is noted in `tried`."""
    (data, fsdp, tensor), config = axes, sizes.config
    parts, memory = data * fsdp, chip.memory / chip.devices
    mesh = f"data:{data},fsdp:{fsdp},tensor:{tensor}"
    batches = {"sft": config.sft.batch, "grpo": config.grpo.prompts_per_step}
    batches = {stage: batches[stage] for stage in sizes.stages}
    if sizes.model.num_attention_heads % tensor:
        tried.append(f"{mesh} does not divide {sizes.model.num_attention_heads} heads")
        return []
    if narrow := undivided(sizes.model, fsdp):
        tried.append(f"{mesh} does not divide {narrow}")
        return []
    if any(rows % parts for rows in batches.values()):
        tried.append(f"{mesh} does not divide {tuple(batches.values())} rows")
        return []
    fitting, room = [], BUDGET * memory * GIB
    for remat in AGAIN:
        each = {stage: rows // parts for stage, rows in batches.items()}
        prompts = each.get("grpo") or -(-config.evaluate.batch // parts)
        cut, slots, need = _cut(sizes, each, prompts, remat, axes, room)
        tried.append(f"{mesh} remat {remat} needs {need / GIB:.1f} GiB")
        if need > room:
            continue
        pieces = {stage: each[stage] // rows for stage, rows in cut.items()}
        made = (
            pieces.get("sft", config.sft.micro_batches),
            cut["grpo"] * parts * config.grpo.group_size if "grpo" in cut else config.grpo.micro_batch,
            0 if slots == prompts else slots * parts,
        )
        cuts = {stage: (each[stage], pieces[stage]) for stage in cut}
        seconds = sizes.seconds(cuts, remat, axes, chip, over_network=over_network)
        fitting.append((seconds, Choice(mesh, remat, *made, need / GIB, memory, name)))
    return fitting


def _cut(
    sizes: Sizes, each: dict[str, int], prompts: int, remat: str, axes: tuple[int, int, int], room: float
) -> tuple[dict[str, int], int, float]:
    """The most rows in a micro-batch of each stage, of `each` that a device has of them, and the most slots
    to decode its `prompts` in, that fit into `room` bytes (1 where none fits); and the bytes needed then."""
    (data, fsdp, tensor), grpo = axes, sizes.config.grpo
    lasting = sizes.lasting(fsdp, tensor)
    slots = -(-grpo.slots * prompts // grpo.prompts_per_step) or prompts
    while slots > 1 and slots % 2 == 0 and lasting + sizes.rollout(slots, fsdp, tensor) > room:
        slots //= 2
    cut, needs = {}, [lasting + sizes.rollout(slots, fsdp, tensor)]
    for stage, rows in each.items():
        row = sizes.rows()[stage]
        found = [
            (n, sizes.step(n, row, remat, fsdp, tensor, cut=n < rows, apart=data > 1)) for n in divisors(rows)
        ]
        best = ([one for one in found if one[1] <= room] or found[:1])[-1]
        cut[stage] = best[0]
        needs.append(best[1])
    return cut, slots, max(needs)


def divisors(rows: int) -> list[int]:
    """Ways to cut `rows` into equal micro-batches of at most MOST_ROWS, ascending."""
    return [size for size in range(1, min(rows, MOST_ROWS) + 1) if rows % size == 0]
