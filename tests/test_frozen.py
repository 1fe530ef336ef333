"""Steps that train a part of a model: adapters, or what `freeze` leaves. The rest is read and nothing else.

And what a block keeps for its backward pass changes memory, not numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from fundus_jax import sft, sharding, training
from fundus_jax.models import lora
from fundus_jax.models.freeze import freeze, narrow
from fundus_jax.models.layers import REMAT, Options
from fundus_jax.optim import OptimConfig
from tests.models import small

LESS_COMPILING = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """4 conversations with an image, and which of their tokens are learned."""
    processor = small.processor(tmp_path_factory.mktemp("processor"))
    rows = small.batch(processor, [[(60, 70 + 10 * row)] for row in range(4)], length=48, patches=64)
    return rows, rows.mask


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """8 conversations without images, for what does not concern the tower: it compiles in a third of the
    time."""
    processor = small.processor(tmp_path_factory.mktemp("processor"))
    rows = small.batch(processor, [[] for _ in range(8)], length=48, patches=0)
    return rows, rows.mask


def with_adapters(model: Any) -> None:
    """Rank 4 on the decoder, B not zero."""
    lora.attach(model, lora.LoraConfig(rank=4))
    for number, linear in enumerate(lora.adapted(model).values()):
        shape = linear.lora_b.get_value().shape
        linear.lora_b.set_value(0.05 * jax.random.normal(jax.random.key(number), shape))


def without_tower(model: Any) -> None:
    """The tower's blocks frozen; merger and decoder are trained."""
    freeze(model, ["vision"])


def whole(model: Any) -> None:
    """Nothing frozen."""


class Trained:
    """A model of which `choose` leaves a part, after `steps` steps on `mesh`."""

    def __init__(
        self,
        choose: Callable[[Any], None],
        batch: Any,
        mesh: str = "data:1",
        *,
        optimizer: str = "adamw",
        compute: str = "float32",
        steps: int = 1,
    ) -> None:
        model = small.model()
        choose(model)
        narrow(model, compute)
        skeleton, params = training.split(model)
        trained, frozen = skeleton.divide(params)
        config = OptimConfig(name=optimizer, lr=1e-3, clip_norm=float("inf"))
        tx = training.make_optimizer(config, 5)
        count = int(np.prod([int(part.split(":")[1]) for part in mesh.split(",")]))
        place = sharding.parse_mesh(mesh, jax.devices()[:count])
        step = training.make_step(skeleton.merge, sft.loss, sft.count, tx, compute=compute, micro_batches=2)
        with jax.set_mesh(place):
            # the first step gives its buffers away, and those of `params` are compared later
            self.first = jax.device_get(trained)
            state = training.start(skeleton, trained, tx, place)
            self.frozen = training.hold(skeleton, frozen, place, compute)
            self.held = jax.device_get(self.frozen)
            placed = training.place(batch, place)
            compiled = jax.jit(step, donate_argnums=(0,), compiler_options=LESS_COMPILING)
            for _ in range(steps):
                given = state
                state, metrics = compiled(state, placed, self.frozen)
        self.given, self.state, self.metrics = given, state, jax.device_get(metrics)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_adapters_move_and_have_moments(read: Any, optimizer: str) -> None:
    run = Trained(with_adapters, read, optimizer=optimizer, compute="bfloat16", steps=2)
    leaves = jax.tree_util.tree_leaves_with_path((run.state.params, run.state.optimizer))
    names = {jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim}
    assert len(names) >= 2 * 14, "A and B of seven layers, and a moment of each"
    assert all("lora_" in name for name in names)
    assert {leaf.dtype.name for _, leaf in leaves if leaf.ndim} == {"float32"}, "masters and moments"
    moved = jax.tree.map(lambda one, other: not np.array_equal(one, other), run.state.params, run.first)
    assert all(jax.tree.leaves(moved)), moved
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run.given.params)), "given away"
    for leaf, before in zip(*map(jax.tree.leaves, (run.frozen, run.held)), strict=True):
        assert leaf.dtype == jnp.bfloat16, "no master"
        assert np.asarray(leaf).tobytes() == before.tobytes()


