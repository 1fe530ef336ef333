"""Every program that a stage runs, with the shapes and places of its arguments and nothing in them.

Built by the very functions that the loops call (`sft.make_update`, `grpo.update`, `grpo.rollout`), so what
compiles here is what trains there. Nothing is allocated: arguments are ShapeDtypeStructs on the mesh, which
may be made of devices that are not there. Neighbour: `compile.py` compiles them and prints the table.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fundus_jax import sft, sharding, training
from fundus_jax.data import round_up
from fundus_jax.grpo import update
from fundus_jax.models import read_config
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import Options
from fundus_jax.models.qwen2_5_vl import params as weights
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from fundus_jax.models.qwen2_5_vl.sizes import published
from launch.config import RunConfig

ANSWER = 1000  # steps of a stage for the learning-rate schedule, which changes no shape


class Program(NamedTuple):
    """A jitted function, its abstract arguments, which of the resident trees these are, and how often it runs
    in a step."""

    name: str
    run: Any
    arguments: tuple[Any, ...]
    holds: tuple[str, ...]
    times: int = 1


class Stage(NamedTuple):
    """The programs of a stage, and what lies in memory between them: name -> tree of abstract arrays."""

    programs: list[Program]
    resident: dict[str, Any]


def model_config(config: RunConfig) -> Qwen2_5_VLConfig:
    """The model of a run: that of its directory, or where there is none the published size of its name."""
    return read_config(config.model) if Path(config.model).is_dir() else published(config.model)


def bytes_per_device(tree: Any) -> int:
    """What a tree of abstract arrays with shardings takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _put(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


class Abstract:
    """The policy of a run on a mesh, without numbers in it."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.model = model_config(config)
        self.skeleton, params = training.split(weights.abstract(self.model))
        self.places = self.skeleton.shardings(mesh)
        self.params = jax.tree.map(_put, params, self.places)
        self.options = Options(remat=config.remat, unroll=config.unroll)

    def merge(self, params: Any) -> Any:
        """The model with `params`, as the training loops compute with it."""
        return self.skeleton.merge(params, self.options)

    def state(self, optimizer: Any) -> training.State:
        """Masters and moments."""
        shape = jax.eval_shape(optimizer.init, self.params)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        places = training.like_params(shape, self.places, everywhere)
        return training.State(self.params, jax.tree.map(_put, shape, places))

    def cast(self, places: Any = None) -> Any:
        """The parameters in the compute dtype."""
        dtype = jnp.dtype(self.config.compute)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
            self.params,
            self.places if places is None else places,
        )

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array whose first axis is the batch."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self.mesh))

    def batch(self, rows: int, length: int) -> Batch:
        """Conversations of one image each, as large as the run allows."""
        vision = self.model.vision
        side = 2 * vision.patch_size * vision.patch_size // 2
        pixels = self.config.max_pixels or 1280 * 28 * 28
        slots = round_up(-(-pixels // side), vision.window_slots)
        int32, float32 = jnp.int32, jnp.float32
        return Batch(
            tokens=self.rows((rows, length), int32),
            mask=self.rows((rows, length), jnp.bool_),
            positions=self.rows((rows, 3, length), int32),
            image_index=self.rows((rows, length), int32),
            patches=self.rows((rows, slots, vision.patch_features), float32),
            patch_hw=self.rows((rows, slots, 2), int32),
            patch_image=self.rows((rows, slots), int32),
        )


def sft_stage(policy: Abstract) -> Stage:
    """The one program of SFT."""
    config = policy.config.sft
    optimizer = training.make_optimizer(config.optim, ANSWER)
    state = policy.state(optimizer)
    run = sft.make_update(policy.merge, optimizer, config, policy.config.compute)
    batch = policy.batch(config.batch, config.max_length)
    learned = policy.rows((config.batch, config.max_length), jnp.bool_)
    resident = {"weights": state.params, "optimizer": state.optimizer, "batch": (batch, learned)}
    return Stage([Program("update", run, (state, (batch, learned)), tuple(resident))], resident)


def grpo_stage(policy: Abstract) -> Stage:
    """A step of GRPO in order: the sampler's weights, rollouts, the reference's scores, updates."""
    config, run = policy.config.grpo, policy.config
    optimizer = training.make_optimizer(config.optim, ANSWER)
    state = policy.state(optimizer)
    batch = policy.batch(config.prompts_per_step, run.max_prompt)
    shape = (config.prompts_per_step, config.group_size, config.max_new_tokens)
    tokens, logprobs = policy.rows(shape, jnp.int32), policy.rows(shape, jnp.float32)
    reference = policy.cast() if config.kl_coef else None
    samples = update.Samples(
        prompts=batch,
        tokens=tokens,
        mask=policy.rows(shape, jnp.bool_),
        sampled=logprobs,
        advantages=policy.rows(shape[:2], jnp.float32),
        old=logprobs if config.mu > 1 else None,
        ref=logprobs if config.kl_coef else None,
    )
    resident = {"weights": state.params, "optimizer": state.optimizer, "batch": batch}
    found = []
    if reference is not None:
        resident["reference"] = reference
        score = update.make_score(policy.merge, config, run.compute)
        found.append(Program("score", score, (reference, batch, tokens), ("reference", "batch")))
    step = update.make_update(policy.merge, optimizer, config, run.compute)
    found.append(Program("update", step, (state, samples), ("weights", "optimizer", "batch"), config.mu))
    return Stage(found, resident)


STAGES = {"sft": sft_stage, "grpo": grpo_stage}
