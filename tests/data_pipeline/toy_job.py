"""A small job as a program of its own, for the tests to kill: items become Findings records, one is bad.

python -m tests.data_pipeline.toy_job OUT [workers] [seconds an item]
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipeline import jobs
from fundus_jax.records import Findings

SHARDS, ITEMS = 4, 30


def shards(salt: str = "") -> list[jobs.ShardInput]:
    return [
        jobs.ShardInput(name=f"toy-{s:05d}", key=f"{salt}{s}", items=range(s * ITEMS, (s + 1) * ITEMS))
        for s in range(SHARDS)
    ]


def process(shard: jobs.ShardInput, scratch: Path, *, pause: float = 0.0) -> Iterator[object]:
    for item in shard.items:
        time.sleep(pause)
        if item == 17:
            yield jobs.Quarantine(f"item {item}", "is seventeen")
        else:
            yield Findings(example=f"item {item}", present=(), votes={}, n=0, origin="pixels")
    (scratch / f"{shard.name}.bin").write_bytes(bytes(shard.items))


def main(out: str, workers: str = "1", pause: str = "0") -> None:
    job = jobs.Job("toy", {"size": 3, "model": {"name": "none"}})
    summary = jobs.run(job, shards(), partial(process, pause=float(pause)), Path(out), workers=int(workers))
    print(summary.shards_done, summary.shards_skipped, summary.answers, summary.quarantined)


if __name__ == "__main__":
    main(*sys.argv[1:])