def close(one: Trained, other: Trained, rtol: float) -> None:
    """Equal metrics and, by Adam's first moment after one step, equal gradients of `one`'s parameters."""
    for name in ("loss", "tokens", "entropy"):
        assert other.metrics[name] == pytest.approx(one.metrics[name], rel=rtol), name
    got, want = (jax.device_get(run.state.optimizer.inner[0].mu) for run in (one, other))
    want = {path: leaf for path, leaf in flatten_dict(want).items() if path in flatten_dict(got)}
    largest = max(float(np.abs(leaf).max()) for leaf in want.values())
    assert largest > 1e-3
    assert small.largest_difference(flatten_dict(got), want) < rtol * largest


MESH = "data:2,fsdp:2,tensor:2"
eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: run it on the CPU")


@pytest.fixture(scope="module")
def part(seen: Any) -> Trained:
    return Trained(without_tower, seen)


@eight_devices
def test_the_mesh_changes_no_number_of_adapters(read: Any) -> None:
    eight = Trained(with_adapters, read, MESH)
    close(Trained(with_adapters, read), eight, 1e-5)
    halves = eight.state.params["text"]["layers"]["mlp"]["up_proj"]
    assert halves["lora_a"].sharding.spec == P(None, None, "fsdp")
    assert halves["lora_b"].sharding.spec == P(None, "tensor")
    assert eight.frozen["text"]["embed_tokens"].sharding.spec == P("tensor", "fsdp")


@eight_devices
def test_the_mesh_changes_no_number_of_a_part(seen: Any, part: Trained) -> None:
    close(part, Trained(without_tower, seen, MESH), 1e-5)


def test_a_part_has_the_gradient_it_has_in_the_whole(seen: Any, part: Trained) -> None:
    assert "blocks" not in part.state.params["visual"]
    close(part, Trained(whole, seen), 1e-6)


def products(choose: Callable[[Any], None], batch: Any) -> tuple[int, int]:
    """Matrix products in the program of a gradient: of the tower's widths, and others."""
    model = small.model()
    choose(model)
    skeleton, params = training.split(model)
    trained, frozen = skeleton.divide(params)

    def loss(trained: Any, frozen: Any) -> jax.Array:
        return sft.loss(skeleton.merge(training.join(trained, frozen)), batch, 1.0)[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(trained, frozen))
    lines = [line for line in text.splitlines() if "dot_general" in line]
    tower = [line for line in lines if "64,32]" in line or "64,48]" in line or "64,96]" in line]
    return len(tower), len(lines) - len(tower)


def test_a_frozen_tower_has_no_backward_pass(seen: Any) -> None:
    """Its features do not depend on what is trained: the products of its blocks are those of one pass."""
    forward, _ = products(lambda model: freeze(model, ["vision", "projector"]), seen)
    both, _ = products(whole, seen)
    assert 0 < forward < both / 1.9
    adapters, _ = products(with_adapters, seen)
    assert adapters == forward


def test_remat_changes_memory_and_no_number(read: Any) -> None:
    skeleton, params = training.split(small.model())
    memory, found = {}, {}
    for name in REMAT:

        def loss(params: Any, name: str = name) -> jax.Array:
            return sft.loss(skeleton.merge(params, Options(remat=name)), read, sft.count(read))[0]

        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        compiled = lowered.compile(compiler_options=LESS_COMPILING)
        found[name] = jax.device_get(compiled(params))
        analysis = compiled.memory_analysis()
        assert analysis is not None
        memory[name] = analysis.temp_size_in_bytes
    assert max(memory["block"], memory["attention"]) < memory["dots"] < memory["none"], memory
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found["none"][1]))
    for name, (value, gradient) in found.items():
        assert value == pytest.approx(found["none"][0], rel=1e-6), name
        assert small.largest_difference(gradient, found["none"][1]) < 1e-6 * largest, name
