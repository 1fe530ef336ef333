"""A process that is asked to stop is gone in time, whatever has become of the first one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import ROOT, environment

GRACE = 3.0
PROGRAM = """
import sys, time, jax
from fundus_jax import stop

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=200)
jax.devices()
stop.install(float(sys.argv[3]))
with stop.deferred():
    print("up", flush=True)
    time.sleep(1000)
"""


def test_a_process_does_not_wait_for_a_frozen_one_to_be_told(tmp_path: Path) -> None:
    """As where the first host hangs, or the network between them is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, coordinator, str(number), str(GRACE)],
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    first, second = started
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
        first.send_signal(signal.SIGSTOP)
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=GRACE + 15) == 128 + signal.SIGTERM
    finally:
        for process in started:
            process.kill()
