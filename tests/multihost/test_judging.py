"""Two processes judge a step as one does; and where the judge of one is lost, both say so."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.chat_server import Reply, Server
from tests.e2e.conftest import ROOT, environment
from tests.grpo import stand_in


def start(cache: Path, addresses: list[list[str]]) -> list[list[dict[str, Any]]]:
    """What as many processes as there are lists print, each with its own addresses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "tests.multihost.judging_worker", coordinator, str(len(addresses))]
    started = [
        subprocess.Popen(
            [*words, str(number), *mine], cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, text=True
        )
        for number, mine in enumerate(addresses)
    ]
    try:
        said = [process.communicate(timeout=500)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
    return [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in said]


def test_two_processes_judge_together(tmp_path: Path) -> None:
    servers = Server(stand_in.reply), Server(stand_in.reply), Server(lambda body, number: Reply(status=401))
    with servers[0] as server, servers[1] as gone, servers[2] as closed:
        there, away, locked = server.address, gone.address, closed.address
        gone.stop()
        [[alone]] = start(tmp_path, [[there]])
        asked = len(server.bodies)
        first, second = start(tmp_path, [[there, there, away], [there, away, locked]])
    assert asked == 10
    assert len({score[0] for group in alone["scores"] for score in group}) > 1, "the traces differ in worth"
    assert first[0] == second[0] == alone
    assert len(server.bodies) == asked + 10 + 6, "each is judged once; then only the first process's share"
    assert first[1:] == second[1:]
    lost, refused = (one["given up"] for one in first[1:])
    assert re.search("^LostError: .*has been lost", lost), "although the first process's own judge was there"
    assert re.search("^JudgeError: .*answers 401", refused), "although the first process's was only away"
