"""The one entry: from data to a trained, evaluated, exported model and a report.

    python launch/run.py --config=configs/demo.py --workdir=runs/demo
    python launch/run.py --config=configs/fundus_r1_3b.py --config.model=DIR --stage=grpo

Stages: data, base (only where no model is given), sft and grpo (unless --config.stages leaves them out),
evaluate, export. Running the same command again goes on where it stopped; another configuration in the same
workdir is refused. With --parent=DIR the finished stages of another run are taken over as far as both
configurations give the same (launch/inherit.py). On several hosts each runs this very line (docs/hosts.md).
At SIGTERM and Ctrl-C it saves and leaves within --grace seconds. Exit codes: 143 or 130 after these, 78 where
something has to be changed first, 1 for what may pass when it is started again.
"""

import json
import logging as python_logging
import os
import shlex
import sys
import time
from collections.abc import MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from fundus_jax import hosts, sharding, stop
from fundus_jax.chat import LostError
from fundus_jax.models import exact
from fundus_jax.records import ConfigError, DataError
from fundus_jax.report import write_report
from fundus_jax.workdir import BusyError, Workdir
from launch import auto, distributed, evaluate, inherit, stages
from launch.config import RunConfig, as_json, check_mesh, names, read_flags, refuse

# Recipes build on each other (`from configs... import`), and configs/ is part of no installed package.
sys.path.append(str(Path(__file__).resolve().parents[1]))

STAGES = ("data", "base", "sft", "grpo", "evaluate", "export")
NOISY = ("orbax", "httpx")
# Of a GPU's memory, what this process takes: above what is planned with (launch/planning.py), while jax by
# itself takes 75 %.
MEMORY = "0.95"
MEMORY_FLAGS = (
    *("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    *("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE"),
)

config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with an argument after a colon.", lock_config=False
)
flags.DEFINE_string(
    "mesh", "auto", "Devices by axis, e.g. data:1,fsdp:-1,tensor:1; one size may be -1. auto: by their kind."
)
flags.DEFINE_enum("stage", "all", ("all", *STAGES), "Run one stage only; those before it must have finished.")
flags.DEFINE_string("workdir", None, "Directory of the run, seen by all hosts; runs/NAME by default.")
flags.DEFINE_string(
    "parent", "", "Workdir of another run whose finished stages are taken over where they agree."
)
flags.DEFINE_string(
    "wandb", "", "Log to this project of Weights & Biases too; WANDB_MODE=offline and the like say how."
)
flags.DEFINE_enum("multihost", "auto", distributed.KINDS, "Who knows the other processes: docs/hosts.md.")
flags.DEFINE_string("coordinator", "", "explicit: HOST:PORT of process 0; else JAX_COORDINATOR_ADDRESS.")
flags.DEFINE_integer("processes", 0, "explicit: how many processes; else NNODES.", lower_bound=0)
flags.DEFINE_integer(
    "process", -1, "explicit: which of them this is, from 0; else NODE_RANK.", lower_bound=-1
)
flags.DEFINE_bool("one_host", False, "explicit: all processes run on this host, so loopback is no mistake.")
flags.DEFINE_integer(
    "join_timeout", distributed.TIMEOUT, "Seconds until all processes have come.", lower_bound=1
)
flags.DEFINE_float("grace", stop.GRACE, "Seconds from SIGTERM to the end, at the latest.", lower_bound=1)


