"""The setting that conftest.py promises to every test: no network, parsed flags, eight CPU devices."""

from __future__ import annotations

import os
import socket

import pytest
from absl import flags


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80), ("example.org", 443)])
def test_the_network_is_closed(address: tuple[str, int]) -> None:
    with pytest.raises(RuntimeError, match="tests use no network"):
        socket.create_connection(address, timeout=0.1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_open(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((host, port), timeout=5) as client:
            assert client.getpeername()[1] == port


def test_flags_are_parsed() -> None:
    assert flags.FLAGS.is_parsed()


@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="an accelerator was asked for")
def test_the_cpu_poses_as_eight_devices() -> None:
    import jax

    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8
