"""docs/scaling.md: what each recipe needs on the machines people have, every number made by `compile.py`.

    python launch/compile.py --table=docs/scaling            all rows whose compiler is installed here
    python launch/compile.py --table=docs/scaling --only='3b.*v6e'

writes docs/scaling.json, row by row, and renders docs/scaling.md from it. Rows for TPUs and for GPUs are made
in two environments, one after the other. Neighbour: `planning.py` makes a row.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from absl import logging

from fundus_jax.files import write_atomic
from fundus_jax.records import ConfigError
from launch import auto, planning
from launch.chips import parse_topology
from launch.config import RunConfig

# recipe and machine; the mesh is what --mesh=auto takes
ROWS: tuple[tuple[str, str], ...] = (
    *(("fundus_r1_3b", machine) for machine in ("h100-8", "h800-8", "h100-16", "h200-1")),
    *(("fundus_r1_3b", machine) for machine in ("v5e-16", "v5p-8", "v5p-64", "v6e-4", "v6e-8", "v6e-16")),
    *(("fundus_r1_3b", machine) for machine in ("v6e-64", "v6e-256", "v5e-16x2")),
    *(("fundus_r1_3b:lora", machine) for machine in ("h100-8", "h200-1", "v5e-16", "v5p-8", "v5p-64")),
    *(("fundus_r1_3b:lora", machine) for machine in ("v6e-1", "v6e-8", "v6e-64", "v6e-256", "v5e-16x2")),
    *(("fundus_r1_7b", machine) for machine in ("h100-8", "h800-8", "h100-16", "h200-1")),
    *(("fundus_r1_7b", machine) for machine in ("v5e-16", "v5p-8", "v5p-64", "v6e-8", "v6e-64", "v6e-256")),
    *(("fundus_r1_7b", machine) for machine in ("v5e-16x2", "v6e-16x2")),
    *(("fundus_r1_7b:lora", machine) for machine in ("h100-8", "h200-1", "v5e-16", "v5p-8", "v5p-64")),
    *(("fundus_r1_7b:lora", machine) for machine in ("v6e-8", "v6e-64", "v6e-256", "v5e-16x2")),
    ("fundus_r1_32b", "v5p-64"),
)
STAGES = ("sft", "grpo")
HEAD = """# What fits where

Made by `python launch/compile.py --table=docs/scaling` and by nothing else: each row is the recipe of that
name, compiled ahead of time by the machine's production compiler, with the mesh, recomputing and
micro-batches that `--mesh=auto` takes there. Nothing of it was run.

* **GiB**: what the largest program of the stage needs on one device together with all that lies beside it,
  of the device's memory. TPU compilers refuse what does not fit; GPU ones never do, and the sum decides.
* **pieces**: micro-batches of a step.
* **TFLOP, wire GB, network GB**: of one device in one step: matrix products and attention (as if nothing were
  masked), bytes sent within the slice or node and out of it. A step of SFT is 64 conversations of up to 2,048
  tokens with an image of 1,024 patches each; one of GRPO is 128 such prompts of up to 1,024 tokens x 4
  rollouts of 512, all of them taken at full length. A photograph of 3 : 2, such as IDRiD's, has 1,280 patches
  with its windows: compiled so, 3B's SFT and GRPO on v5e-16 and its SFT on v6e-64 take 4 to 5 % more memory
  and 2 % more TFLOP. `--mesh=auto` leaves a tenth of the memory out of its plans for what is not foreseen.
* **~s**: a projection from public peak numbers: the slowest resource of each program, added up. It is a bound
  and no measurement; real runs take longer, since nothing reaches its peak.
* "does not fit": `--mesh=auto` found no way, by its estimate; it says what it tried. "alone": it found none
  for both stages, but one for this stage (`--config.stages`).

"""


def config_of(recipe: str) -> RunConfig:
    """The configuration of a recipe, e.g. fundus_r1_3b:lora."""
    name, _, argument = recipe.partition(":")
    return importlib.import_module(f"configs.{name}").get_config(argument)


def make(target: Path, only: str = "") -> None:
    """Compile the rows that match the regular expression `only`, and write target.json and target.md after
    each. A row whose compiler is not installed here stays as it is."""
    data, page = target.with_suffix(".json"), target.with_suffix(".md")
    plans = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    for recipe, machine in ROWS:
        name = f"{recipe} {machine}"
        if not re.search(only, name):
            continue
        if not parse_topology(machine).has_compiler:
            logging.warning("%s: left as it is: its compiler is not installed here", name)
            continue
        plans[name] = [_plan(recipe, machine, stage) for stage in STAGES]
        write_atomic(data, json.dumps({key: plans[key] for key in names() if key in plans}, indent=1) + "\n")
        write_atomic(page, render(plans))


def names() -> list[str]:
    """The keys of the table, in its order."""
    return [f"{recipe} {machine}" for recipe, machine in ROWS]


def _plan(recipe: str, machine: str, stage: str) -> dict[str, Any]:
    config, topology = config_of(recipe), parse_topology(machine)
    config.validate()
    devices = topology.devices()
    try:
        auto.choose(config, devices)
    except ConfigError:  # no mesh that both stages fit on
        config.stages = stage
    try:
        auto.choose(config, devices)
    except ConfigError as error:  # this one says that nothing fits
        return {"stage": stage, "chips": topology.chips, "fits": False, "problems": [str(error)]}
    alone = {"alone": True} if config.stages == stage else {}
    return _short(planning.plan(config, topology, "auto", stage) | alone)


def _short(value: Any) -> Any:
    """JSON values with floats to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items() if key != "compile_s"}
    return [_short(one) for one in value] if isinstance(value, list) else value


def render(plans: dict[str, list[dict[str, Any]]]) -> str:
    """The page of a table."""
    columns = (
        "recipe",
        "machine",
        "chips",
        "mesh",
        "remat",
        "stage",
        "pieces",
        "GiB",
        "of",
        "TFLOP",
        "wire GB",
    )
    columns += ("network GB", "~s", "attention")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in names():
        for plan in plans.get(name, []):
            lines.append(f"| {' | '.join((*name.split(' '), *_cells(plan)))} |")
    return HEAD + "\n".join(lines) + "\n"


def _cells(plan: dict[str, Any]) -> tuple[str, ...]:
    if "programs" not in plan:
        return (str(plan["chips"]), "does not fit", "", plan["stage"], *[""] * 8)
    rows = [row for row in plan["programs"] if "error" not in row]
    sums = {key: sum(row[key] * row["runs"] for row in rows) for key in ("wire_gb", "network_gb")}
    flops = sum((row["matmul_tflop"] + row["kernel_tflop"]) * row["runs"] for row in rows)
    kernels = {name.split(" ")[0] for row in rows for name in row["kernels"]} & {"pallas", "cudnn"}
    peak = f"{plan['peak_gib']:.1f}" if plan["fits"] else f"**{plan['peak_gib']:.1f}: does not fit**"
    return (
        *(str(plan["chips"]), plan["mesh"].replace(",", " "), plan["remat"]),
        plan["stage"] + " alone" * plan.get("alone", False),
        *(str(plan["micro_batches"]), peak, f"{plan['memory_gib']:.1f}", f"{flops:.0f}"),
        *(f"{sums['wire_gb']:.1f}", f"{sums['network_gb']:.1f}"),
        f"{sum(max(row['projected_s'].values()) for row in rows):.2f}",
        ", ".join({"pallas": "splash", "cudnn": "cudnn"}[kernel] for kernel in sorted(kernels)) or "xla",
    )
