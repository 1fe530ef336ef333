"""Meshes from strings, the table of rules, and that a mesh or a cut into micro-batches changes no number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from fundus_jax import sft, sharding, training
from fundus_jax.optim import GuardState
from fundus_jax.records import ConfigError
from tests.models import small

LESS_COMPILING = {"xla_backend_optimization_level": 0}
MESH = "data:2,fsdp:2,tensor:2"


@pytest.fixture(autouse=True)
def eight() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")


def mesh_of(text: str, count: int = 8) -> jax.sharding.Mesh:
    return sharding.parse_mesh(text, jax.devices()[:count])


@pytest.mark.parametrize(
    ("text", "count", "sizes"),
    [
        ("data:1,fsdp:-1,tensor:2", 8, (1, 4, 2)),
        ("tensor:2,data:4", 8, (4, 1, 2)),  # in any order; what is not named is 1
        ("data:-1", 8, (8, 1, 1)),
        ("data:2,fsdp:2,tensor:2", 8, (2, 2, 2)),
        ("fsdp:-1,tensor:8", 8, (1, 1, 8)),  # the rest may be 1
        ("", 1, (1, 1, 1)),
        ("data:1,fsdp:-1,tensor:1", 6, (1, 6, 1)),
    ],
)
def test_sizes(text: str, count: int, sizes: tuple[int, ...]) -> None:
    mesh = mesh_of(text, count)
    assert mesh.axis_names == sharding.AXES
    assert tuple(mesh.shape.values()) == sizes
    assert (
        mesh.devices.ravel().tolist() == jax.devices()[:count]
    )  # tensor varies fastest: neighbours share it


def test_all_devices_are_the_default() -> None:
    assert sharding.parse_mesh("fsdp:-1").size == jax.device_count()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:2", "'model:2' is not AXIS:SIZE with AXIS one of data, fsdp, tensor"),
        ("data", "'data' is not AXIS:SIZE"),
        ("data:", "'data:' is not AXIS:SIZE"),
        ("data:two", "'data:two' is not"),
        ("data:--1", "'data:--1' is not"),
        ("data:²", "'data:²' is not"),
        ("data: 8", "'data: 8' is not"),
        ("data=8", "'data=8' is not"),
        ("data:-2", "'data:-2' is not"),
        ("data:0,fsdp:8", "sizes must be >= 1"),
        ("data:-1,fsdp:-1", "at most one may be -1"),
        ("data:4,data:2", "names data twice"),
        ("data:3", "does not fit 8 devices: the sizes named multiply to 3"),
        ("data:3,fsdp:-1", "does not fit 8 devices: the sizes named multiply to 3"),
        ("data:16,fsdp:-1", "does not fit 8 devices: the sizes named multiply to 16"),
        ("data:4,fsdp:4", "does not fit 8 devices: the sizes named multiply to 16"),
    ],
)
def test_errors_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        mesh_of(text)
    assert str(caught.value).startswith(f"--mesh={text!r}")


def test_specs() -> None:
    assert sharding.spec(("layers", "heads", "embed")) == P(None, "tensor", "fsdp")
    assert sharding.spec(("batch", None, "mlp")) == P(("data", "fsdp"), None, "tensor")
    assert sharding.spec(("vocab", "mlp")) == P("tensor", None)  # an axis is not used twice
    assert sharding.spec(("batch", "embed")) == P(("data", "fsdp"), None)
    assert sharding.spec(()) == P()
    with pytest.raises(KeyError):
        sharding.spec(("unheard of",))


def test_what_does_not_divide_is_replicated() -> None:
    mesh = mesh_of(MESH)
    wanted = P(("data", "fsdp"), "tensor")
    assert sharding.fit(wanted, (8, 6), mesh) == wanted
    assert sharding.fit(wanted, (6, 6), mesh) == P(None, "tensor")  # 6 rows over 4
    assert sharding.fit(wanted, (4, 3), mesh) == P(("data", "fsdp"), None)
    assert sharding.fit(P("tensor"), (2, 5, 7), mesh) == P("tensor", None, None)
    assert sharding.fit(P("data"), (4,), mesh_of("fsdp:8")) == P(None)  # an axis of size 1


def test_parts() -> None:
    assert sharding.parts("batch", 8) == 1
    with jax.set_mesh(mesh_of(MESH)):
        assert [sharding.parts("batch", size) for size in (8, 4, 6)] == [4, 4, 1]
        assert sharding.parts("vocab", 10) == 2
        assert sharding.parts("layers", 10) == 1


def test_constrain_is_nothing_outside_a_mesh() -> None:
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "mlp") is x
    mesh = mesh_of(MESH)
    with jax.set_mesh(mesh):
        inside = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "mlp"))(x)
        odd = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "mlp"))(jnp.ones((3, 4)))
    assert inside.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"), "tensor")), 2)
    assert odd.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, "tensor")), 2)
    assert np.array_equal(inside, 2 * np.ones((8, 4)))


def test_places_of_a_models_parameters() -> None:
    mesh = mesh_of("fsdp:4,tensor:2")
    model = small.model()
    for places in (
        sharding.state_shardings(nnx.state(model), mesh),
        training.Skeleton(model).shardings(mesh),
    ):
        flat = places if isinstance(places, dict) else nnx.to_pure_dict(places)
        layer = flat["text"]["layers"]
        assert layer["self_attn"]["q_proj"]["weight"].spec == P(None, "tensor", "fsdp")
        assert layer["self_attn"]["q_proj"]["bias"].spec == P(None, "tensor")
        assert layer["self_attn"]["o_proj"]["weight"].spec == P(None, "fsdp", "tensor")
        assert layer["mlp"]["down_proj"]["weight"].spec == P(None, "fsdp", "tensor")
        assert layer["input_layernorm"]["weight"].spec == P(None, None)
        assert flat["text"]["embed_tokens"].spec == P("tensor", "fsdp")
        assert flat["lm_head"]["weight"].spec == P("tensor", "fsdp")
        assert flat["visual"]["patch_embed"]["weight"].spec == P("fsdp", None)


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the gradient."""

    def state(grads: Any) -> GuardState:
        zero = jnp.zeros((), jnp.int32)
        return GuardState(zero, zero, {"gradient": grads})

    def update(grads: Any, _: Any, __: Any = None) -> tuple[Any, GuardState]:
        return jax.tree.map(jnp.zeros_like, grads), state(grads)

    return optax.GradientTransformation(lambda params: state(jax.tree.map(jnp.zeros_like, params)), update)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """16 conversations with 0-2 images, and which of their tokens are learned: unequally many a row."""
    processor = small.processor(tmp_path_factory.mktemp("processor"))
    sizes = [[[], [(60, 70)], [(100, 50)], [(50, 60), (90, 30)]][row % 4] for row in range(16)]
    rows = small.batch(processor, sizes, length=64, patches=128)
    chosen = np.random.default_rng(0).random(rows.mask.shape) < np.linspace(0.05, 0.9, 16)[:, None]
    return rows, chosen & rows.mask


