"""Joins the processes of a run, on TPU pods, Slurm, Kubernetes or anywhere, before jax touches a device.

`--multihost` says who knows where the processes are: `auto` looks at the environment, `none` is one process
whatever the environment says. Each kind is a function from an environment to `Settings`; TPU pods are jax's
own matter, since their runtime knows best. docs/hosts.md has the table of variables and the templates.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from absl import logging

from fundus_jax.records import ConfigError

KINDS = ("auto", "none", "tpu", "slurm", "jobset", "explicit")
PORT = 8476
TIMEOUT = 300  # seconds until all processes have come

Environment = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What jax.distributed.initialize needs to know.

    coordinator: HOST:PORT of process 0. devices: which of the accelerators that it sees this process takes;
    None takes all. one_host: all processes are known to run on one host.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    one_host: bool = False

    def validate(self) -> None:
        """Raises ConfigError for numbers that do not fit, and for a loopback coordinator of several hosts."""
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"process {self.process} of {self.processes}: count from 0 to below the number")
        host, colon, port = self.coordinator.rpartition(":")
        if not colon or not host or not port.isdigit():
            raise ConfigError(f"the coordinator is {self.coordinator!r}; give HOST:PORT of process 0")
        if self.processes > 1 and not self.one_host and is_loopback(host):
            raise ConfigError(
                f"the coordinator {self.coordinator} is a loopback address, which other hosts can not reach; "
                "give process 0's address in their network, or --one_host if all processes run on this one"
            )


def is_loopback(host: str) -> bool:
    """Whether an address leads every host to itself: localhost, 127.*, ::1, or the unspecified 0.0.0.0 and
    ::."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost") or host.startswith("localhost."):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def detect(environment: Environment) -> str:
    """The kind of cluster that an environment belongs to; `none` where a single process was started."""
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1 or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "tpu"
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return "explicit"
    if environment.get("JOBSET_COORDINATOR"):
        return "jobset"
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return "slurm"
    return "none"


def slurm(environment: Environment) -> Settings:
    """One process a node or one a GPU, as `srun` started them; the first node coordinates.

    jax's own detection takes one GPU a process (maxtext issue 865); here the processes of a node share all
    GPUs that it gave to the job, unless Slurm has bound them to each already.
    """
    processes = _number(environment, "SLURM_STEP_NUM_TASKS", "start the line with srun")
    node = _first_node(_text(environment, "SLURM_STEP_NODELIST", "start the line with srun"))
    local = _number(environment, "SLURM_LOCALID", "start the line with srun")
    here = _tasks_here(environment, processes)
    visible = [part for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or len(visible))
    seen = len(visible) or on_node
    devices = None
    if here > 1 and seen > 1 and seen * here > on_node:  # every process of the node sees the same ones
        if seen % here:
            raise ConfigError(
                f"{here} processes on this node can not share {seen} GPUs evenly; choose --ntasks-per-node "
                f"as 1 or as a divisor of {seen}"
            )
        share = seen // here
        devices = tuple(range(local * share, (local + 1) * share))
    job = int(environment.get("SLURM_JOB_ID") or 0)
    return Settings(
        coordinator=f"{node}:{61440 + job % 4096}",  # jobs on one node get ports of their own
        processes=processes,
        process=_number(environment, "SLURM_PROCID", "start the line with srun"),
        devices=devices,
        one_host=_number(environment, "SLURM_STEP_NUM_NODES", "start the line with srun") == 1,
    )


def _first_node(names: str) -> str:
    """The first of `node[003-007,9],other2`."""
    matched = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", names)
    if not matched:
        raise ConfigError(f"SLURM_STEP_NODELIST is {names!r}; it should begin with the name of a node")
    return matched[1] + (matched[2] or "")


