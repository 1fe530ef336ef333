"""Which part of a job this process does: as --shard says, or as a cluster numbers the pieces of a job.

    a Kubernetes Job with completionMode: Indexed   JOB_COMPLETION_INDEX of FUNDUS_PARTS, which you set
    a Slurm array, --array=0-7                      SLURM_ARRAY_TASK_ID of SLURM_ARRAY_TASK_COUNT
    SkyPilot, num_nodes: 8                          SKYPILOT_NODE_RANK of SKYPILOT_NUM_NODES

The first that is set counts. Neighbours: `jobs.run` takes every n-th shard, the commands have the flag.
"""

import os
import re
from collections.abc import Mapping, Sequence

from absl import logging

from fundus_jax.records import ConfigError

HELP = "i/n: every n-th shard from the i-th on. Empty: as Kubernetes, Slurm or SkyPilot number it, else all."
WHOLE = "0/1"
COUNT = "FUNDUS_PARTS"
INDEXED = (
    ("JOB_COMPLETION_INDEX", COUNT, f"set {COUNT} to the Job's completions"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "submit it with --array=0-LAST"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "launch it with num_nodes"),
)


def chosen(given: str, environment: Mapping[str, str] = os.environ) -> str:
    """The part "i/n" of this process; logged, with where it is from.

    Args:
        given: the flag; "" leaves it to the environment.

    Raises ConfigError for what is no part: a cluster's numbers that do not run from 0 to n - 1 would leave
    shards to nobody.
    """
    part, source = given, "--shard"
    if not part:
        part, source = _indexed(environment)
    parse(part, source)
    if part != WHOLE:
        logging.info("part %s of the job, as %s says", part, source)
    return part


def _indexed(environment: Mapping[str, str]) -> tuple[str, str]:
    """Part and source, as the cluster has it."""
    for index, count, remedy in INDEXED:
        if not environment.get(index):
            continue
        if not environment.get(count):
            raise ConfigError(f"{index} is set and {count} is not: {remedy}, or give --shard=i/n")
        if index.startswith("SLURM"):
            _whole_array(environment, remedy)
        return f"{environment[index]}/{environment[count]}", f"{index} with {count}"
    return WHOLE, "nothing"


def _whole_array(environment: Mapping[str, str], remedy: str) -> None:
    """Raise ConfigError for --array=3 or 0,5: one element by itself would take itself for the whole job."""
    count = environment["SLURM_ARRAY_TASK_COUNT"]
    ends = tuple(environment.get(f"SLURM_ARRAY_TASK_{end}", "") for end in ("MIN", "MAX"))
    if ends != ("0", str(int(count) - 1)):
        raise ConfigError(
            f"the Slurm array has {count} elements from {ends[0]} to {ends[1]}; {remedy}, or give --shard=i/n"
        )


def parse(part: str, source: str = "shard") -> tuple[int, int]:
    """i and n of "i/n". Raises ConfigError unless 0 <= i < n."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"{source} is {part!r}: write i/n with 0 <= i < n, as in {WHOLE}")
    return int(found[1]), int(found[2])


def take(names: Sequence[str], part: str) -> set[str]:
    """Those of the shards' names that a part does: every n-th of the sorted ones, from the i-th on."""
    index, count = parse(part)
    return set(sorted(names)[index::count])
