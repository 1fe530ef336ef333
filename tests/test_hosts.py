"""What processes do together, on two of them with two devices each; alone, everything is itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundus_jax import hosts

TWO_PROCESSES = """
import sys, time, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fundus_jax import hosts, sharding, training
from fundus_jax.records import ConfigError
port, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize("127.0.0.1:" + port, 2, rank)

assert hosts.highest(10 * rank - 5) == 5 and hosts.of_first(10 * rank - 5) == -5
assert hosts.gather({"rank": rank, "text": "x" * 9 * rank}) == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 9}]
assert hosts.told("word") == 0
hosts.highest(0)
hosts.tell("word", 7 + rank)
hosts.highest(0)
assert hosts.told("word") == 8 and hosts.told("wor") == 0
for word in "ab":
    assert hosts.to_first(word * (1 + rank)) == ([] if rank else [word, 2 * word])
done = []
hosts.on_first(lambda: done.append(1))
assert done == [1] * (rank == 0)

def fail(error):
    raise error
for error, other in (
    (ConfigError("lost"), (ConfigError, "process [0] failed")),  # the same exit code everywhere
    (KeyError("lost"), (RuntimeError, "process [0] failed")),
    (SystemExit(143), (SystemExit, "143")),
):
    try:
        hosts.on_first(lambda: fail(error))
    except BaseException as raised:
        assert raised is error if rank == 0 else (type(raised), str(raised)[:18]) == other, raised
    else:
        raise AssertionError("process %d did not hear of it" % rank)

def double(part):
    done.append(part)
    return [(word, 2 * word) for word in part]

def broken(part):
    return fail(ConfigError("lost")) if "d" in part else double(part)

done.clear()
words = list("abcde")
assert hosts.deal(words, double) == [[word, 2 * word] for word in words] and hosts.deal([], double) == []
assert done == [words[rank::2], []]
try:
    hosts.deal(words, broken)
except ConfigError as raised:
    assert str(raised).startswith("lost" if rank else "process [1] failed"), raised
else:
    raise AssertionError("process %d did not hear of it" % rank)

# Whoever is done waits for the others before it goes to the devices.
def slow(part):
    if rank == 0:
        time.sleep(1)
        hosts.tell("worked", 1)
    return double(part)

def late(array, **how):
    assert hosts.told("worked") == 1, "on the devices while process 0 is at work"
    return gather(array, **how)

gather = hosts.multihost_utils.process_allgather
hosts.multihost_utils.process_allgather = late
assert hosts.deal(words, slow) == [[word, 2 * word] for word in words]

gathered = []
def counted(array, **how):
    gathered.append(array.shape)
    return gather(array, **how)
hosts.multihost_utils.process_allgather = counted

# Rows by a mesh whose devices are not in the order of the processes, as on a torus; and shared by a tensor axis.
a, b, c, d = jax.devices()
rows = np.arange(24).reshape(8, 3)
for shape, order, mine in (((2, 2, 1), (a, c, b, d), None), ((2, 1, 2), (a, c, b, d), 8), ((4, 1, 1), (d, a, b, c), 4)):
    mesh = Mesh(np.asarray(order).reshape(shape), sharding.AXES)
    here = training.rows_here(8, mesh)
    assert mine is None or len(here) == mine, here
    placed = training.place({"x": rows[here]}, mesh)["x"]
    assert placed.shape == (8, 3)
    assert np.array_equal(hosts.fetch(placed), rows)
    spread = training.spread({"w": rows}, {"w": NamedSharding(mesh, P(("data", "fsdp"), "tensor") if shape[2] == 1 else P("data"))})["w"]
    gathered.clear()
    hosts.LARGE, parts = {2: (1 << 30, [(8, 3)]), 4: (3 * spread.nbytes // 8, [(3, 3), (3, 3), (2, 3)])}[shape[0]]
    assert np.array_equal(hosts.fetch(spread), rows)
    assert gathered == parts, gathered
hosts.LARGE = 0
gathered.clear()
assert np.array_equal(hosts.fetch(spread), rows) and gathered == [(3,)] * 8, "row by row where a row is too large"
jax.distributed.shutdown()
print("fine", rank)
"""  # noqa: E501 - a program of its own


def test_two_processes(repo_root: Path) -> None:
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    env = os.environ | env | {"PYTHONPATH": str(repo_root)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, port]
    ranks = [
        subprocess.Popen(
            [*command, rank], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, output in enumerate(outputs):
        assert f"fine {rank}" in output, "\n".join(outputs)


def test_one_process_exchanges_nothing() -> None:
    assert hosts.is_first()
    assert hosts.highest(-3) == hosts.of_first(-3) == -3
    assert hosts.gather((1, 2)) == hosts.to_first((1, 2)) == [(1, 2)]
    assert hosts.deal([1, 2], lambda part: [(one, one) for one in part]) == [(1, 1), (2, 2)]
    hosts.tell("word", 7)
    assert hosts.told("word") == 0
    assert np.array_equal(hosts.fetch([1, 2]), [1, 2])
    with pytest.raises(KeyError, match="missing"):
        hosts.on_first(lambda: {}["missing"])


@pytest.mark.parametrize(
    "call",
    [
        hosts.wait,
        lambda: hosts.highest(1),
        lambda: hosts.of_first(1),
        lambda: hosts.gather(1),
        lambda: hosts.deal([1], list),
        lambda: hosts.on_first(lambda: None),
        lambda: hosts.raise_everywhere(None),
    ],
)
def test_what_one_process_does_asks_no_other(call: Callable[[], Any]) -> None:
    """With several it would wait for ever; one process is told, so that its tests are those of several."""
    with pytest.raises(RuntimeError, match="the others would not come"):
        hosts.on_first(call)
    call()


def test_what_is_exchanged_has_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape is a program to compile, and the texts of no two steps are equally long."""
    sent = []

    def exchange(array: np.ndarray) -> np.ndarray:
        sent.append(array.shape)
        return np.stack([array, array])

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", exchange)
    for size in (0, *range(600, 1000, 37)):
        assert hosts.gather("x" * size) == ["x" * size] * 2
    assert {shape for shape in sent if shape} == {(4,), (1024,)}
