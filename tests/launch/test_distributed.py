"""Environments to settings: what Slurm, JobSet and explicit flags say, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import jax
import pytest

from fundus_jax.records import ConfigError
from launch.distributed import Settings, detect, initialise, is_loopback, settings

# Two nodes, as srun tells each process; one process a node.
NODE = {
    **{"SLURM_JOB_ID": "70001", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_STEP_NUM_NODES": "2"},
    **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"},
    **{"SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8"},
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
# The same nodes; one process a GPU.
GPU = NODE | {
    **{"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "11"},
    **{"SLURM_LOCALID": "3", "SLURM_NODEID": "1"},
}
POD = {
    **{"JOBSET_COORDINATOR": "run-workers-0-0.run", "JOBSET_PODS": "4", "JOBSET_JOBS": "2"},
    **{"JOBSET_JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "2"},
}
MAXTEXT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.5:1234", "NNODES": "3", "NODE_RANK": "2"}
ANY = "0.0.0.0"  # noqa: S104
FIRST = f"gpu003:{61440 + 70001 % 4096}"


SPREAD = GPU | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
ONE_NODE = NODE | {"SLURM_STEP_NODELIST": "gpu003", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
BARE = {name: text for name, text in GPU.items() if "GPU" not in name and "CUDA" not in name}
ROWS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "a node each": (NODE, {"processes": 2, "process": 1}),
    "a GPU each": (GPU, {"processes": 16, "process": 11, "devices": (3,)}),
    "a GPU each, bound by Slurm": (GPU | {"CUDA_VISIBLE_DEVICES": "0"}, {"processes": 16, "process": 11}),
    "half a node each": (
        SPREAD | {"SLURM_LOCALID": "1", "SLURM_PROCID": "3"},
        {"processes": 4, "process": 3, "devices": (4, 5, 6, 7)},
    ),
    "an uneven last node": (
        GPU | {"SLURM_STEP_TASKS_PER_NODE": "12,4", "SLURM_PROCID": "13", "SLURM_LOCALID": "1"},
        {"processes": 16, "process": 13, "devices": (2, 3)},
    ),
    "one node": (
        ONE_NODE | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"},
        {"processes": 2, "process": 1, "devices": (4, 5, 6, 7), "one_host": True},
    ),
    "no GPUs": (BARE, {"processes": 16, "process": 11}),
    "jobset": (POD, {"coordinator": "run-workers-0-0.run:8476", "processes": 8, "process": 6}),
    "explicit": (MAXTEXT, {"coordinator": "10.0.0.5:1234", "processes": 3, "process": 2}),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_environment_says_who_is_who(name: str) -> None:
    environment, wanted = ROWS[name]
    assert settings("auto", environment) == Settings(**({"coordinator": FIRST} | wanted))


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "none"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, "none"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
        (POD | {"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, "none"),  # the batch script itself, without srun
        (NODE | {"SLURM_STEP_NUM_TASKS": "1"}, "none"),
        (NODE, "slurm"),
        (POD, "jobset"),
        (NODE | MAXTEXT, "explicit"),
    ],
)
def test_auto_sees_the_kind(environment: dict[str, str], kind: str) -> None:
    assert detect(environment) == kind


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST.", "[::1]", ANY, "::"])
def test_a_loopback_coordinator_of_several_hosts_is_refused(host: str) -> None:
    assert is_loopback(host)
    given: dict[str, Any] = {"coordinator": f"{host}:99", "processes": 2, "process": 0}
    with pytest.raises(ConfigError, match="loopback address, which other hosts can not reach.*--one_host"):
        settings("explicit", {}, **given)
    assert settings("explicit", {}, **given, one_host=True) == Settings(**given, one_host=True)
    assert settings("explicit", {}, **given | {"processes": 1}) == Settings(**given | {"processes": 1})


@pytest.mark.parametrize("host", ["10.0.0.1", "gpu003", "localhost3.cluster.example", "[fd00::1]"])
def test_other_addresses_are_fine(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("kind", "environment", "flags", "complaint"),
    [
        ("slurm", {}, {}, "SLURM_STEP_NUM_TASKS is not in the environment; start the line with srun"),
        ("slurm", NODE | {"SLURM_STEP_NODELIST": "localhost"}, {}, "localhost:.* is a loopback address"),
        (
            "slurm",
            GPU | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"},
            {},
            "3 processes .* can not share 8 GPUs evenly",
        ),
        ("jobset", POD | {"JOB_COMPLETION_INDEX": "x"}, {}, "JOB_COMPLETION_INDEX is 'x'"),
        ("jobset", POD | {"JOBSET_JOBS": "1"}, {}, "process 6 of 4"),
        ("explicit", {}, {}, "JAX_COORDINATOR_ADDRESS is not in the environment; or give --coordinator"),
        ("explicit", {}, {"coordinator": "a:1"}, "NNODES is not in the environment; or give --processes"),
        ("explicit", MAXTEXT, {"coordinator": "host"}, "'host'; give HOST:PORT"),
        ("explicit", MAXTEXT, {"process": 3}, "process 3 of 3"),
        ("none", {}, {"coordinator": "a:1"}, "--coordinator belongs to --multihost=explicit, which is none$"),
        # Without a word each of them would run alone, in one workdir.
        (
            "auto",
            {},
            {"processes": 2, "process": 0},
            "--processes, --process belongs .* none; give --coord",
        ),
        ("auto", NODE, {"process": 0}, "--process belongs .* is slurm; give --coordinator=HOST:PORT"),
    ],
)
def test_what_does_not_fit_is_said(kind: str, environment: dict, flags: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        settings(kind, environment, **flags)


def test_a_process_that_comes_too_late_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another start may bring it. Where jaxlib ends the process itself, the log has said what was awaited."""

    def late(*which: Any, **_: Any) -> None:
        raise RuntimeError(f"DEADLINE_EXCEEDED, {which[0]}")

    monkeypatch.setattr(jax.distributed, "initialize", late)
    given = Settings(coordinator="a:1", processes=2, process=0)
    message = r"could not join the processes of .*'a:1'.* in 9 s \(DEADLINE_EXCEEDED, a:1\)"
    with caplog.at_level(logging.INFO, logger="absl"), pytest.raises(RuntimeError, match=message):
        initialise(given, 9)
    assert f"joining {given}; after 9 s (--join_timeout) that is given up" in caplog.messages


def test_flags_go_before_the_environment() -> None:
    found = settings("auto", NODE | MAXTEXT, coordinator="a:1", processes=5, process=0)
    assert found == Settings(coordinator="a:1", processes=5, process=0)
    assert settings("none", NODE) == "none"
