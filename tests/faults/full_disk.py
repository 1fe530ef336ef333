"""Fills the disk of a job at many moments; test_full_disk.py starts it with a DIRECTORY on a small disk.

Prints the number of times that the job stopped because of it, and the places.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

from data_pipeline import jobs
from fundus_jax.records import ConfigError
from tests.chat_server import Reply, Server
from tests.data_pipeline import asked_job
from tests.faults.test_asking_kill import contents

PAGE = 4096


def fill(path: Path, spare: int) -> None:
    """Let `path` take all of the disk but `spare` pages."""
    with path.open("wb", buffering=0) as stream:
        for size in (1 << 20, PAGE):
            try:
                for _ in itertools.count():
                    stream.write(bytes(size))
            except OSError:
                pass  # full, as wanted
        stream.truncate(max(0, os.path.getsize(path) // PAGE - spare) * PAGE)


def main(folder: Path) -> None:
    """Fill, stop, make room, resume; at several moments, with several pages left."""
    at = spare = 0

    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == at:
            fill(folder / "filler", spare)
        return Reply(texts=[f'{{"count": {sum(body["messages"][0]["content"].encode()) % 1000}}}'])

    stops, places = 0, set()
    jobs.HEADROOM = 0  # it would refuse this small disk at once
    with Server(reply) as server:
        at = -1
        asked_job.run(folder / "whole", server.address)
        whole, requests = contents(folder / "whole"), len(server.bodies)
        for moment, spare in itertools.product((0, 45, 130), (0, 1, 3, 6)):  # noqa: B007 - for `reply`
            out = folder / f"{moment}-{spare}"
            before = len(server.bodies)
            at = before + moment
            try:
                asked_job.run(out, server.address)
            except ConfigError as error:
                stops += 1
                places.add(re.sub(r".*the disk is full .*?(?:'.*/([^/]*)')?\).*", r"\1", str(error)))
            at = -1
            (folder / "filler").unlink(missing_ok=True)
            asked_job.run(out, server.address)
            assert contents(out) == whole
            # Under way when it stopped, and one answer torn by it: these are asked for again.
            assert len(server.bodies) - before - requests <= 2 * asked_job.CONCURRENCY
    print(stops, *sorted(places), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
