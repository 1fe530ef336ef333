"""One stage of a run on one machine: its programs compiled, their figures, and whether they fit together.

A program's own memory is what the compiler says of it; what lies beside it (the reference during an update,
the optimizer during a rollout) is added by hand, since no compiler sees two programs. TPU compilers refuse a
program that is too large by itself; GPU ones never do, so here the sum is compared. Neighbours: `programs.py`
(what is compiled), `hlo.py` (what is read), `chips.py` (what a chip can do).
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from fundus_jax import sharding
from fundus_jax.grpo import update
from launch import auto, hlo, programs
from launch.chips import GIB, Topology
from launch.config import RunConfig

USABLE = 0.94  # of a chip's memory: the rest goes to the runtime, fragmentation and collectives' buffers
TEMPORARIES = "its own temporaries are the larger part: "
SHORTER = "shorter sft.max_length or max_prompt and grpo.max_new_tokens, smaller max_pixels"
RESIDENT = "what stays in memory is the larger part: a larger fsdp or tensor axis, more chips, or LoRA"


def plan(
    config: RunConfig, topology: Topology, mesh_text: str, stage: str, *, hlo_folder: str = ""
) -> dict[str, Any]:
    """Compile `stage` ("sft" or "grpo") and return its figures as JSON values.

    `fits` tells whether every program fits beside what stays in memory; `problems` says what to change where
    one does not. Raises ConfigError for a mesh that the machine has not, or a missing compiler.
    """
    config.validate()
    devices = topology.devices()
    if mesh_text == "auto":
        choice = auto.choose(config, devices)
        logging.info("%s", choice)
        config, mesh_text = choice.apply(config), choice.mesh
    mesh = sharding.parse_mesh(mesh_text, devices)
    built = programs.STAGES[stage](programs.Abstract(config, mesh))
    resident = {name: programs.bytes_per_device(tree) for name, tree in built.resident.items()}
    rows, made = [], {}
    for program in built.programs:
        row, text, made[program.name] = _compile(program, made, mesh, topology)
        rows.append(row)
        if hlo_folder and text:
            Path(hlo_folder).mkdir(parents=True, exist_ok=True)
            name = f"{config.name}-{stage}-{program.name.replace(' ', '-')}.txt"
            Path(hlo_folder, name).write_text(text, encoding="utf-8")
        if "error" in row:
            break  # what comes after it may need its results
    if made.get("fill"):
        sampler, slots = next(one for one in built.programs if one.name == "decode").arguments(made)[:2]
        resident |= {"sampler": programs.bytes_per_device(sampler)}
        resident |= {"keys and values": programs.bytes_per_device(slots)}
    problems = []
    for program, row in zip(built.programs, rows, strict=False):
        row["beside_gib"] = sum(resident.get(name, 0) for name in program.beside) / GIB
        row["total_gib"] = row.get("program_gib", row.get("needs_gib", 0.0)) + row["beside_gib"]
        if row["total_gib"] > USABLE * topology.chip.memory / topology.chip.devices or "error" in row:
            problems.append(_problem(row, topology, smaller(config, mesh, stage, program.name)))
    return {
        "config": config.name,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items()),
        "stage": stage,
        "remat": config.remat,
        "micro_batches": config.sft.micro_batches if stage == "sft" else update.pieces_of(config.grpo),
        "jax": jax.__version__,
        "memory_gib": topology.chip.memory / topology.chip.devices,
        "resident_gib": {name: size / GIB for name, size in resident.items()},
        "programs": rows,
        "peak_gib": max(row["total_gib"] for row in rows),
        "fits": not problems,
        "problems": problems,
    }


def _compile(
    program: programs.Program, made: dict[str, Any], mesh: Any, topology: Topology
) -> tuple[dict[str, Any], str, Any]:
    """The figures of one program on one device, its compiled text, and its results, abstract."""
    began = time.monotonic()
    logging.info("compiling %s for %s", program.name, topology.name)
    with jax.set_mesh(mesh):
        lowered = program.run.lower(*program.arguments(made))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"\(([\d.]+)([GMK])\) exceeds available", str(error))
            if found is None:
                raise
            needs = float(found[1]) / {"G": 1, "M": 2**10, "K": 2**20}[found[2]]
            return {"program": program.name, "error": "the compiler refuses it", "needs_gib": needs}, "", None
    results = jax.tree.map(
        lambda info, place: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=place),
        lowered.out_info,
        compiled.output_shardings,
    )
    row = _figures(compiled, program, topology) | {"compile_s": round(time.monotonic() - began, 1)}
    return row, compiled.as_text(), results


def _figures(compiled: Any, program: programs.Program, topology: Topology) -> dict[str, Any]:
    """What the compiler says of the memory of `compiled`, and its text of the work."""
    memory, report, chip = compiled.memory_analysis(), hlo.report(compiled.as_text()), topology.chip
    inside, outside = report.sent(chips_per_node=topology.devices_together)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # those in the place of no argument
    own = memory.argument_size_in_bytes + results
    devices = program.times * chip.devices  # those of a chip share its units and wires
    return {
        "program": program.name,
        "runs": program.times,
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "results_gib": results / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "program_gib": (own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / GIB,
        "matmul_tflop": report.flops / 1e12,
        "kernel_tflop": report.kernel_flops / 1e12,
        "wire_gb": inside / 1e9,
        "network_gb": outside / 1e9,
        "kernels": dict(report.kernels),
        "projected_s": {
            "matmul": devices * (report.flops + report.kernel_flops) / chip.flops,
            "memory": devices * memory.argument_size_in_bytes / chip.bandwidth,
            "wire": devices * inside / chip.wire,
            "network": devices * outside / chip.network,
        },
    }


def smaller(config: RunConfig, mesh: Any, stage: str, program: str) -> str:
    """What makes a program's temporaries smaller."""
    parts, grpo = mesh.shape["data"] * mesh.shape["fsdp"], config.grpo
    if program in ("open", "fill", "decode"):
        slots = min(grpo.slots or grpo.prompts_per_step, grpo.prompts_per_step)
        return f"fewer grpo.slots, {SHORTER}" if slots > parts else SHORTER
    pieces = {"sft": config.sft.micro_batches, "grpo": update.pieces_of(grpo)}[stage]
    rows = {"sft": config.sft.batch, "grpo": grpo.prompts_per_step}[stage]
    ways = [*(["more micro-batches"] if rows // pieces > parts else []), SHORTER]
    return ", ".join(ways if config.remat == "block" else [*ways, "or more recomputing (remat)"])


def _problem(row: dict[str, Any], topology: Topology, advice: str) -> str:
    memory = topology.chip.memory / topology.chip.devices
    own = row.get("program_gib", row.get("needs_gib", 0.0))
    lasting = row["beside_gib"] + row.get("arguments_gib", 0.0)
    advice = TEMPORARIES + advice if row.get("temporaries_gib", own) > lasting else RESIDENT
    return (
        f"{row['program']} needs {row['total_gib']:.1f} GiB a device ({own:.1f} itself, "
        f"{row['beside_gib']:.1f} beside it); {topology.kind} has {memory:.1f}, of which {USABLE:.0%} are "
        f"usable; {advice}"
    )


COLUMNS = (  # head, width, and the figure of a program's row
    ("GiB: own", 10, lambda row: row["program_gib"]),
    ("beside", 8, lambda row: row["beside_gib"]),
    ("sum", 8, lambda row: row["total_gib"]),
    ("TFLOP", 10, lambda row: row["matmul_tflop"] + row["kernel_tflop"]),
    ("wire GB", 9, lambda row: row["wire_gb"]),
    ("net GB", 8, lambda row: row["network_gb"]),
    ("~matmul s", 11, lambda row: row["projected_s"]["matmul"]),
    ("~memory s", 11, lambda row: row["projected_s"]["memory"]),
    ("~wire s", 9, lambda row: row["projected_s"]["wire"]),
    ("~net s", 8, lambda row: row["projected_s"]["network"]),
)


def table(plan: dict[str, Any]) -> str:
    """The figures of `plan` for people."""
    title = f"{plan['config']}, {plan['stage']}, on {plan['topology']} ({plan['chips']} chips)"
    cut = f"remat {plan['remat']}, {plan['micro_batches']} micro-batches"
    lines = ["", f"{title}, {plan['mesh']}, {cut}, jax {plan['jax']}", ""]
    lines.append(
        f"  {'program':<14}" + "".join(f"{name:>{width}}" for name, width, _ in COLUMNS) + "  kernels"
    )
    for row in plan["programs"]:
        name = f"{row['program']} x{row['runs']}" if row.get("runs", 1) > 1 else row["program"]
        if "error" in row:
            lines.append(f"  {name:<14}{row['needs_gib']:>10.2f}  {row['error']}")
            continue
        figures = "".join(
            f"{value(row):>{width}.{3 if '~' in head else 2}f}" for head, width, value in COLUMNS
        )
        kernels = ", ".join(f"{name} {count}" for name, count in row["kernels"].items()) or "-"
        lines.append(f"  {name:<14}{figures}  {kernels}")
    resident = ", ".join(f"{name} {size:.2f}" for name, size in plan["resident_gib"].items())
    lines += ["", f"  in memory between programs, GiB a device: {resident}"]
    lines += [f"  TOO LARGE: {problem}" for problem in plan["problems"]]
    if plan["fits"]:
        lines.append(f"  fits: at most {plan['peak_gib']:.1f} of {plan['memory_gib']:.1f} GiB a device")
    lines.append(
        "  (~: projected from public peak numbers, one resource at a time; nothing was run or measured)"
    )
    return "\n".join(lines) + "\n"
