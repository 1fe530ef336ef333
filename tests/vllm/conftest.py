"""A real vLLM on this CPU that serves a checkpoint which our own export wrote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundus_jax.base import policy
from fundus_jax.base.policy import PolicyConfig
from fundus_jax.models import read_config, save_pretrained
from fundus_jax.workdir import Workdir
from launch.config import as_json
from launch.stages import Trainer
from tests import small

NAME = "policy"  # what the server calls the model
RANDOM = "random-small"  # its other name, for what is printed: its weights are random
# Sizes that vLLM's attention for CPUs takes: heads of 32 and 64 channels.
SIZES = PolicyConfig(layers=2, mlp=256, vision_layers=2, vision_mlp=256, pixels=56)
ENVIRONMENT = {
    **{"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    **{"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; else a share of all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # more of them spin, and starve the process that answers
    "TORCHDYNAMO_DISABLE": "1",  # else some first requests wait for a C++ compiler
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
OPTIONS = {
    "dtype": "float32",
    "max-model-len": "4096",
    "max-num-seqs": "16",
    "max-num-batched-tokens": "8192",
    "distributed-executor-backend": "uni",
    "seed": "0",
    "logprobs-mode": "processed_logprobs",  # of what may be sampled, as ours are
    "limit-mm-per-prompt": '{"image": 1, "video": 0}',
    # A model of random weights would fill an answer with blanks, where JSON allows them.
    "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
}


class Vllm:
    """`start`, `kill` and `start` again, on one port; `log` has what it said."""

    def __init__(self, python: Path, model: Path, log: Path) -> None:
        self.python, self.model, self.log = python, model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What a client is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        options = [f"--{name}={value}" for name, value in OPTIONS.items()]
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, *options]
        words += [
            "--served-model-name",
            NAME,
            RANDOM,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--enforce-eager",
            "--no-enable-chunked-prefill",  # in pieces, a long prompt with a seed kills the engine on a CPU
        ]
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                words, env=kept | ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
            )
        deadline = time.monotonic() + 580
        while wait and not self._healthy():
            said = self.log.read_text(errors="replace")[-3000:]
            assert self._process.poll() is None, f"vLLM ended:\n{said}"
            assert time.monotonic() < deadline, f"vLLM did not come up:\n{said}"
            time.sleep(0.5)

    def kill(self) -> None:
        """End all its processes at once, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


@pytest.fixture(scope="session")
def trainer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run whose `policy/` is written as the base stage finds it."""
    config, path = small.config(policy=SIZES), tmp_path_factory.mktemp("exported")
    (path / "data").symlink_to(data / "data", target_is_directory=True)
    return Trainer(config, Workdir(path, as_json(config)), small.one_device())


@pytest.fixture(scope="session")
def exported(trainer: Trainer) -> Path:
    """A checkpoint with random weights, from our own export."""
    model = small.stir(policy.fresh(read_config(trainer.hf_dir), 0), deviation=0.1)
    return save_pretrained(model, trainer.processor, trainer.work.path / "hf")


@pytest.fixture(scope="session")
def vllm(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """A server of `exported`."""
    python = Path(os.environ.get("FUNDUS_TEST_VLLM", ".venv-vllm/bin/python")).absolute()
    assert python.exists(), f"there is no {python}: `make test-vllm` installs it"
    server = Vllm(python, exported, tmp_path_factory.mktemp("vllm") / "server.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()
