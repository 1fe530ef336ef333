"""A run in miniature for the tests of the loops: phantoms of 56 pixels through the pipeline, a policy of
30,000 parameters.

`data` makes the stage directories once a session; `open_run` puts a fresh workdir around them. Rows and
prompts come from `launch.stages.Trainer`, as in a real run. Where a test is about a loop and not about the
model, `Bigram` stands in for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from fundus_jax import sharding
from fundus_jax.base.policy import PolicyConfig
from fundus_jax.base.warmup import BaseConfig
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.models import read_config
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import Options
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.model import Prompt, Qwen2_5_VL
from fundus_jax.optim import OptimConfig
from fundus_jax.sft import PromptConfig, SftConfig
from fundus_jax.workdir import Workdir
from launch import stages
from launch.config import DataConfig, RunConfig, as_json

TRAIN, TEST = 36, 8  # phantoms


def optim(**changes: Any) -> OptimConfig:
    """Muon as in the demo, without warm-up."""
    return OptimConfig(**{"name": "muon", "lr": 5e-3, "b2": 0.98, **changes})


def config(**changes: Any) -> RunConfig:
    """The run; `changes` replace fields of the top level."""
    values: dict[str, Any] = {
        "name": "small",
        "data": DataConfig(train=TRAIN, test=TEST, size=56, workers=1, tasks="disease:1,modality:0.5"),
        "prompt": PromptConfig(style="open", think=True, instruct=False),
        "policy": PolicyConfig(
            vocab=400, width=32, layers=2, heads=2, kv_heads=1, mlp=48,
            vision_width=32, vision_layers=2, vision_heads=2, vision_mlp=48, pixels=56,
        ),
        "base": BaseConfig(steps=3, batch=4, optim=optim()),
        "sft": SftConfig(steps=3, batch=4, max_length=512, optim=optim()),
        "grpo": GrpoConfig(
            steps=2, prompts_per_step=4, group_size=2, micro_batch=8, max_new_tokens=8, optim=optim(lr=1e-3)
        ),
    }  # fmt: skip
    return RunConfig(**{**values, **changes})


def data(factory: pytest.TempPathFactory) -> Path:
    """A workdir with data/ and policy/ of `config()`, made once a session; only to be read."""
    root = factory.getbasetemp() / "small"
    if not (root / "policy").exists():
        work = Workdir(root, as_json(config()))
        stages.prepare_data(config(), work)
        stages.Trainer(config(), work, one_device())
        work.close()
    return root


def open_run(path: Path, source: Path, config: RunConfig, mesh: Mesh | None = None) -> stages.Trainer:
    """A trainer in the workdir `path`, which is made around the data and the policy of `source`."""
    work = Workdir(path, as_json(config))
    for name in ("data", "policy"):
        if not (path / name).exists():
            (path / name).symlink_to(source / name, target_is_directory=True)
    return stages.Trainer(config, work, mesh or one_device())


def one_device() -> Mesh:
    """A mesh of the first device only; the tests' CPU has eight."""
    return sharding.parse_mesh("data:1", jax.devices()[:1])


class Bigram(nnx.Module):
    """A policy of which only the interface is Qwen2.5-VL's: the next token depends on the last one and on the
    pixels. The loops can not tell the difference, and it compiles in a fraction of a second."""

    WIDTH = 16

    def __init__(self, config: Qwen2_5_VLConfig, *, rngs: nnx.Rngs) -> None:
        self.config, self.options = config, Options()
        shape = (config.vocab_size, self.WIDTH)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.output = nnx.Param(jax.random.normal(rngs.params(), shape) / 4)

    @property
    def head(self) -> jax.Array:
        return self.output.get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.head.T

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding.get_value()[tokens]

    def see(self, batch: Batch) -> jax.Array:
        """[B, WIDTH] of the pixels."""
        pixels = jnp.asarray(batch.patches).mean(axis=1)
        return pixels[:, :: pixels.shape[1] // self.WIDTH][:, : self.WIDTH]

    def hidden(self, batch: Batch) -> jax.Array:
        return self.embed(batch.tokens) + self.see(batch)[:, None]

    def prefill(self, batch: Batch) -> Prompt:
        end = batch.mask.sum(axis=1) - 1
        last = jnp.take_along_axis(self.hidden(batch), end[:, None, None], axis=1)[:, 0]
        return Prompt(self.see(batch), last, end + 1)  # type: ignore[arg-type]

    def extend(self, prompt: Prompt, tokens: jax.Array) -> jax.Array:
        return self.embed(tokens) + prompt.prefix[:, None, None]  # type: ignore[index]

    def stepper(self) -> BigramStepper:
        return BigramStepper(
            config=self.config, embedding=self.embedding.get_value(), output=self.output.get_value()
        )

    def stepper_of(self) -> BigramStepper:
        return self.stepper()

    def decoding_layer(self, index: jax.Array) -> jax.Array:
        return index


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BigramStepper:
    """What `Bigram` decodes with."""

    config: Qwen2_5_VLConfig = field(metadata={"static": True})
    embedding: jax.Array
    output: jax.Array
    layers: tuple[jax.Array, ...] = ()

    def remember(self, prefix: Any) -> Any:
        return prefix

    def empty_cache(self, memory: jax.Array, group: int, columns: int) -> jax.Array:
        del memory, group, columns
        return jnp.zeros(())

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.output.T

    def __call__(
        self, memory: jax.Array, cache: Any, tokens: jax.Array, *places: jax.Array
    ) -> tuple[jax.Array, Any]:
        del places
        return self.embedding[tokens] + memory[:, None], cache


def bigram(trainer: stages.Trainer, seed: int = 0) -> Any:
    """A `Bigram` with the vocabulary of the trainer's policy."""
    return Bigram(read_config(trainer.hf_dir), rngs=nnx.Rngs(seed))


def stir(model: Qwen2_5_VL, seed: int = 0, deviation: float = 0.2) -> Qwen2_5_VL:
    """The model with every parameter moved at random: a fresh head is zero, and so are biases, and nothing
    would depend on anything."""
    state = nnx.state(model)
    random = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + deviation * random.standard_normal(x.shape).astype(x.dtype), state)
    nnx.update(model, moved)
    return model
