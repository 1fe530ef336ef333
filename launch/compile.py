"""Compile a run for a machine that is not there, and say whether it fits and what it will move and compute.

    python launch/compile.py --config=configs/fundus_r1_3b.py --topology=v5litepod-16 \
        --mesh=data:1,fsdp:8,tensor:2 --stage=grpo

Any CPU host will do, with the production compiler of the platform installed (`pip install -e '.[tpu]'` or
`'.[gpu]'`, in an environment of its own). Every program of the stage is built as the loops build it and
compiled; nothing is run. HBM, FLOPs, bytes and kernels are read off the compiled programs; the seconds are a
projection from public chip numbers and no measurement.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before jax is imported: nothing is to be looked for, and GEMMs are to be cuBLAS's, as there is no GPU to try
# Triton's on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1]))  # recipes import each other from configs/

from fundus_jax import hosts  # noqa: E402
from fundus_jax.files import write_atomic  # noqa: E402
from fundus_jax.models import exact  # noqa: E402
from fundus_jax.records import ConfigError, DataError  # noqa: E402
from launch import planning, scaling  # noqa: E402
from launch.chips import parse_topology  # noqa: E402
from launch.config import read_flags, refuse  # noqa: E402

config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=False)
flags.DEFINE_string(
    "topology", None, "The machine, e.g. v5litepod-16, v6e-8, v5e:4x4x2 (two slices), h100-8."
)
flags.DEFINE_string("mesh", "auto", "Devices by axis, or auto, as for launch/run.py.")
flags.DEFINE_enum("stage", "all", ("all", "sft", "grpo"), "Whose programs.")
flags.DEFINE_string("json", "", "Also write the figures to this file.")
flags.DEFINE_string(
    "table", "", "Make the rows of this table instead, e.g. docs/scaling (see launch/scaling.py)."
)
flags.DEFINE_string("only", "", "With --table: a regular expression over 'RECIPE MACHINE'.")
flags.DEFINE_string("hlo", "", "Also write each program's compiled text into this folder.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}", exitcode=hosts.REFUSED)
    values = flags.FLAGS
    if not values.table and (values.config is None or values.topology is None):
        raise app.UsageError("--config and --topology are needed", exitcode=hosts.REFUSED)
    try:
        if values.table:
            scaling.make(Path(values.table), values.only)
            return
        topology = parse_topology(values.topology)
        exact(values.config.compute)
        stages = ("sft", "grpo") if values.stage == "all" else (values.stage,)
        plans = [
            planning.plan(values.config, topology, values.mesh, stage, hlo_folder=values.hlo)
            for stage in stages
        ]
    except (ConfigError, DataError) as error:
        refuse(error)
    for one in plans:
        print(planning.table(one))
    if values.json:
        write_atomic(Path(values.json), json.dumps(plans, indent=1) + "\n")
        logging.info("wrote %s", values.json)
    if not all(one["fits"] for one in plans):
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=read_flags)
