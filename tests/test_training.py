"""The optimizer step that all loops share: micro-batches, the guard against NaN, places on the mesh,
dtypes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fundus_jax import sharding, training
from fundus_jax.base.policy import fresh, make_tokenizer, model_config
from fundus_jax.models.layers import Options
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError, DataError
from tests import small

ADAM = OptimConfig(name="adamw", lr=0.05, b2=0.98)
ROWS, WIDTH = 8, 5


def first() -> dict[str, jax.Array]:
    """The same weights in new arrays: a step donates what it gets."""
    return {"w": jnp.linspace(-1.0, 1.0, WIDTH), "bias": jnp.zeros(())}


def loss(model: Any, batch: Any, total: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error over the rows that count."""
    error = (batch["x"] @ model["w"] + model["bias"] - batch["y"]) * batch["counts"]
    return (error**2).sum() / total, {"rows": batch["counts"].sum(), "dtype": jnp.zeros((), model["w"].dtype)}


def a_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of which few count, and unequally many in each micro-batch."""
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((ROWS, WIDTH)), random.standard_normal(ROWS)
    counts = np.asarray([1, 0, 1, 1, 0, 0, 1, 0])
    return {"x": x.astype(np.float32), "y": y.astype(np.float32), "counts": counts.astype(np.float32)}


def a_step(config: OptimConfig = ADAM, **more: Any) -> tuple[Any, training.State]:
    optimizer = training.make_optimizer(config, 20)
    step = training.make_step(
        lambda params: params, loss, lambda batch: batch["counts"].sum(), optimizer, **more
    )
    return step, training.State(first(), optimizer.init(first()))


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_change_neither_gradient_nor_metrics(pieces: int) -> None:
    whole, state = a_step()
    cut, state_cut = a_step(micro_batches=pieces)
    for seed in range(3):
        state, metrics = whole(state, a_batch(seed))
        state_cut, metrics_cut = cut(state_cut, a_batch(seed))
        for name in ("loss", "grad_norm", "rows"):
            np.testing.assert_allclose(metrics_cut[name], metrics[name], rtol=1e-5)
    assert metrics["rows"] == 4
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(state_cut), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_all_rows_that_count() -> None:
    step, state = a_step(OptimConfig(lr=1e-9, clip_norm=float("inf")), micro_batches=4)
    batch = a_batch()
    _, metrics = step(state, batch)
    kept = batch["counts"] > 0
    error = batch["x"][kept] @ np.asarray(first()["w"]) - batch["y"][kept]
    grads = [*(2 * error @ batch["x"][kept] / 4), 2 * error.sum() / 4]
    np.testing.assert_allclose(metrics["loss"], (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grads), rtol=1e-5)


def test_combine_gets_the_metrics_of_every_micro_batch() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def combine(stacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
        seen.update({name: value.shape for name, value in stacked.items()})
        return {"loss": stacked["loss"].sum(), "most": stacked["rows"].max()}

    for pieces in (1, 4):
        step, state = a_step(micro_batches=pieces, combine=combine)
        _, metrics = step(state, a_batch())
        assert seen == dict.fromkeys(("loss", "rows", "dtype"), (pieces,))
    assert metrics["most"] == 2, (
        "rows 0 and 4, 1 and 5, 2 and 6, 3 and 7 go together: each device keeps its rows"
    )


def test_gradients_that_are_not_finite_change_nothing_and_then_stop_the_run() -> None:
    step, state = a_step()
    bad = a_batch() | {"y": np.full(ROWS, np.nan, np.float32)}
    state, _ = step(state, a_batch(0))
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.optimizer.inner))]
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert metrics["notfinite"] == count
        training.check_finite({"notfinite": float(count)}, ADAM, "sft", 7)
    assert [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.optimizer.inner))
    ] == before
    state, metrics = step(state, bad)
    with pytest.raises(DataError, match=r"sft step 8: 3 gradients in a row were not finite.*sft\.optim\.lr"):
        training.check_finite({name: float(value) for name, value in metrics.items()}, ADAM, "sft", 8)
    _, metrics = step(state, a_batch(1))
    assert metrics["notfinite"] == 0, "one that is finite starts the count again"


def test_compute_dtype_is_that_of_the_forward_pass_only() -> None:
    step, state = a_step(compute="bfloat16")
    state, metrics = step(state, a_batch())
    assert metrics["dtype"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    mixed = training.cast({"w": jnp.ones(2), "count": jnp.ones(2, jnp.int32)}, "bfloat16")
    assert (mixed["w"].dtype, mixed["count"].dtype) == (jnp.bfloat16, jnp.int32)


def test_the_old_state_is_given_away() -> None:
    step, state = a_step()
    step(state, a_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_rows_are_split_over_data_and_fsdp_or_refused() -> None:
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])
    placed = training.place(a_batch(), mesh)
    assert {leaf.sharding.spec for leaf in placed.values()} == {PartitionSpec(("data", "fsdp"))}
    assert placed["x"].addressable_shards[0].data.shape == (2, WIDTH)
    with pytest.raises(ConfigError, match=r"6 rows do not divide by data x fsdp = 4 of the mesh"):
        training.place({"x": np.zeros((6, 2))}, mesh)
    training.check_rows("sft.batch", 16, mesh, pieces=4)
    refused = r"sft\.batch 16 in 8 pieces: 2 rows do not .* 4 of the mesh data:2,fsdp:2,tensor:2, .*=auto"
    with pytest.raises(ConfigError, match=refused):
        training.check_rows("sft.batch", 16, mesh, pieces=8)


def test_a_model_taken_apart_is_the_same_model_again() -> None:
    policy = small.config().policy
    model = small.stir(fresh(model_config(policy, make_tokenizer(["a retina"], policy.vocab)), 0))
    skeleton, params = training.split(model)
    again = skeleton.merge(params, Options(unroll=2))
    assert again.options == Options(unroll=2)
    assert training.split(again)[0].abstract == skeleton.abstract
    doubled = skeleton.merge(jax.tree.map(lambda leaf: 2 * leaf, params))
    np.testing.assert_array_equal(doubled.head, 2 * model.head)
    np.testing.assert_array_equal(again.head, model.head)


def test_moments_lie_where_their_parameters_lie() -> None:
    mesh = sharding.parse_mesh("fsdp:2,tensor:4", jax.devices()[:8])
    policy = small.config().policy
    model = fresh(model_config(policy, make_tokenizer(["a retina"], policy.vocab)), 0)
    skeleton, params = training.split(model)
    state = training.start(skeleton, params, training.make_optimizer(ADAM, 5), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    assert places == skeleton.shardings(mesh)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == model.head.shape]
    assert moments, "or the test would prove nothing"
    assert {leaf.sharding.spec for leaf in moments} == {state.params["lm_head"]["weight"].sharding.spec}
    assert not state.params["lm_head"]["weight"].sharding.is_fully_replicated
