"""What a compiled program does on one chip, read off its HLO text: FLOPs, bytes over the wires, kernels.

XLA's own cost analysis counts a loop's body once, and a model whose layers are a scan is one loop. Here every
instruction is counted as often as the loops around it run. A loop that ends by its data (decoding) has no
count; its body is counted once, and `Report.open_loops` says so. Neighbour: `compile.py` prints the table.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {
    **{"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8},
    **{"u64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8},
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KERNELS = {  # custom_call_target -> what people call it
    "tpu_custom_call": "pallas",
    "__cudnn$fmhaSoftmax": "cudnn attention",
    "__cudnn$fmhaSoftmaxBackward": "cudnn attention backward",
    "__cudnn$fmhaScaleBiasSoftmax": "cudnn attention",
    "__cudnn$fmhaScaleBiasSoftmaxBackward": "cudnn attention backward",
    "__cublas$lt$matmul": "cublas",
    "__cublas$gemm": "cublas",
}
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products of each kernel: the backward ones make the scores anew
ELEMENTWISE = ("reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter")  # of scalars
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+) \(.*\) -> .*\{$")
_OP = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?%?([\w.\-, %]+)")


class Op(NamedTuple):
    """One instruction: its name, shape as text, opcode, operands' names, everything after them."""

    name: str
    shape: str
    code: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the instruction's attributes, or ""."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


class Module(NamedTuple):
    """A program: its computations by name, each a table of instructions, and the name of the first one."""

    computations: dict[str, dict[str, Op]]
    entry: str


class Collective(NamedTuple):
    """One exchange between chips: kind, the result's shape, bytes that a chip sends, how often it runs, the
    chips of one group, and the operation of the program it came from."""

    kind: str
    shape: str
    sent: float
    times: float
    group: tuple[int, ...]
    source: str


