"""Checkpoints across meshes and processes: restored under any sharding, written by two at once."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fundus_jax.checkpoints import Checkpoints


def test_restore_to_another_mesh(tmp_path: Path) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    value = jnp.arange(64.0).reshape(16, 4)

    def placed(spec: P) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, spec))

    checkpoints = Checkpoints(tmp_path, config_hash="abc", keep=9)
    places = [P("fsdp", "tensor"), P("tensor", None), P()]
    for step, spec in enumerate(places):
        checkpoints.save(step, {"w": placed(spec)}, data_state={}, counters={})
    checkpoints.save(9, {"w": value}, data_state={}, counters={})
    checkpoints.wait()
    for step in checkpoints.steps():
        for spec in places:
            sharding = NamedSharding(mesh, spec)
            leaf = checkpoints.restore(
                step, {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)}
            )
            assert leaf.state["w"].sharding == sharding
            np.testing.assert_array_equal(leaf.state["w"], value)
        leaf = checkpoints.restore(step, {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32)})
        assert leaf.state["w"].devices() == {jax.devices()[0]}


TWO_PROCESSES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from fundus_jax import files
from fundus_jax.checkpoints import Checkpoints
from fundus_jax.records import ConfigError, DataError
port, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize("127.0.0.1:" + port, 2, rank)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("fsdp"))
state = {"w": jax.make_array_from_process_local_data(sharding, np.arange(4.0) + 4 * rank)}
like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
c = Checkpoints(directory, config_hash="abc", keep=1)
hashed, digest = [], files._digest
def noted(path, *, sync=False):
    hashed.append(str(path.relative_to(c.directory / "1")))
    return digest(path, sync=sync)
files._digest = noted
c.save(1, state, data_state={"next": 1}, counters={})
c.wait()
files._digest = digest
own = "state/ocdbt.process_" + str(rank)
assert any(name.startswith(own) for name in hashed), "each hashes what it wrote"
assert not any(name.startswith("state/ocdbt.process_" + str(1 - rank)) for name in hashed), hashed
assert ("bundle.json" in hashed) == (rank == 0), "and the first one everything else"
assert files.verify(c.directory / "1")["facts"] == {"step": 1, "final": False}
c.save(2, state, data_state={"next": 2}, counters={})
c.wait()
b = c.restore(2, like)
local = np.concatenate([s.data for s in b.state["w"].addressable_shards])
assert local.tolist() == (np.arange(4.0) + 4 * rank).tolist(), local
assert b.data_state == {"next": 2} and c.steps() == [2]
try:
    c.save(3, state, data_state={"rank": rank}, counters={})
except ConfigError as error:
    assert "differ between processes" in str(error)
else:
    raise AssertionError("each process saved a place of its own")
if rank == 0:
    (c.directory / "2" / "bundle.json").write_text("{}")
try:
    c.restore(2, like)
except (DataError, ConfigError) as error:
    assert "bundle.json" in str(error) if rank == 0 else "process [0] failed" in str(error)
else:
    raise AssertionError("damage went unseen")
jax.distributed.shutdown()
print("fine", rank)
"""


def test_two_processes(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, port]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], **options) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    for rank, output in enumerate(outputs):
        assert f"fine {rank}" in output, "\n".join(outputs)
