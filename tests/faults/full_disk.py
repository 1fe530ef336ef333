"""Fills the disk of a job at many moments; test_full_disk.py starts it with a DIRECTORY on a small disk.

Prints the number of times that the job stopped because of it.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

from data_pipeline import faults, jobs
from fundus_jax.records import ConfigError
from tests.chat_server import Reply, Server
from tests.data_pipeline import asked_job
from tests.faults.test_asking_kill import contents

PAGE = 4096
# When: at an answer, or between two steps of publishing a shard. And how many pages are left.
MOMENTS = [
    *(("answer", 0), ("answer", 2), ("before_process", 0), ("after_process", 0), ("before_manifest", 0)),
]


class Disk:
    """Fills itself at `moment`, once, up to `spare` pages."""

    def __init__(self, filler: Path) -> None:
        self.filler, self.moment, self.spare = filler, "", 0

    def hit(self, name: str) -> None:
        """Something happens that is called `name`."""
        if name != self.moment:
            return
        self.moment = ""
        with self.filler.open("wb", buffering=0) as stream:
            for size in (1 << 20, PAGE):
                try:
                    for _ in itertools.count():
                        stream.write(bytes(size))
                except OSError:
                    pass  # full, as wanted
            stream.truncate(max(0, os.path.getsize(self.filler) // PAGE - self.spare) * PAGE)


def main(folder: Path) -> None:
    """Fill, stop, make room, resume."""
    disk = Disk(folder / "filler")
    faults.hit = disk.hit
    jobs.HEADROOM = -1 << 30  # the disk is looked at before any work, and this one would not do

    def reply(body: dict[str, Any], number: int) -> Reply:
        if number % 45 == 44:
            disk.hit("answer")
        return Reply(texts=[f'{{"count": {sum(body["messages"][0]["content"].encode()) % 1000}}}'])

    inputs, stops = asked_job.shards(4), 0
    with Server(reply) as server:
        asked_job.run(folder / "whole", server.address, inputs=inputs)
        whole, requests = contents(folder / "whole"), len(server.bodies)
        for number, (disk.moment, disk.spare) in enumerate(MOMENTS):
            out, before = folder / f"{number}", len(server.bodies)
            try:
                asked_job.run(out, server.address, inputs=inputs)
            except ConfigError as error:
                stops += "the disk is full" in str(error)
            disk.filler.unlink()
            asked_job.run(out, server.address, inputs=inputs)
            assert contents(out) == whole
            # Under way when it stopped, and the answer that was torn by it: these are asked for again.
            assert len(server.bodies) - before - requests <= asked_job.CONCURRENCY + 1
    print(stops)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