@dataclasses.dataclass
class Report:
    """Per chip and run. `flops` of matrix products, in the kernels' place those of `kernel_flops`; `kernels`
    by name; `collectives` one by one; `dcn_sent` bytes that a TPU sends to other slices; `open_loops` loops
    without a count."""

    flops: float = 0
    kernel_flops: float = 0
    dcn_sent: float = 0
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    open_loops: list[str] = dataclasses.field(default_factory=list)

    def sent(self, *, chips_per_node: int = 0) -> tuple[float, float]:
        """Bytes a chip sends within its node or slice, and out of it (0: there is one)."""
        inside = outside = 0.0
        for one in self.collectives:
            nodes = {chip // chips_per_node for chip in one.group} if chips_per_node else {0}
            if len(nodes) > 1:
                outside += one.sent * one.times
            else:
                inside += one.sent * one.times
        return inside, outside + self.dcn_sent


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The (element type, dimensions) of every array in an HLO shape."""
    return [
        (kind, tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in _ARRAY.findall(shape)
        if kind in BYTES
    ]


def size(shape: str) -> float:
    """Bytes of an HLO shape, without padding to tiles."""
    return sum(BYTES[kind] * math.prod(sizes) for kind, sizes in arrays(shape))


def parse(text: str) -> Module:
    """Read the text of a compiled module (`compiled.as_text()`)."""
    computations: dict[str, dict[str, Op]] = {}
    current: dict[str, Op] | None = None
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            elif line == "}":
                current = None
        elif current is not None and (found := _OP.match(line)):
            name, shape, code, rest = found.groups()
            inside, after = _split(rest)
            operands = tuple(part.split(" ")[-1].lstrip("%") for part in _commas(inside) if part)
            current[name] = Op(name, shape, code, operands, after)
    return Module(computations, entry)


def walk(module: Module) -> Iterator[tuple[Op, dict[str, Op], float]]:
    """Every instruction that runs: (it, its computation, how often)."""

    def visit(name: str, times: float) -> Iterator[tuple[Op, dict[str, Op], float]]:
        table = module.computations[name]
        for op in table.values():
            yield op, table, times
            if op.code in ELEMENTWISE:
                continue
            inner = times * (trip_count(module, op, table) or 1) if op.code == "while" else times
            for called in _CALLED.findall(op.rest):
                for child in (part.strip().lstrip("%") for part in called.split(",")):
                    if child in module.computations:
                        yield from visit(child, inner)

    yield from visit(module.entry, 1.0)


def trip_count(module: Module, loop: Op, table: dict[str, Op]) -> int | None:
    """How often a while loop of the computation `table` runs; None where its data decide.

    GPUs' text says it. TPUs' does not: there the condition is `counter < constant`, the counter starts at a
    constant (0 in a scan, 1 where the first round was peeled), and its step is read from the body.
    """
    known = loop.attribute(r"known_trip_count\W+n\W+(\d+)")
    if known:
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = module.computations[loop.attribute(r"body=%?([\w.\-]+)")]
    root = list(condition.values())[-1]
    if root.code != "compare" or "direction=LT" not in root.rest:
        return None
    counter, bound = (condition.get(name) for name in root.operands)
    if counter is None or bound is None or bound.code != "constant" or counter.code != "get-tuple-element":
        return None
    limit = int(bound.operands[0])
    place = int(counter.attribute(r"index=(\d+)"))
    result = list(body.values())[-1]
    step = body.get(result.operands[place]) if result.code == "tuple" else None
    steps = [body[name] for name in step.operands if name in body] if step and step.code == "add" else []
    sizes = [int(one.operands[0]) for one in steps if one.code == "constant"]
    return -(-(limit - _start(table, loop, place)) // (sizes[0] if sizes else 1))


def _start(table: dict[str, Op], loop: Op, place: int) -> int:
    """The constant that a loop's counter, at `place` of what it carries, starts at; 0 where none is found."""
    carried = table.get(loop.operands[0])
    op = table.get(carried.operands[place]) if carried and carried.code == "tuple" else None
    while op and op.code in ("copy", "bitcast"):
        op = table.get(op.operands[0])
    return int(op.operands[0]) if op and op.code == "constant" else 0


def report(text: str) -> Report:
    """Count a compiled module's work on one chip."""
    found, module = Report(), parse(text)
    seen: set[str] = set()
    for op, table, times in walk(module):
        if op.code == "while" and trip_count(module, op, table) is None:
            found.open_loops.append(op.attribute(r'op_name="([^"]*)"') or op.name)
        if op.code in ("dot", "convolution"):
            found.flops += times * matmul_flops(op, table)
        elif op.code == "custom-call":
            _count_kernel(found, op, table, times)
        elif op.code == "send" and "megascale" in op.rest:
            found.dcn_sent += times * size(op.shape.split(", u32[]")[0])
        kind = op.code.removesuffix("-start")
        if kind in COLLECTIVES:
            chain = op.attribute(r'chain_id="(\d+)"')
            if chain and chain in seen:  # an asynchronous one of a TPU is split over fusions of one chain
                continue
            seen.add(chain)
            found.collectives.append(_collective(kind, op, table, times))
    return found


def matmul_flops(op: Op, table: dict[str, Op]) -> float:
    """Multiplications and additions of a dot, or of the convolution a TPU writes for one."""
    left, right = (arrays(table[name].shape)[0][1] for name in op.operands[:2])
    out = arrays(op.shape)[0][1]
    if op.code == "dot":
        summed = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in summed.split(",") if i)
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()  # type: ignore[union-attr]
    flops = 2.0 * out[output.index("b")] * out[output.index("f")] * right[kernel.index("i")]
    spatial = sorted(label for label in inputs if label.isdigit())
    for number, label in enumerate(spatial):
        flops *= _taps(
            left[inputs.index(label)],
            out[output.index(label)],
            int(_window(op, "size", number, "1")),
            int(_window(op, "stride", number, "1")),
            int(_window(op, "pad", number, "0_0").split("_")[0]),
            int(_window(op, "lhs_dilate", number, "1")),
            int(_window(op, "rhs_dilate", number, "1")),
        )
    return flops / int(op.attribute(r"batch_group_count=(\d+)") or 1)


def _window(op: Op, key: str, number: int, default: str) -> str:
    values = op.attribute(rf"window=\{{[^}}]*\b{key}=([\d_x\-]+)")
    return values.split("x")[number] if values else default


