"""Two processes on loopback, with two devices each, do what one with four does; a run moves between them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import ROOT, environment
from tests.run_worker import STUCK, command

STOPPED = 128 + 15
IN_TIME = 25  # seconds that clouds give at least
EXAM = [f"--config.exam.{name}={value}" for name, value in {"every": 4, "part": 0.2, "questions": 5}.items()]


def start(workdir: Path, cache: Path, processes: int, stop_at: str = "") -> list[int]:
    """Exit codes of the run in `workdir` on so many processes; the last gets SIGTERM at `stop_at`. At a name
    of `run_worker.STUCK` all are stuck."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--mesh=data:2,fsdp:2", "--config.grpo.extra_draws=1", *EXAM]
    if processes > 1:
        words += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", "--one_host"]
    started, log = [], Path()
    try:
        for number in range(processes):
            more = [stop_at] if stop_at in STUCK or (stop_at and number == processes - 1) else []
            more += [*words, f"--process={number}"] if processes > 1 else words
            log = workdir.parent / f"{workdir.name}-{processes}-{number}.log"
            env = environment(cache, 4 // processes)
            words_here = command(workdir, *more)
            with log.open("w") as file:
                started.append(subprocess.Popen(words_here, cwd=ROOT, env=env, stdout=file, stderr=file))
        if stop_at in STUCK:
            wait_for(f"stuck at {stop_at}", log, started[-1])
            started[-1].send_signal(signal.SIGTERM)
        return [process.wait(timeout=IN_TIME if stop_at in STUCK else 400) for process in started]
    finally:
        for process in started:
            process.kill()


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Until `process` has written it; at most 200 s."""
    deadline = time.monotonic() + 200
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"never came to: {text}"
        time.sleep(0.05)


def saved(workdir: Path) -> list[int]:
    """The steps of the bundles."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def lines(workdir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock wrote, and a compiler."""
    told = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith(("time/", "compiles"))}
        for line in told
    ]


def said(path: Path) -> list[dict[str, object]]:
    """predictions.jsonl without log-probabilities, whose last digits depend on the devices."""
    return [{**json.loads(line), "logprob": None} for line in path.read_text().splitlines()]


@pytest.mark.timeout(1800)  # about two minutes of two processors, which others may want too
def test_two_processes_do_what_one_does_and_either_goes_on_for_the_other(tmp_path: Path) -> None:
    cache, one, two = tmp_path / "compiled", tmp_path / "one", tmp_path / "two"
    assert start(one, cache, 1) == [0]
    # A signal to one of the two stops both at the same step, wherever they are; either number of processes
    # goes on from there.
    assert start(two, cache, 2, "sft:4") == [STOPPED] * 2
    assert saved(two) == [2, 2 + 4]
    assert start(two, cache, 2, "exam") == [STOPPED] * 2
    assert saved(two) == [2, 2 + 4, 2 + 8]
    assert start(two, cache, 2, "decode") == [STOPPED] * 2
    kept = [2, 2 + 4, 12, 12 + 1]  # after step 4 of SFT the first exam was, and none was better
    assert saved(two) == kept
    assert start(two, cache, 1, "grpo:2") == [STOPPED]
    assert saved(two) == [*kept, 12 + 2]
    assert start(two, cache, 2, "judge") == [STOPPED] * 2
    assert saved(two) == [*kept[:-1], 12 + 2, 12 + 3]
    assert start(two, cache, 2) == [0, 0]

    assert [line["step"] for line in lines(one)] == [*range(1, 3), *range(1, 11), *range(1, 6)]
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == value or abs(theirs[name] - value) < 1e-5, (
                ours["stage"],
                ours["step"],
                name,
            )
    grpo = [line for line in lines(one) if line["stage"] == "grpo"]
    assert max(line["grad_norm"] for line in grpo) > 1e-3, (
        "GRPO had nothing to learn: the test would prove little"
    )
    assert sum(line["redraw/replaced"] for line in grpo) > 0, "and no group took another's place"
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (one, two))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5
    measured = [(line["stage"], line["step"]) for line in lines(one) if "exam/accuracy" in line]
    assert measured == [("sft", 4), ("sft", 8), ("sft", 10), ("grpo", 4), ("grpo", 5)]
    answers = [said(path / "evaluation" / "grpo-sampled" / "predictions.jsonl") for path in (one, two)]
    assert answers[0] == answers[1]
