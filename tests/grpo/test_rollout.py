"""The sampler: what it may draw, when it stops, that it draws from what it says; what does not matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fundus_jax import sharding, training
from fundus_jax.grpo.rollout import Rollout, generate
from fundus_jax.grpo.update import response_logprobs
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.decode import Stepper
from fundus_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError
from tests.models import small

LESS_COMPILING = {"xla_backend_optimization_level": 0}
SIZES = [[(60, 70)], [], [(100, 50), (50, 60)], [(90, 30)]]  # images of each row
LENGTH, PATCHES = 64, 128


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return small.processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def batch(processor: Processor) -> Batch:
    return small.batch(processor, SIZES, length=LENGTH, patches=PATCHES)


def endless(eos_ids: tuple[int, ...] = ()) -> Qwen2_5_VL:
    """A model that ends with `eos_ids` only."""
    model = small.model()
    model.config = dataclasses.replace(model.config, eos_ids=eos_ids)
    return model


def compiled(model: Qwen2_5_VL, function: Any) -> Any:
    """`function(model, ...)`, compiled with the parameters as an argument."""
    graph, state = nnx.split(model)
    call = jax.jit(
        lambda state, *rest: function(nnx.merge(graph, state), *rest), compiler_options=LESS_COMPILING
    )
    return lambda *rest: jax.tree.map(np.asarray, call(state, *rest))


def sampler(model: Qwen2_5_VL, **settings: Any) -> Any:
    """(batch, key) -> Rollout in numpy."""
    return compiled(model, lambda model, batch, key: generate(model, batch, seed=key, **settings))


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)


@pytest.fixture(scope="module")
def draw_greedily() -> Any:
    """A batch and a key -> 12 greedy tokens a row of a model that never ends."""
    return sampler(endless(), max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def greedy(batch: Batch, draw_greedily: Any) -> Rollout:
    return draw_greedily(batch, key())


def test_greedy_is_the_argmax_of_the_whole_pass(batch: Batch, greedy: Rollout) -> None:
    model, count = endless(), greedy.tokens.shape[2]
    assert greedy.tokens.shape == (4, 1, 12)
    assert greedy.mask.all()
    logits = compiled(model, lambda model, batch: model(batch))(appended(batch, greedy.tokens[:, 0]))
    logits = np.where(np.isin(np.arange(logits.shape[-1]), model.config.banned_ids), -np.inf, logits)
    logs = np.asarray(jax.nn.log_softmax(logits))
    for row in range(4):  # by induction: each token is the best after those before it
        start = batch.mask[row].sum() - 1
        steps = logs[row, start : start + count]
        assert np.array_equal(steps.argmax(axis=-1), greedy.tokens[row, 0])
        assert np.abs(steps.max(axis=-1) - greedy.logprobs[row, 0]).max() < 1e-4
    assert len(set(greedy.tokens[:, 0, 0])) > 1


def appended(batch: Batch, responses: np.ndarray) -> Batch:
    """Prompts and responses [B,N] as whole conversations."""
    tokens, mask, positions = (np.array(x) for x in (batch.tokens, batch.mask, batch.positions))
    for row, response in enumerate(responses):
        place = slice(mask[row].sum(), mask[row].sum() + len(response))
        positions[row, :, place] = positions[row].max() + 1 + np.arange(len(response))
        tokens[row, place], mask[row, place] = response, True
    return dataclasses.replace(batch, tokens=tokens, mask=mask, positions=positions)


def test_it_ends_at_an_end_token_and_stops_when_all_have_ended(
    batch: Batch, greedy: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy.tokens[:, 0]
    ends = tuple(int(whole[row, 3]) for row in range(4))
    lengths = np.isin(whole, ends).argmax(axis=1) + 1
    assert lengths.max() <= 4
    assert len(set(ends)) > 1
    steps: list[int] = []
    call = Stepper.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return call(self, *arguments)

    monkeypatch.setattr(Stepper, "__call__", counted)
    got = sampler(endless(ends), max_new_tokens=12, temperature=0.0)(batch, key())
    jax.effects_barrier()
    assert len(steps) == lengths.max() - 1  # the first token comes from the prefill
    for row, length in enumerate(lengths):
        assert got.mask[row, 0].tolist() == [True] * length + [False] * (12 - length)
        assert np.array_equal(got.tokens[row, 0, :length], whole[row, :length])  # the end token included
        assert (got.tokens[row, 0, length:] == ends[0]).all()
        assert (got.logprobs[row, 0, length:] == 0).all()
        np.testing.assert_allclose(got.logprobs[row, 0, :length], greedy.logprobs[row, 0, :length], atol=1e-5)


def test_banned_ids_are_never_drawn(batch: Batch) -> None:
    """Not even where their logits are by far the largest: u and -u, v and -v, a hundredfold."""
    model = endless()
    assert model.lm_head is not None
    weight, banned = model.lm_head.weight, jnp.asarray(model.config.banned_ids)
    u, v = 100 * jax.random.normal(jax.random.key(1), (2, model.config.hidden_size))
    weight.set_value(weight.get_value().at[banned].set(jnp.stack([u, -u, v, -v])))
    best = compiled(model, lambda model, batch: model(batch).argmax(axis=-1))(batch)
    assert np.isin(best[batch.mask], model.config.banned_ids).all()
    drawn = sampler(model, max_new_tokens=50, temperature=1.0, group_size=25)(batch, key())
    assert drawn.tokens.size == 5000
    assert drawn.mask.all()
    assert not np.isin(drawn.tokens, model.config.banned_ids).any()
    assert np.isfinite(drawn.logprobs).all()
    assert len(np.unique(drawn.tokens)) > 200
    likeliest = sampler(model, max_new_tokens=5, temperature=0.0)(batch, key())
    assert not np.isin(likeliest.tokens, model.config.banned_ids).any()


def test_samples_come_from_the_distribution_they_are_said_to(batch: Batch) -> None:
    """First and second tokens of 4,000 rollouts of one prompt, by their frequencies."""
    model, count = endless(), 4000
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    draw = sampler(model, max_new_tokens=2, temperature=1.5, group_size=count)
    got = draw(one, key())
    tokens, logprobs = got.tokens[0], got.logprobs[0]
    first, places, seen = np.unique(tokens[:, 0], return_index=True, return_counts=True)
    expected = np.exp(logprobs[places, 0]) * count
    assert len(first) > 100
    common = expected > 5
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum()
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
    # rollouts do not follow each other: neighbours agree as often as two independent draws would
    agreement = (tokens[1:, 0] == tokens[:-1, 0]).mean()
    assert abs(agreement - ((seen / count) ** 2).sum()) < 0.02
    second = tokens[tokens[:, 0] == first[seen.argmax()], 1]
    assert len(np.unique(second)) > 5  # nor does the second token follow from the first
    again, other = draw(one, key()), draw(one, key(1))
    assert np.array_equal(again.tokens, got.tokens)
    assert np.array_equal(again.logprobs, got.logprobs)
    assert (other.tokens != got.tokens).mean() > 0.5


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_trainer_agrees_on_the_log_probs(batch: Batch, temperature: float) -> None:
    model = small.model()  # with end tokens

    def both(model: Any, batch: Batch, key: jax.Array) -> Any:
        rollout = generate(model, batch, max_new_tokens=10, temperature=temperature, group_size=3, seed=key)
        return rollout, response_logprobs(model, batch, rollout.tokens, temperature)

    rollout, (logprobs, entropy) = compiled(model, both)(batch, key(4))
    assert np.abs(logprobs - rollout.logprobs)[rollout.mask].max() < 1e-4
    assert (rollout.logprobs[rollout.mask] < 0).all()
    assert (entropy[rollout.mask] > 0).all()


def test_neighbours_and_padding_do_not_matter(batch: Batch, greedy: Rollout, draw_greedily: Any) -> None:
    def rows(order: list[int]) -> Batch:
        return jax.tree.map(lambda leaf: leaf[np.asarray(order)], batch)

    for order in ([2, 0, 3, 1], [2, 2, 2, 0]):
        got = draw_greedily(rows(order), key())
        assert np.array_equal(got.tokens, greedy.tokens[order])
        np.testing.assert_allclose(got.logprobs, greedy.logprobs[order], atol=1e-5)
    one, length = rows([3]), int(batch.mask[3].sum())
    used = {name: getattr(one, name)[:, :length] for name in ("tokens", "mask", "image_index")}
    used |= {name: getattr(one, name)[:, :64] for name in ("patches", "patch_hw", "patch_image")}
    assert (one.patch_image[:, 64:] == -1).all()
    alone = dataclasses.replace(one, positions=one.positions[:, :, :length], **used)
    assert alone.tokens.shape[1] < LENGTH - 10
    got = draw_greedily(alone, key())  # no row beside it, no padding at all
    assert np.array_equal(got.tokens[0], greedy.tokens[3])
    np.testing.assert_allclose(got.logprobs[0], greedy.logprobs[3], atol=1e-4)


def test_images_matter_to_both_passes(batch: Batch) -> None:
    model = small.model()
    tokens = jax.random.randint(key(), (4, 2, 5), 0, 900)

    def passes(model: Any, batch: Batch) -> Any:
        prompt = model.prefill(batch)
        return prompt.last, response_logprobs(model, batch, tokens, 1.0)[0]

    run = compiled(model, passes)
    changed = np.array(batch.patches)
    changed[0] *= -1  # the image of row 0
    last, logprobs = run(batch)
    other_last, other = run(dataclasses.replace(batch, patches=changed))
    assert np.abs(other_last - last)[0].max() > 0.1
    assert (np.abs(other - logprobs)[0].max(axis=0) > 0.01).all()  # at every place of the response
    assert np.abs(other - logprobs)[1:].max() == 0
    assert np.abs(other_last - last)[1:].max() == 0


def test_a_mesh_changes_no_token(batch: Batch) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "group_size": 2, "seed": 11}
    model = endless()
    alone = jax.tree.map(np.asarray, generate(model, batch, **settings))
    assert np.array_equal(
        alone.tokens, np.asarray(generate(model, batch, **settings | {"seed": key(11)}).tokens)
    )
    mesh = sharding.parse_mesh("data:2,fsdp:2,tensor:2", jax.devices()[:8])
    skeleton, params = training.split(model)
    with jax.set_mesh(mesh):
        spread = skeleton.merge(jax.device_put(params, skeleton.shardings(mesh)))
        got = generate(spread, training.place(batch, mesh), **settings)
    assert np.array_equal(np.asarray(got.tokens), alone.tokens)
    assert np.array_equal(np.asarray(got.mask), alone.mask)
    assert np.abs(np.asarray(got.logprobs) - alone.logprobs).max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"group_size": 0}, {"temperature": -0.1}, {"temperature": float("nan")}],
)
def test_settings_that_make_no_sense(batch: Batch, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be >= 1, temperature .* >= 0"):
        generate(small.model(), batch, **({"max_new_tokens": 4} | settings))
