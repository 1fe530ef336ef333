"""Adapters in the sampler, which decodes with weights of its own: what it samples from is what is trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax import sharding, training
from fundus_jax.grpo import sampler
from fundus_jax.grpo.sampler import sample
from fundus_jax.grpo.update import response_logprobs
from fundus_jax.models.batch import Batch
from fundus_jax.models.lora import LoraConfig, adapted, attach
from tests.models import small

SOME = "q_proj,v_proj,down_proj"  # of the joined projections not all


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    processor = small.processor(tmp_path_factory.mktemp("processor"))
    return small.batch(processor, [[(60, 70)], [], [], []], length=64, patches=64)


def with_adapters(targets: str, size: float) -> Any:
    """A model whose adapters are scaled by 4 / 2, with B normal `size`."""
    model = small.model()
    attach(model, LoraConfig(rank=2, alpha=4.0, targets=targets))
    for number, linear in enumerate(adapted(model).values()):
        assert linear.lora_b is not None
        drawn = jax.random.normal(jax.random.key(number), linear.lora_b.get_value().shape)
        linear.lora_b.set_value(size * drawn)
    return model


@jax.jit
def scores(model: Any, batch: Batch, tokens: jax.Array) -> jax.Array:
    return response_logprobs(model, batch, tokens, 1.0)[0]


@pytest.mark.parametrize("targets", ["text.*", SOME])
def test_the_sampled_logprobs_are_the_trainers(batch: Batch, targets: str) -> None:
    model = with_adapters(targets, 0.15)
    got, _ = sample(model, batch, max_new_tokens=5, group_size=2, seed=3)
    scored = scores(model, batch, got.tokens)
    np.testing.assert_allclose(np.where(got.mask, scored, 0), got.logprobs, atol=1e-4)
    for linear in adapted(model).values():
        linear.lora_scale = 0.0
    without = scores(model, batch, got.tokens)
    assert np.abs(np.asarray(without) - np.asarray(scored)).max() > 0.1, "they would be missed"


@pytest.mark.parametrize("targets", ["text.*", SOME])
def test_a_mesh_changes_no_token(batch: Batch, targets: str) -> None:
    """Adapters are whole over fsdp, and split over tensor where their weight is."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    settings: dict[str, Any] = {"max_new_tokens": 5, "group_size": 2, "seed": 3}
    model = with_adapters(targets, 0.15)
    alone, _ = sample(model, batch, **settings)
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])
    skeleton, params = training.split(model)
    with jax.set_mesh(mesh):
        spread = skeleton.merge(jax.device_put(params, skeleton.shardings(mesh)))
        got, _ = sample(spread, training.place(batch, mesh), **settings)
        layer: Any = sampler.make_stepper(nnx.split(spread)).layers[1]
    assert np.array_equal(got.tokens, alone.tokens)
    np.testing.assert_allclose(got.logprobs, alone.logprobs, atol=1e-4)
    places = [[(*half.sharding.spec, None)[:2] for half in one[1:]] for one in (layer.qkv, layer.down)]
    assert places == [[(None, None), (None, "tensor")], [("tensor", None), (None, None)]]
    assert layer.qkv.low.shape == (64, 2 * 2 if targets == SOME else 3 * 2)


def test_a_small_adapter_is_not_rounded_away(batch: Batch) -> None:
    """In bfloat16, B A far below half a unit of the weights' last place: decoding sees it as the trainer
    does. It is visible where tokens have something in common, here a constant in every embedding, which A
    looks at; then many small terms add up to more than an activation's last place."""
    model = with_adapters("text.*", 5e-5)
    embedding = model.text.embed_tokens
    embedding.set_value(embedding.get_value() + 6.0)
    for linear in adapted(model).values():
        assert linear.lora_a is not None
        linear.lora_a.set_value(jnp.ones_like(linear.lora_a.get_value()))
    settings: dict[str, Any] = {"max_new_tokens": 6, "group_size": 128, "seed": 3}
    skeleton, params = training.split(model)
    narrow = training.cast(params, "bfloat16")
    narrow_off = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, narrow
    )
    on, off = (sample(skeleton.merge(one), batch, **settings)[0] for one in (narrow, narrow_off))
    seen = np.array(on.mask & (jnp.cumprod(on.tokens == off.tokens, axis=-1) > 0))
    seen[..., 0] = False  # drawn from what the trainer's own layers read

    def moved(dtype: str) -> np.ndarray:
        one, other = (skeleton.merge(training.cast(part, dtype)) for part in (narrow, narrow_off))
        return np.asarray(scores(one, batch, on.tokens) - scores(other, batch, on.tokens))[seen]

    exact = moved("float32")
    found = {"sampler": np.asarray(on.logprobs - off.logprobs)[seen], "trainer": moved("bfloat16")}
    slopes = {name: float(change @ exact / (exact @ exact)) for name, change in found.items()}
    assert seen.sum() > 1000
    assert 0.8 < slopes["trainer"] < 1.2, "the trainer sees it"
    assert abs(slopes["sampler"] - slopes["trainer"]) < 0.2, slopes  # 0.45 with B A added to the weights
