"""A job that is given again, for the tests to watch: prints which files it opened, and the most memory that
Python's objects took, in bytes.

python -m tests.data_pipeline.resumed_job FOLDER
"""

import json
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from data_pipeline import jobs, stages
from fundus_jax.records import Findings


def second(folder: Path) -> jobs.Summary:
    """The records of FOLDER/first once more, in FOLDER/second."""
    return jobs.run(
        jobs.Job("second", {}), stages.shards(folder / "first", Findings), same, folder / "second"
    )


def same(shard: jobs.ShardInput, scratch: Path) -> Sequence[Findings]:
    del scratch  # no side files
    return shard.items  # type: ignore[return-value]


def main(folder: str) -> None:
    opened: set[str] = set()
    sys.addaudithook(lambda event, told: opened.add(str(told[0])) if event == "open" else None)
    tracemalloc.start()
    second(Path(folder))
    peak = tracemalloc.get_traced_memory()[1]
    print(json.dumps({"opened": sorted(one for one in opened if one.startswith(folder)), "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
