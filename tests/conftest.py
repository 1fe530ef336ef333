"""What holds for every test: the CPU as eight devices, parsed flags, no network, and where real data lie.

The environment is set before anything imports jax, which reads it once. Tests of a real accelerator are
marked `gpu` or `tpu` and run with FUNDUS_TEST_PLATFORM=cuda or =tpu; the others must pass on any machine.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = os.environ.get("FUNDUS_TEST_PLATFORM", "cpu")
_EIGHT = "--xla_force_host_platform_device_count=8"  # meshes are tested on one host, as 2 x 2 x 2 devices
_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
if _EIGHT.split("=")[0] not in _XLA_FLAGS:
    os.environ["XLA_FLAGS"] = f"{_XLA_FLAGS} {_EIGHT}".strip()
# Programs that a test starts inherit these: a library that would ask a hub must fail at once instead.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    LANGSMITH_TRACING="false",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import pytest  # noqa: E402
from absl import flags  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Grain reads absl flags wherever it is; outside an absl program nobody parses them.
flags.FLAGS.mark_as_parsed()


class NetworkBlockedError(RuntimeError):
    """A test tried to leave the machine."""


def _is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine: a path (Unix socket), loopback, or localhost."""
    if not isinstance(address, tuple):
        return True
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _is_number(host: Any) -> bool:
    """Whether `host` is an address in digits already."""
    try:
        ipaddress.ip_address(str(host).split("%")[0])
    except ValueError:
        return False
    return True


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let sockets reach loopback only; tests that need an address elsewhere bring a fake of their own."""
    patch = pytest.MonkeyPatch()

    def guard(name: str) -> None:
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, *rest: Any) -> Any:
            if not _is_local(address):
                raise NetworkBlockedError(f"a test called socket.{name}({address!r}); tests use no network")
            return original(self, address, *rest)

        patch.setattr(socket.socket, name, guarded)

    guard("connect")
    guard("connect_ex")
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **named: Any) -> Any:
        if host is not None and not _is_local((host,)) and not _is_number(host):  # a number asks no server
            raise NetworkBlockedError(f"a test asked for the address of {host!r}; tests use no network")
        return resolve(host, *rest, **named)

    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository, or FUNDUS_SHARED_DATA; skips where there is none."""
    folder = Path(os.environ.get("FUNDUS_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data are not in {folder} (FUNDUS_SHARED_DATA names another folder)")
    return folder