def _taps(length: int, out: int, width: int, stride: int, pad: int, dilated: int, spread: int) -> int:
    """Pairs (output place, kernel place) of one spatial dimension that meet an input element."""
    places = np.arange(out)[:, None] * stride - pad + np.arange(width)[None] * spread
    return int(((places % dilated == 0) & (places >= 0) & (places // dilated < length)).sum())


def _count_kernel(found: Report, op: Op, table: dict[str, Op], times: float) -> None:
    target = op.attribute(r'custom_call_target="([^"]+)"')
    name = KERNELS.get(target)
    if name is None:
        return
    found.kernels[name] += round(times)
    if name == "cublas":
        left = arrays(table[op.operands[0]].shape)[0][1]
        summed = re.search(r'lhs_contracting_dimensions\W+([\d", ]*)', op.rest)
        places = re.findall(r"\d+", summed[1]) if summed else []
        out = arrays(op.shape)[0][1]
        found.flops += times * 2.0 * math.prod(out) * math.prod(left[int(place)] for place in places)
    elif name.startswith("cudnn"):  # its text says nothing: two products, five in the backward pass, unmasked
        query, keys = (arrays(table[name].shape)[0][1] for name in op.operands[:2])
        products = 5 if "backward" in name else 2
        found.kernel_flops += times * products * 2.0 * math.prod(query) * keys[1]
    elif splash := re.search(r"splash_mh?q?a_(fwd|dq|dkv)", op.name):  # nor does its: [..,H,T,C], as above
        places = [arrays(table[name].shape)[0] for name in op.operands if name in table]
        query, keys = [sizes for kind, sizes in places if kind in ("bf16", "f32") and len(sizes) > 2][:2]
        found.kernel_flops += times * SPLASH[splash[1]] * 2.0 * math.prod(query) * keys[-2]


def _collective(kind: str, op: Op, table: dict[str, Op], times: float) -> Collective:
    """Bytes sent as on a ring: an all-gather of S bytes over g chips sends S (g - 1) / g from each."""
    group = chips_of(op)
    count = len(group)
    operands = sum(size(table[name].shape) for name in op.operands if name in table)
    sent = {
        "all-gather": operands * (count - 1),
        "all-reduce": 2 * operands * (count - 1) / count,
        "reduce-scatter": operands * (count - 1) / count,
        "all-to-all": operands * (count - 1) / count,
        "collective-permute": operands,
    }[kind]
    shape = re.sub(r"\{[^}]*\}", "", op.shape)
    return Collective(kind, shape, sent, times, group, op.attribute(r'op_name="([^"]*)"'))


def chips_of(op: Op) -> tuple[int, ...]:
    """The chips of the first group of a collective, in each of the ways its text may name them."""
    if pairs := op.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        return tuple(int(number) for number in re.findall(r"\d+", pairs.split("}")[0]))
    if explicit := op.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return tuple(int(number) for number in explicit.split(","))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.rest):
        shape, source, order = (
            tuple(int(n) for n in part.split(",")) if part else () for part in tiled.groups()
        )
        numbers = np.arange(math.prod(source)).reshape(source)
        numbers = numbers.transpose(order) if order else numbers
        return tuple(int(number) for number in numbers.reshape(shape)[0])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", op.rest):
        axes = {name: int(length) for name, length in re.findall(r"'([^']+)'=(\d+)", named[1])}
        wanted = re.findall(r"'([^']+)'", named[2])
        numbers = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = tuple(slice(None) if name in wanted else 0 for name in axes)
        return tuple(int(number) for number in numbers[index].reshape(-1))
    return (0,)


def _split(rest: str) -> tuple[str, str]:
    """The operands in front of the closing parenthesis, and what comes after it."""
    depth = 0
    for place, letter in enumerate(rest):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            if depth == 0:
                return rest[:place], rest[place + 1 :]
            depth -= 1
    return rest, ""


def _commas(text: str) -> list[str]:
    """Parts of `text` between the commas that stand in no bracket, without comments."""
    parts, depth, start = [], 0, 0
    text = re.sub(r"/\*.*?\*/", "", text)
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]