def _tasks_here(environment: Environment, processes: int) -> int:
    """Processes on this node, from `2(x3),1` and the node's number."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", str(processes)).split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not matched:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE has {part!r}; expected N or N(xTIMES)")
        counts += [int(matched[1])] * int(matched[2] or 1)
    return counts[min(int(environment.get("SLURM_NODEID") or 0), len(counts) - 1)]


def jobset(environment: Environment) -> Settings:
    """The pods of a Kubernetes JobSet, one process each; launch/templates/jobset.yaml sets the variables."""
    remedy = "set it as launch/templates/jobset.yaml does"
    pods = _number(environment, "JOBSET_PODS", remedy)
    jobs = int(environment.get("JOBSET_JOBS") or 1)
    index = _number(environment, "JOB_COMPLETION_INDEX", "use completionMode: Indexed")
    return Settings(
        coordinator=f"{_text(environment, 'JOBSET_COORDINATOR', remedy)}:{PORT}",
        processes=jobs * pods,
        process=int(environment.get("JOBSET_JOB_INDEX") or 0) * pods + index,
    )


def explicit(
    environment: Environment,
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    one_host: bool = False,
) -> Settings:
    """By flags, and where they are silent by JAX_COORDINATOR_ADDRESS, NNODES and NODE_RANK."""
    return Settings(
        coordinator=coordinator or _text(environment, "JAX_COORDINATOR_ADDRESS", "or give --coordinator"),
        processes=processes or _number(environment, "NNODES", "or give --processes"),
        process=process if process >= 0 else _number(environment, "NODE_RANK", "or give --process"),
        one_host=one_host,
    )


def _text(environment: Environment, name: str, remedy: str) -> str:
    if not environment.get(name):
        raise ConfigError(f"{name} is not in the environment; {remedy}")
    return environment[name]


def _number(environment: Environment, name: str, remedy: str) -> int:
    text = _text(environment, name, remedy)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"{name} is {text!r} in the environment; it must be a whole number")
    return int(text)


def settings(
    kind: str,
    environment: Environment,
    *,
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    one_host: bool = False,
) -> Settings | str:
    """The settings of a kind of KINDS; "tpu" where jax finds them itself, "none" for one process alone.

    Raises ConfigError naming the variable that is missing, or what does not fit.
    """
    if kind == "auto":
        kind = "explicit" if coordinator else detect(environment)
    flags = {"--coordinator": bool(coordinator), "--processes": processes > 0, "--process": process >= 0}
    given = ", ".join(name for name, there in flags.items() if there)
    if given and kind != "explicit":
        remedy = "" if coordinator else "; give --coordinator=HOST:PORT of process 0 too"
        raise ConfigError(f"{given} belongs to --multihost=explicit, which is {kind}{remedy}")
    if kind in ("tpu", "none"):
        return kind
    if kind == "explicit":
        found = explicit(environment, coordinator, processes, process, one_host)
    else:
        found = {"slurm": slurm, "jobset": jobset}[kind](environment)
    found.validate()
    return found


def initialise(found: Settings | str, timeout: int = TIMEOUT) -> None:
    """Join the other processes, and say once in each what it is and has. Call it before anything asks jax for
    a device.

    Raises RuntimeError when the processes do not come together within `timeout` seconds: a late one may be
    there when all are started again. jaxlib (0.10, 0.12) rather aborts then, which is exit code 134. Raises
    ConfigError for one process alone in a pod of several.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from fundus_jax.stop
    join = functools.partial(
        jax.distributed.initialize, initialization_timeout=timeout, shutdown_timeout_seconds=30
    )
    if found != "none":
        logging.info("joining %s; after %d s (--join_timeout) that is given up", found, timeout)
    try:
        if found == "tpu":
            join()
        elif isinstance(found, Settings):
            which = (found.coordinator, found.processes, found.process, found.devices)
            join(*which, cluster_detection_method="deactivate")
    except RuntimeError as error:
        raise RuntimeError(
            f"could not join the processes of {found} in {timeout} s ({error}); is process 0 running, and "
            "can the others reach its address? --join_timeout waits longer"
        ) from error
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is one of {jax.process_count()} processes of a TPU pod, and --multihost is none: "
            "give --multihost=tpu on every host"
        )
    here, kind = jax.local_device_count(), jax.devices()[0].device_kind
    logging.info(
        "process %d of %d on %s: %d of %d devices, %s",
        jax.process_index(), jax.process_count(), socket.gethostname(), here, jax.device_count(), kind,
    )  # fmt: skip


def leave() -> None:
    """Wait for the other processes and part, so that none takes an exit of another for a failure."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