@contextmanager
def timed(work: Workdir, stage: str, about: dict[str, str]):
    """Append what a stage took to timeline.jsonl, also when it was resumed or found finished."""
    logging.info("=== %s", stage)
    begun, clock = time.time(), time.monotonic()
    yield
    if not hosts.is_first():
        return
    line = {"stage": stage, "started": begun, "seconds": time.monotonic() - clock, **about}
    with (work.path / "timeline.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run(
    config: RunConfig,
    workdir: str | Path,
    mesh_text: str,
    stage: str = "all",
    command: str = "",
    parent: str | Path = "",
    wandb: str = "",
) -> Path:
    """Run `stage` (or all) of `config` in `workdir` and return the path of report.html.

    `command` is what the report gives as the way to repeat the run; `parent` the workdir of another run whose
    finished stages are taken over where they are the same; `wandb` a project of Weights & Biases.

    Raises ConfigError or DataError with what to change.
    """
    config.validate()
    if stage in ("sft", "grpo") and stage not in names(config.stages):
        raise ConfigError(f"--stage={stage}, but --config.stages is {config.stages!r}, which leaves it out")
    exact(config.compute)
    resolved = as_json(config)
    wanted = STAGES if stage == "all" else (stage,)
    if mesh_text == "auto":
        choice = auto.choose(config, jax.devices(), wanted)
        logging.info("%s", choice)
        config, mesh_text = choice.apply(config), choice.mesh
    mesh = sharding.parse_mesh(mesh_text)
    check_mesh(config, mesh, [name for name in config.trained if name in wanted])
    work = Workdir(workdir, resolved)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    about = {"device": device, "mesh": ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())}
    about |= {"command": command} if command else {}
    logging.info("%s: %s, mesh %s", work.path, device, about["mesh"])
    heir = inherit.Heir(work, resolved, Path(parent)) if parent else None
    try:
        if wandb:
            work.metrics.join_wandb(wandb, resolved)
        if "data" in wanted:
            with timed(work, "data", about | (heir.take_data() if heir else {})):
                hosts.on_first(lambda: stages.prepare_data(config, work))
        trainer = stages.Trainer(config, work, mesh)
        # Here, and not after days of training: there may be none.
        asked = evaluate.questions(config, work) if "evaluate" in wanted else None
        for name in trainer.plan:
            if name in wanted:
                with timed(work, name, about | (heir.take(name) if heir else {})):
                    trainer.run(name)
        if asked is not None:
            with timed(work, "evaluate", about):
                evaluate.measure(config, work, trainer, *asked)
        if "export" in wanted:
            with timed(work, "export", about):
                stages.export(work, trainer, command)
        hosts.on_first(lambda: write_report(work.path))
        return work.path / "report.html"
    finally:
        work.close()


def claim_memory(environment: MutableMapping[str, str]) -> None:
    """Let jax take MEMORY of each GPU, unless the user has said anything about its memory. It reads this when
    it first asks for a device, and refuses both names of the fraction together."""
    if not any(environment.get(name) for name in MEMORY_FLAGS):
        environment["XLA_CLIENT_MEM_FRACTION"] = MEMORY


def quiet(record: python_logging.LogRecord) -> bool:
    """Log filter: Orbax reports every read and write in a dozen lines, and httpx each request to a server,
    which would bury ours; their warnings stay."""
    return record.levelno > python_logging.INFO or not any(name in record.pathname for name in NOISY)


@contextmanager
def ending():
    """Around a program: what the user has to change ends it with one line and exit code 78, so that no
    scheduler starts it again; a server that stays away, or another run in the workdir, with one and 1; and a
    stop at once."""
    try:
        yield
    except (ConfigError, DataError) as error:
        refuse(error)
    except (LostError, BusyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except SystemExit as stopped:  # by fundus_jax.stop, here or on another process
        distributed.leave()
        logging.flush()
        os._exit(int(stopped.code or 0))  # no thread is waited for: the time is short


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; options are --config, --mesh, --stage, --workdir",
            exitcode=hosts.REFUSED,
        )
    logging.get_absl_handler().addFilter(quiet)
    config: RunConfig = flags.FLAGS.config
    if config is None:
        raise app.UsageError("--config is missing, e.g. --config=configs/demo.py", exitcode=hosts.REFUSED)
    args = flags.FLAGS
    workdir = args.workdir or f"runs/{config.name}"
    explicit = {name: getattr(args, name) for name in ("coordinator", "processes", "process", "one_host")}
    claim_memory(os.environ)
    with ending():
        distributed.initialise(
            distributed.settings(args.multihost, os.environ, **explicit), args.join_timeout
        )
        stop.install(args.grace)
        command = shlex.join(["python", *sys.argv])
        report = run(config, workdir, args.mesh, args.stage, command, args.parent, args.wandb)
    if hosts.is_first():
        print(f"report: {report.resolve()}")


if __name__ == "__main__":
    app.run(main, flags_parser=read_flags)