def loss_and_gradient(batch: Any, mesh: jax.sharding.Mesh, micro_batches: int) -> tuple[dict[str, Any], Any]:
    skeleton, params = training.split(small.model())
    optimizer = keep_gradient()
    step = training.make_step(skeleton.merge, sft.loss, sft.count, optimizer, micro_batches=micro_batches)
    with jax.set_mesh(mesh):
        state = training.start(skeleton, params, optimizer, mesh)
        placed = training.place(batch, mesh)
        state, metrics = jax.jit(step, compiler_options=LESS_COMPILING)(state, placed)
    embedding = state.params["text"]["embed_tokens"]
    assert embedding.addressable_shards[0].data.size == embedding.size // (4 if mesh.size > 1 else 1)
    return jax.device_get(metrics), jax.device_get(state.optimizer.inner["gradient"])


def test_mesh_and_micro_batches_change_no_number(batch: Any) -> None:
    alone = mesh_of("data:1", 1)
    want, gradient = loss_and_gradient(batch, alone, 1)
    assert want["tokens"] == batch[1][:, 1:].sum() > 200
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert largest > 0.1
    for mesh, micro_batches in ((mesh_of(MESH), 1), (alone, 4)):
        got, other = loss_and_gradient(batch, mesh, micro_batches)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
        assert small.largest_difference(other, gradient) < 1e-5 * max(1.0, largest)
