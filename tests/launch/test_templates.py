"""The templates for training on clusters: every one starts the same line, in a form that its reader accepts.

Those for the data pipeline have tests of their own, test_data_templates.py.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fundus_jax import hosts
from launch.distributed import settings
from tests.conftest import ROOT

LINE = "python launch/run.py --config=CONFIG --mesh=MESH --workdir=WORKDIR"
TEMPLATES = sorted(
    path for path in (ROOT / "launch" / "templates").iterdir() if not path.name.startswith("data_jobs")
)


def shell(text: str) -> None:
    """Fails where bash can not read `text`."""
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert not read.returncode, read.stderr


def test_all_are_there() -> None:
    assert [path.name for path in TEMPLATES] == [
        *("jobset.yaml", "skypilot.yaml", "slurm.sbatch", "tpu_vm.sh", "xpk.sh")
    ]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_every_template_starts_the_same_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    code = re.sub(r"[\s\\]+", " ", " ".join(lines))
    assert code.count(LINE) == 1
    assert str(path.relative_to(ROOT)) in text, "the head gives the command"
    flags = re.findall(r"--(\w+)=", code.split(LINE)[1])
    defined = (ROOT / "launch" / "run.py").read_text(encoding="utf-8")
    assert all(f'"{flag}"' in defined for flag in flags)


@pytest.mark.parametrize("path", [p for p in TEMPLATES if p.suffix != ".yaml"], ids=lambda path: path.name)
def test_bash_reads_the_scripts(path: Path) -> None:
    shell(path.read_text(encoding="utf-8"))


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / "launch" / "templates" / name).read_text(encoding="utf-8"))


def test_skypilot_tells_the_nodes_apart() -> None:
    task = read("skypilot.yaml")
    assert task["num_nodes"] > 1
    shell(task["setup"])
    shell(task["run"])
    shown = task["run"].rsplit("exec", 1)[0].replace("source", ": ")
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-c", f"{shown}\nenv"], env=nodes, capture_output=True, text=True, check=True
    )
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    found = settings("auto", environment)
    assert (found.coordinator, found.processes, found.process) == ("10.0.0.7:8476", 2, 1)


def test_jobset_tells_the_pods_apart() -> None:
    jobset = read("jobset.yaml")["spec"]
    job = jobset["replicatedJobs"][0]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    shell(container["args"][0])
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(given["JOBSET_PODS"]) == spec["parallelism"] == spec["completions"]
    assert jobset["coordinator"] == {"replicatedJob": job["name"], "jobIndex": 0, "podIndex": 0}
    grace = int(re.findall(r"--grace=(\d+)", container["args"][0])[0])
    assert grace < pod["terminationGracePeriodSeconds"], "Kubernetes would kill it before it has left"
    # JobSet and Indexed Jobs fill in the rest, as launch.distributed expects it.
    pods = {
        "JOBSET_COORDINATOR": "fundus-workers-0-0.fundus",
        "JOBSET_JOB_INDEX": "0",
        "JOB_COMPLETION_INDEX": "1",
    }
    assert given.keys() >= pods.keys() - {"JOB_COMPLETION_INDEX"}
    found = settings("auto", pods | {"JOBSET_PODS": given["JOBSET_PODS"]})
    assert (found.coordinator, found.processes, found.process) == ("fundus-workers-0-0.fundus:8476", 2, 1)


def test_what_has_to_be_changed_is_not_started_again() -> None:
    """Exit code 78 ends a JobSet, and no other one does: hosts that lost one leave with 1."""
    jobset = read("jobset.yaml")["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = jobset["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a pod failure policy asks for it"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]) == (
        "FailJob",
        {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [hosts.REFUSED]},
    )
    assert read("skypilot.yaml")["resources"]["job_recovery"] == {"recover_on_exit_codes": [143]}
