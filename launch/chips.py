"""The machines people rent, by the names they know: how many chips, how they are wired, what a chip can do.

`parse_topology` reads v5litepod-16, v6e-8, v5p-64, h100-8, or a shape such as v5e:4x4 (with a third factor,
two slices: v5e:4x4x2), and `Topology.devices` gives jax devices to compile for, without any of them being
there. The numbers of a chip are those of the public data sheets (Google Cloud's pages on each TPU, NVIDIA's
on H100 and H200; H800: an H100 with 400 GB/s of NVLink); they serve projections, and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from fundus_jax.records import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        platform: jax's name of it, "tpu" or "cuda".
        memory: GiB that a program may use.
        flops: dense bfloat16 multiplications and additions a second.
        bandwidth: bytes a second between memory and chip.
        wire: bytes a second that a chip sends within its slice or node (one way).
        network: bytes a second that a chip sends out of it (one way).
        axes: dimensions of a slice; GPUs: nodes x GPUs of a node.
        devices: jax devices of one chip.
        counts: what a product name counts: "chips", or "cores", of which a chip has two.
    """

    platform: str
    memory: float
    flops: float
    bandwidth: float
    wire: float
    network: float
    axes: int = 2
    devices: int = 1
    counts: str = "chips"


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip("tpu", 15.75, 197e12, 819e9, 200e9, 3.1e9),
    "v6e": Chip("tpu", 31.25, 918e12, 1638e9, 400e9, 12.5e9),
    "v5p": Chip("tpu", 95.0, 459e12, 2765e9, 600e9, 6.2e9, axes=3, counts="cores"),
    "tpu7x": Chip("tpu", 192.0, 2307e12, 7380e9, 600e9, 12.5e9, axes=3, devices=2, counts="cores"),
    "h100": Chip("cuda", 79.1, 989e12, 3350e9, 450e9, 50e9),
    "h800": Chip("cuda", 79.1, 989e12, 3350e9, 200e9, 50e9),
    "h200": Chip("cuda", 139.8, 989e12, 4800e9, 450e9, 50e9),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "tpu7x", "v7x": "tpu7x"}
