"""The templates for the data pipeline: one line, parts that cover the job, servers that the client takes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from data_pipeline import parts
from fundus_jax.chat import ChatConfig
from tests.conftest import ROOT

LINE = "python -m data_pipeline.STAGE FLAGS"
FOLDER = ROOT / "launch" / "templates"
TEMPLATES = sorted(FOLDER.glob("data_jobs*"))


def servers(text: str) -> tuple[str, ...]:
    return ChatConfig(address=text, model="m").urls("server")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_every_template_starts_the_same_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert code.count(LINE) == 1
    assert str(path.relative_to(ROOT)) in text, "the head gives the command"
    assert "FUNDUS_SERVER" in code


def test_kubernetes() -> None:
    assert len(TEMPLATES) == 3
    service, replicas, job = yaml.safe_load_all((FOLDER / "data_jobs.yaml").read_text(encoding="utf-8"))
    pod = replicas["spec"]["template"]
    name, count = replicas["metadata"]["name"], replicas["spec"]["replicas"]
    [port] = [one["port"] for one in service["spec"]["ports"]]
    assert service["spec"]["clusterIP"] == "None", "else the replicas have no names"
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert replicas["spec"]["serviceName"] == service["metadata"]["name"]
    assert f"--port={port}" in pod["spec"]["containers"][0]["command"]

    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    expected = tuple(f"http://{name}-{i}.{service['metadata']['name']}:{port}/v1" for i in range(count))
    assert servers(given["FUNDUS_SERVER"]) == expected
    assert spec["completionMode"] == "Indexed"
    pods = [given | {"JOB_COMPLETION_INDEX": f"{i}"} for i in range(spec["completions"])]
    covered = [parts.chosen("", pod) for pod in pods]
    assert covered == [f"{i}/{len(pods)}" for i in range(len(pods))]
    subprocess.run(["bash", "-n"], input=container["args"][0], text=True, check=True)


FAKE = """#!/usr/bin/env bash
echo "$(basename "$0") $* gpu=${CUDA_VISIBLE_DEVICES:-} server=${FUNDUS_SERVER:-}" >> "$LOG"
case "$0 $*" in *vllm*) exec sleep 60 ;; *data_pipeline*) exec sleep "$SECONDS_OF_WORK" ;; esac
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A repository in which every program only says how it was called."""
    for name in (".venv/bin", ".venv-vllm/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    for name in (".venv/bin/python", ".venv-vllm/bin/vllm", ".venv/bin/scontrol"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(script: str, here: Path, seconds: str, **environment: str) -> subprocess.Popen[bytes]:
    """Run a script with those programs in their place."""
    text = script.replace("REPOSITORY", str(here))
    path = f"{here}/.venv/bin:{os.environ['PATH']}"
    known = {"PATH": path, "LOG": str(here / "log"), "SECONDS_OF_WORK": seconds}
    return subprocess.Popen(["bash", "-c", text], cwd=here, env=known | environment, start_new_session=True)


def calls(here: Path) -> list[str]:
    return (here / "log").read_text(encoding="utf-8").splitlines() if (here / "log").exists() else []


def check(here: Path, gpus: int) -> None:
    """Each GPU has a server, and the stage is given all of them."""
    served = sorted(line for line in calls(here) if line.startswith("vllm"))
    ports = [re.findall(r"--port=(\d+)", line)[0] for line in served]
    assert [re.findall(r"gpu=(\d*)", line)[0] for line in served] == [f"{i}" for i in range(gpus)]
    [stage] = [line for line in calls(here) if line.startswith("python -m data_pipeline.STAGE")]
    assert servers(stage.split("server=")[1]) == tuple(f"http://127.0.0.1:{port}/v1" for port in ports)


def left(session: int) -> list[str]:
    """What still runs of a script that has ended: a killed process may take a moment."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for one in psutil.process_iter(["pid", "status", "cmdline"]):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(one.pid) == session and one.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(one.info["cmdline"]))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_slurm(here: Path) -> None:
    text = (FOLDER / "data_jobs.sbatch").read_text(encoding="utf-8")
    [last] = re.findall(r"#SBATCH --array=0-(\d+)", text)
    count = int(last) + 1
    ends = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": last, "SLURM_ARRAY_TASK_COUNT": f"{count}"}
    covered = [parts.chosen("", ends | {"SLURM_ARRAY_TASK_ID": f"{i}"}) for i in range(count)]
    assert covered == [f"{i}/{count}" for i in range(count)]

    process = start(text, here, "0.5", SLURM_JOB_ID="4711", SLURM_GPUS_ON_NODE="2")
    assert process.wait(timeout=300) == 0
    check(here, gpus=2)
    assert left(process.pid) == [], "the servers end with the stage"


def test_slurm_asks_for_another_turn_when_time_is_up(here: Path) -> None:
    text = (FOLDER / "data_jobs.sbatch").read_text(encoding="utf-8")
    process = start(text, here, "60", SLURM_JOB_ID="4711", SLURM_GPUS_ON_NODE="1")
    deadline = time.monotonic() + 30
    while len(calls(here)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 0
    assert any(line.startswith("scontrol requeue 4711 ") for line in calls(here))
    assert left(process.pid) == []


def test_skypilot(here: Path) -> None:
    task: dict[str, Any] = yaml.safe_load((FOLDER / "data_jobs.skypilot.yaml").read_text(encoding="utf-8"))
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    nodes = [
        {"SKYPILOT_NODE_RANK": f"{i}", "SKYPILOT_NUM_NODES": f"{task['num_nodes']}"}
        for i in range(task["num_nodes"])
    ]
    assert [parts.chosen("", node) for node in nodes] == [f"{i}/{len(nodes)}" for i in range(len(nodes))]
    process = start(task["run"], here, "0.5", SKYPILOT_NUM_GPUS_PER_NODE="2", **nodes[1])
    assert process.wait(timeout=300) == 0
    check(here, gpus=2)
    assert left(process.pid) == []
