"""Every program that a stage runs, with the shapes and places of its arguments and nothing in them.

Built by the very functions that the loops call (`sft.make_update`, `grpo.update`, `grpo.rollout`), so what
compiles here is what trains there. Nothing is allocated: arguments are ShapeDtypeStructs on the mesh, which
may be made of devices that are not there. Neighbour: `compile.py` compiles them and prints the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fundus_jax import sft, sharding, training
from fundus_jax.data import round_up
from fundus_jax.grpo import sampler, update
from fundus_jax.models.attention import backend_for
from fundus_jax.models.batch import Batch
from fundus_jax.models.layers import Options
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from launch.auto import Row, Sizes
from launch.config import RunConfig, check_mesh, model_config
from launch.stages import chosen

SCHEDULE = 1000  # steps of a stage for the learning-rate schedule, which changes no shape


class Program(NamedTuple):
    """One compiled function of a stage.

    Attributes:
        run: the jitted function.
        arguments: results of earlier programs, by name -> its abstract arguments.
        beside: which of the stage's resident trees lie in memory too and are no arguments.
        times: how often a step runs it; of a loop that ends by its data, how often its body runs at most.
    """

    name: str
    run: Any
    arguments: Callable[[dict[str, Any]], tuple[Any, ...]]
    beside: tuple[str, ...] = ()
    times: int = 1


class Stage(NamedTuple):
    """The programs of a stage in their order, and what lies in memory between them."""

    programs: list[Program]
    resident: dict[str, Any]


def bytes_per_device(tree: Any) -> int:
    """What a tree of abstract arrays with shardings takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class Abstract:
    """The policy of a run on a mesh, without numbers in it: what is trained, and what is frozen."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.model = model_config(config)
        shape = nnx.eval_shape(lambda: chosen(config, Qwen2_5_VL(self.model, rngs=nnx.Rngs(0))))
        self.skeleton, params = training.split(shape)
        places = self.skeleton.shardings(mesh)
        self.trained, frozen = self.skeleton.divide(jax.tree.map(_put, params, places))
        self.frozen = self.narrowed(frozen)
        self.places = self.skeleton.divide(places)[0]
        attention = config.attention
        if attention == "auto":
            attention = backend_for(mesh.devices.flat[0].platform)
        self.options = Options(remat=config.remat, unroll=config.unroll, attention=attention)

    def merge(self, params: Any) -> Any:
        """The model with `params`, as the training loops compute with it."""
        return self.skeleton.merge(params, self.options)

    def narrowed(self, params: Any) -> Any:
        """The parameters in the compute dtype."""
        dtype = jnp.dtype(self.config.compute)
        return jax.tree.map(lambda leaf: _put(leaf.update(dtype=dtype), leaf.sharding), params)

    def state(self, optimizer: Any) -> training.State:
        """Masters and moments."""
        shape = jax.eval_shape(optimizer.init, self.trained)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        places = training.like_params(shape, self.places, everywhere)
        return training.State(self.trained, jax.tree.map(_put, shape, places))

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array whose first axis is the batch."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self.mesh))

    def batch(self, rows: int, row: Row, *, packed: bool = False) -> Batch:
        """Rows as large as the run allows."""
        vision, length = self.model.vision, row.tokens
        pixels = self.config.max_pixels or 1280 * 28 * 28
        slots = round_up(math.ceil(row.images * pixels / vision.patch_size**2), vision.window_slots)
        return Batch(
            tokens=self.rows((rows, length), jnp.int32),
            mask=self.rows((rows, length), jnp.bool_),
            segments=self.rows((rows, length), jnp.int32),
            positions=self.rows((rows, 3, length), jnp.int32),
            image_index=self.rows((rows, length), jnp.int32),
            patches=self.rows((rows, slots, vision.patch_features), jnp.float32),
            patch_hw=self.rows((rows, slots, 2), jnp.int32),
            patch_image=self.rows((rows, slots), jnp.int32),
            packed=packed,
        )


def _put(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def sft_stage(policy: Abstract) -> Stage:
    """The one program of SFT."""
    config = policy.config.sft
    check_mesh(policy.config, policy.mesh, ["sft"])
    optimizer = training.make_optimizer(config.optim, SCHEDULE)
    state = policy.state(optimizer)
    run = sft.make_update(policy.merge, optimizer, config, policy.config.compute)
    row = Sizes(policy.config, policy.model).rows()["sft"]
    batch = policy.batch(config.batch, row, packed=config.row_length > 0)
    batch = (batch, policy.rows((config.batch, row.tokens), jnp.bool_))
    resident = {
        "weights": state.params,
        "optimizer": state.optimizer,
        "frozen": policy.frozen,
        "batch": batch,
    }
    return Stage([Program("update", run, lambda _: (state, batch, policy.frozen))], resident)


def grpo_stage(policy: Abstract) -> Stage:
    """A step of GRPO in order: the sampler's weights and slots, prompts read into them, decoding, the scores
    of the reference and, where there are several updates, of the policy, the update."""
    config, run = policy.config.grpo, policy.config
    check_mesh(run, policy.mesh, ["grpo"])
    optimizer = training.make_optimizer(config.optim, SCHEDULE)
    state = policy.state(optimizer)
    batch = policy.batch(config.prompts_per_step, Row(run.max_prompt))
    resident = {
        "weights": state.params,
        "optimizer": state.optimizer,
        "frozen": policy.frozen,
        "batch": batch,
    }
    resident |= {"reference": policy.narrowed(policy.trained)} if config.kl_coef else {}
    resident |= {"policy": policy.narrowed(policy.trained)}  # in the compute dtype, while it samples
    others = ("weights", "optimizer", "reference", "frozen")
    programs = _sampling(policy, batch, others)
    shape = (config.prompts_per_step, config.group_size, config.max_new_tokens)
    tokens, logprobs = policy.rows(shape, jnp.int32), policy.rows(shape, jnp.float32)
    score = update.make_score(policy.merge, config, run.compute)
    if config.kl_coef:
        arguments = (resident["reference"], batch, tokens, policy.frozen)
        programs.append(Program("score", score, lambda _: arguments, ("weights", "optimizer")))
    if config.mu > 1:
        own = (state.params, batch, tokens, policy.frozen)
        programs.append(Program("score policy", score, lambda _: own, ("optimizer", "reference")))
    samples = update.Samples(
        prompts=batch,
        tokens=tokens,
        mask=policy.rows(shape, jnp.bool_),
        sampled=logprobs,
        advantages=policy.rows(shape[:2], jnp.float32),
        old=logprobs if config.mu > 1 else None,
        ref=logprobs if config.kl_coef else None,
    )
    step = update.make_update(policy.merge, optimizer, config, run.compute)
    programs.append(
        Program("update", step, lambda _: (state, samples, policy.frozen), ("reference",), config.mu)
    )
    return Stage(programs, resident)


def _sampling(policy: Abstract, batch: Batch, others: tuple[str, ...]) -> list[Program]:
    """What `grpo.sampler.sample` runs beside `others`. The weights in the compute dtype live as long as it
    does; what is frozen is among them where a program reads the model."""
    read = tuple(name for name in others if name != "frozen")
    all_beside = (*others, "batch", "policy", "sampler")
    config = policy.config.grpo
    settings = sampler.Settings(config.max_new_tokens, config.temperature, config.group_size)
    weights = training.join(policy.narrowed(policy.trained), policy.frozen)
    model = nnx.split(policy.skeleton.merge(weights, dataclasses.replace(policy.options, remat="none")))
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows = config.prompts_per_step
    with jax.set_mesh(policy.mesh):
        slots, refill = sampler.sizes(rows, config.slots, 0)
        shards = sharding.parts("batch", math.gcd(rows, slots, refill))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    layers = policy.model.num_hidden_layers

    def stepper(made: dict[str, Any]) -> Any:
        return dataclasses.replace(made["gather ends"], layers=(made["gather layer"],) * layers)

    def fill(made: dict[str, Any]) -> tuple[Any, ...]:
        return (model, stepper(made), *made["open"], batch, which, which, key, settings)

    def decode(made: dict[str, Any]) -> tuple[Any, ...]:
        slots = made["fill"] if rows == refill else made["fill"][0]
        return (stepper(made), slots, key, settings, count, count)

    gather = [
        Program("gather layer", sampler.gather_layer, lambda _: (model, count), (*read, "sampler"), layers),
        Program("gather ends", sampler.gather_ends, lambda _: (model,), (*read, "sampler")),
    ]
    steps = (config.max_new_tokens - 1) * -(-rows // slots)
    last = Program("decode", sampler.decode_slots, decode, (*others, "batch", "policy"), steps)
    if slots == rows:
        whole = Program(
            "fill", sampler.fill_all, lambda made: (model, stepper(made), batch, key, settings), read
        )
        return [*gather, whole, last]
    which = jax.ShapeDtypeStruct((shards, refill // shards), jnp.int32)
    first = Program(
        "open",
        sampler.open_slots,
        lambda made: (model, stepper(made), batch, key, settings, slots),
        all_beside,
    )
    return [*gather, first, Program("fill", sampler.fill_slots, fill, read, -(-rows // refill)), last]


STAGES = {"sft": sft_stage, "grpo": grpo_stage}