# As jax names a device -> its kind; the first that fits counts.
DEVICE_KINDS = {
    **{"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
    **{"TPU v5": "v5p", "NVIDIA H100": "h100", "NVIDIA H800": "h800", "NVIDIA H200": "h200"},
}
# The shapes in which slices are offered, by their number of chips. The compiler itself takes any shape.
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
DEEP = {
    **{4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)},
    **{256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16)},
    **{4096: (16, 16, 16), 6144: (16, 16, 24)},
}
GPUS_A_NODE = 8
# For the TPU's library where there is no TPU: it asks no metadata server, and several may compile at once.
ALONE = {
    **{"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    **{"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
}
NAMES = "v5litepod-16, v5p-8, v6e-256, tpu7x-8, h100-8, h200-1, or a shape as v5e:4x4, v5e:4x4x2 (two slices)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips of one kind (GPUs: nodes x GPUs, one slice)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What one of its chips can do."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As `parse_topology` reads it, e.g. v5e:4x4x2."""
        sizes = (*self.shape, self.slices) if self.slices > 1 else self.shape
        return f"{self.kind}:{'x'.join(map(str, sizes))}"

    @property
    def devices_together(self) -> int:
        """jax devices that reach each other without the network: those of a slice, or of a node."""
        gpus = self.chip.platform == "cuda"
        return self.shape[1] if gpus else math.prod(self.shape) * self.chip.devices

    @property
    def has_compiler(self) -> bool:
        """Whether the platform's compiler is installed here."""
        module = "libtpu" if self.chip.platform == "tpu" else "jax_cuda12_plugin"
        return importlib.util.find_spec(module) is not None

    def devices(self) -> list[Any]:
        """jax devices to compile for. Raises ConfigError where the platform's compiler is not installed."""
        from jax.experimental import topologies

        shape = "x".join(map(str, self.shape))
        options: dict[str, Any]
        if self.chip.platform == "tpu":
            for name, value in ALONE.items():
                os.environ.setdefault(name, value)
            name, options = f"{self.kind}:{shape}", {"num_slices": self.slices} if self.slices > 1 else {}
            if self.shape == (1, 1):
                options["chips_per_host_bounds"] = [1, 1, 1]
            remedy = "pip install -e '.[tpu]', in an environment of its own"
        else:
            name = self.kind
            options = {"target_config": target_config(self.kind), "topology": f"1x{shape}"}
            remedy = "pip install -e '.[gpu]', in an environment of its own"
        try:
            found = topologies.get_topology_desc(platform=self.chip.platform, topology_name=name, **options)
        except Exception as error:
            raise ConfigError(
                f"jax can not compile for {self.name} here ({type(error).__name__}: {str(error)[:200]}); "
                f"the compiler comes with: {remedy}"
            ) from error
        return list(found.devices)


def parse_topology(text: str) -> Topology:
    """The machine called `text`, see the head of this file. Raises ConfigError naming what there is."""
    word = text.strip().lower()
    product = re.fullmatch(r"([a-z0-9]+)-(\d{1,5})(?:x(\d{1,3}))?", word)
    shaped = re.fullmatch(r"([a-z0-9]+):(\d{1,4}(?:x\d{1,4}){1,3})", word)
    kind = word.split("-")[0].split(":")[0]
    kind = ALIASES.get(kind, kind)
    if kind not in CHIPS or not (product or shaped):
        raise ConfigError(f"--topology={text!r} is no machine known here; known are {NAMES}")
    chip = CHIPS[kind]
    if product:
        chips, slices = int(product[2]), int(product[3] or 1)
        if slices == 0:
            raise ConfigError(f"--topology={text!r} has a 0; every size is at least 1")
        if chip.platform == "cuda" and product[3]:
            raise ConfigError(
                f"--topology={text!r}: GPUs come in no slices; write nodes x GPUs, {kind}:{slices}x{chips}"
            )
        if chip.counts == "cores":
            if chips % 2:
                raise ConfigError(
                    f"--topology={text!r}: {kind} is named by its cores, two a chip, not {chips}"
                )
            chips //= 2
        return Topology(kind, _shape(kind, chips, text), slices)
    sizes = tuple(int(part) for part in shaped[2].split("x"))  # type: ignore[index]
    if not chip.axes <= len(sizes) <= chip.axes + (chip.platform == "tpu"):
        raise ConfigError(f"--topology={text!r}: a slice of {kind} has {chip.axes} dimensions; write {NAMES}")
    shape, slices = sizes[: chip.axes], sizes[chip.axes] if len(sizes) > chip.axes else 1
    if chip.platform == "tpu":
        _shape(kind, math.prod(shape), text)
    elif shape[1] > GPUS_A_NODE:
        raise ConfigError(f"--topology={text!r}: a node has up to {GPUS_A_NODE} GPUs, not {shape[1]}")
    if 0 in sizes:
        raise ConfigError(f"--topology={text!r} has a 0; every size is at least 1")
    return Topology(kind, shape, slices)


def _shape(kind: str, chips: int, text: str) -> tuple[int, ...]:
    """How `chips` chips are arranged."""
    if CHIPS[kind].platform == "cuda":
        nodes, rest = divmod(chips, GPUS_A_NODE)
        if nodes == 0 and rest:
            return (1, rest)
        if not rest and nodes:
            return (nodes, GPUS_A_NODE)
        raise ConfigError(f"--topology={text!r}: up to 8 GPUs, or whole nodes of {GPUS_A_NODE}, not {chips}")
    offered = FLAT if CHIPS[kind].axes == 2 else DEEP
    if chips not in offered:
        raise ConfigError(
            f"--topology={text!r}: no slice of {chips} {kind} chips is offered; there are {sorted(offered)}"
        )
    return offered[chips]


def kind_of(device_kind: str) -> str:
    """The chip that jax calls `device_kind`, as "TPU v5 lite". Raises ConfigError for one not known here."""
    found = next((kind for start, kind in DEVICE_KINDS.items() if device_kind.startswith(start)), None)
    if found is None:
        raise ConfigError(
            f"devices of kind {device_kind!r} are not known here; name the mesh, e.g. --mesh=fsdp:-1"
        )
    return found


def target_config(kind: str) -> str:
    """What XLA must know of a GPU that is not there, as the text of its `GpuTargetConfigProto`."""
    names = {"h100": "NVIDIA H100 80GB HBM3", "h800": "NVIDIA H800", "h200": "NVIDIA H200"}
    device = {  # an SXM board of compute capability 9.0; memory and its bandwidth are the kind's own
        **{"threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 * 1024},
        **{"shared_memory_per_core": 228 * 1024, "shared_memory_per_block_optin": 227 * 1024},
        **{"threads_per_core_limit": 2048, "core_count": 132, "fpus_per_core": 128, "clock_rate_ghz": 1.98},
        **{"block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535},
        **{"registers_per_core_limit": 65536, "registers_per_block_limit": 65536},
        **{"l2_cache_size": 50 * 2**20, "memory_bandwidth": int(CHIPS[kind].bandwidth)},
        "device_memory_size": int(CHIPS[kind].memory * GIB),
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } '
        f'runtime_version {{ major: 12 minor: 8 }} device_description_str: "{names[kind]}"'
    )
