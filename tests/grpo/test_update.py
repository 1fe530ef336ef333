"""The update on rollouts: the group-shared pass against plain full rows, the sampler, images, micro-batches,
silent groups.

What concerns the model is tested with a small Qwen2.5-VL (and few compilations), the rest with a `Bigram`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from fundus_jax import sharding, training
from fundus_jax.base import policy
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.loss import policy_loss
from fundus_jax.grpo.rollout import generate
from fundus_jax.grpo.update import Samples, flat_last, make_score, make_update, response_logprobs
from fundus_jax.models import read_config
from fundus_jax.models.batch import Batch
from fundus_jax.models.logprobs import token_logprobs
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.optim import OptimConfig
from fundus_jax.records import ConfigError
from tests import small

B, G, N = 2, 3, 7
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CONFIG = GrpoConfig(
    prompts_per_step=B, group_size=G, micro_batch=B * G, max_new_tokens=N, temperature=0.7, kl_coef=0.05,
    optim=OptimConfig(lr=1e-3, clip_norm=float("inf")),
)  # fmt: skip
NO_KL = replace(CONFIG, kl_coef=0.0)
ADVANTAGES = np.asarray([[1.0, -0.5, -0.5], [-1.2, 0.2, 1.0]], np.float32)
LENGTHS = np.asarray([[7, 3, 1], [5, 7, 2]])  # tokens of the responses; what follows is padding


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


class Scene:
    """A policy, prompts of unequal length with images of unequal size, and rollouts of unequal length."""

    def __init__(self, directory: Path, make: Any) -> None:
        texts = ["the retina shows a few red dots; what can you see here?"]
        policy.write_policy(directory, small.config().policy, texts)
        processor = Processor.from_pretrained(directory)
        self.model = make(read_config(directory))
        self.prompts = processor(
            [f"{IMAGE}what can you see?", f"red {IMAGE}"], [[picture(84, 28, 0)], [picture(56, 56, 1)]]
        )
        self.skeleton, self.params = training.split(self.model)
        settings = {"max_new_tokens": N, "temperature": CONFIG.temperature, "group_size": G}
        self.rollout = generate(self.model, self.prompts, seed=0, **settings)
        self.mask = np.arange(N) < LENGTHS[..., None]
        self.score = make_score(self.skeleton.merge, CONFIG, "float32")
        moved = jax.tree.map(lambda leaf: leaf * 1.02, self.params)
        self.reference = self.score(moved, self.prompts, self.rollout.tokens)
        self.compiled: dict[str, Any] = {}

    def samples(self, **changes: Any) -> Samples:
        values = {
            "prompts": self.prompts, "tokens": self.rollout.tokens, "mask": jnp.asarray(self.mask),
            "sampled": self.rollout.logprobs, "advantages": jnp.asarray(ADVANTAGES), "old": None,
            "ref": self.reference,
        }  # fmt: skip
        return Samples(**{**values, **changes})

    def update(self, config: GrpoConfig, samples: Samples) -> tuple[training.State, dict[str, float]]:
        """One update from the first weights."""
        optimizer = training.make_optimizer(config.optim, 5)
        params = jax.tree.map(jnp.copy, self.params)  # the state is donated
        step = self.compiled.setdefault(
            repr(config), make_update(self.skeleton.merge, optimizer, config, "float32")
        )
        state, metrics = step(training.State(params, optimizer.init(params)), samples)
        return state, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """With a small Qwen2.5-VL in which everything depends on everything."""
    path = tmp_path_factory.mktemp("real") / "hf"
    return Scene(path, lambda config: small.stir(policy.fresh(config, 0), deviation=0.15))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """With a bigram policy."""
    path = tmp_path_factory.mktemp("bigram") / "hf"
    return Scene(path, lambda config: small.Bigram(config, rngs=nnx.Rngs(0)))


def full_rows(prompts: Batch, tokens: np.ndarray) -> tuple[Batch, np.ndarray]:
    """Prompt and response as one row each, B * G of them, right-padded; and at which positions the response's
    tokens stand, [B*G,N]."""
    rows, places = [], []
    width = prompts.tokens.shape[1] + N
    for b, g in np.ndindex(B, G):
        start, count = int(prompts.mask[b].sum()), int(LENGTHS[b, g])
        row = {
            "tokens": np.zeros(width, np.int32), "mask": np.arange(width) < start + count,
            "segments": (np.arange(width) < start + count).astype(np.int32),
            "positions": np.zeros((3, width), np.int32), "image_index": np.full(width, -1, np.int32),
            **{name: getattr(prompts, name)[b] for name in ("patches", "patch_hw", "patch_image")},
        }  # fmt: skip
        for name in ("tokens", "positions", "image_index"):
            row[name][..., :start] = getattr(prompts, name)[b, ..., :start]
        row["tokens"][start : start + count] = tokens[b, g, :count]
        following = prompts.positions[b, :, :start].max() + 1 + np.arange(count)
        row["positions"][:, start : start + count] = following
        rows.append(row)
        places.append(np.minimum(start + np.arange(N), width - 1))
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]}), np.stack(places)


def test_the_scene_is_one_that_could_fail(real: Scene) -> None:
    assert len({tuple(row) for row in np.asarray(real.rollout.tokens).reshape(-1, N)}) == B * G
    assert len({int(row.sum()) for row in np.asarray(real.prompts.mask)}) == B, "prompts of unequal length"
    assert len({int((row >= 0).sum()) for row in np.asarray(real.prompts.patch_image)}) == B, "and images"


def test_the_shared_pass_has_the_gradient_of_whole_rows(real: Scene) -> None:
    """In float64, where only a difference in what is computed is left."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), real.params)
        prompts = replace(real.prompts, patches=real.prompts.patches.astype(np.float64))
        tokens, mask = jnp.asarray(real.rollout.tokens), jnp.asarray(real.mask).reshape(-1, N)
        rows, places = full_rows(prompts, np.asarray(tokens))
        ref, advantages = jnp.asarray(real.reference).reshape(-1, N), jnp.asarray(ADVANTAGES).reshape(-1)

        def value(logprobs: jax.Array) -> jax.Array:
            old = jax.lax.stop_gradient(logprobs)
            return policy_loss(logprobs, old, ref, advantages, mask, CONFIG)[0]

        def shared(params: Any) -> jax.Array:
            model = real.skeleton.merge(params)
            return value(response_logprobs(model, prompts, tokens, CONFIG.temperature)[0].reshape(-1, N))

        def plain(params: Any) -> jax.Array:
            model = real.skeleton.merge(params)
            states = jnp.take_along_axis(model.hidden(rows), jnp.asarray(places - 1)[..., None], axis=1)
            settings = {"banned": model.config.banned_ids, "temperature": CONFIG.temperature}
            return value(token_logprobs(states, model.head, tokens.reshape(-1, N), **settings)[0])

        (one, grads), (two, wanted) = (jax.jit(jax.value_and_grad(f))(params) for f in (shared, plain))
        np.testing.assert_allclose(one, two, rtol=1e-6)  # the loss itself is float32
        mine = dict(jax.tree_util.tree_leaves_with_path(grads))
        for path, grad in jax.tree_util.tree_leaves_with_path(wanted):
            scale = np.abs(grad).max()
            assert scale > 0, f"{path} has no gradient: the test would prove nothing"
            np.testing.assert_allclose(mine[path], grad, rtol=0, atol=1e-5 * scale, err_msg=str(path))


def test_the_step_applies_that_gradient(scene: Scene) -> None:
    mask, ref = jnp.asarray(scene.mask).reshape(-1, N), scene.reference.reshape(-1, N)

    def plain(params: Any) -> jax.Array:
        model = scene.skeleton.merge(params)
        logprobs, _ = response_logprobs(model, scene.prompts, scene.rollout.tokens, CONFIG.temperature)
        logprobs = logprobs.reshape(-1, N)
        old = jax.lax.stop_gradient(logprobs)
        return policy_loss(logprobs, old, ref, jnp.asarray(ADVANTAGES).reshape(-1), mask, CONFIG)[0]

    value, grads = jax.value_and_grad(plain)(scene.params)
    state, metrics = scene.update(CONFIG, scene.samples())
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    for moment, grad in zip(*map(jax.tree.leaves, (state.optimizer.inner[0].mu, grads)), strict=True):
        np.testing.assert_allclose(moment, (1 - CONFIG.optim.b1) * grad, rtol=0, atol=1e-6)


def test_sampler_and_trainer_agree(real: Scene, scene: Scene) -> None:
    for one in (real, scene):
        sampled = np.asarray(one.rollout.mask)
        logprobs = one.score(one.params, one.prompts, one.rollout.tokens)
        np.testing.assert_allclose(np.where(sampled, logprobs, 0), one.rollout.logprobs, atol=1e-4)
    _, metrics = scene.update(CONFIG, scene.samples(mask=jnp.asarray(scene.mask & sampled)))
    assert 0 <= metrics["sampler_gap"] < 1e-4
    _, metrics = scene.update(CONFIG, scene.samples(sampled=scene.rollout.logprobs - 0.25))
    assert metrics["sampler_gap"] == pytest.approx(0.25, abs=1e-4), "a difference would be seen"
    moved = scene.samples(old=scene.rollout.logprobs + 0.5)
    _, metrics = scene.update(replace(CONFIG, mu=2), moved)
    assert metrics["sampler_gap"] == pytest.approx(0.5, abs=1e-4), "not how far later updates have moved"


def test_the_ratio_of_the_on_policy_step_is_exactly_one(scene: Scene) -> None:
    _, metrics = scene.update(CONFIG, scene.samples())
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["old_kl"]) == (1.0, 1.0, 0.0)
    assert (metrics["clip_low"], metrics["clip_high"]) == (0.0, 0.0)
    assert metrics["tokens"] == LENGTHS.sum()
    assert metrics["kl"] > 0
    assert metrics["entropy"] > 0


def test_images_matter_to_score_and_update(real: Scene, scene: Scene) -> None:
    for one in (real, scene):
        patches = one.prompts.patches.copy()
        patches[1] = -patches[1]
        both = (one.prompts, replace(one.prompts, patches=patches))
        seen, changed = (np.asarray(one.score(one.params, p, one.rollout.tokens)) for p in both)
        assert np.abs(changed - seen)[1].max() > 1e-2
        assert np.array_equal(changed[0], seen[0]), "and those of another row do not"
    before, after = (scene.update(CONFIG, scene.samples(prompts=prompts))[1] for prompts in both)
    assert abs(before["entropy"] - after["entropy"]) > 1e-4
    assert abs(before["loss"] - after["loss"]) > 1e-6


def test_image_ids_are_impossible_for_sampler_and_trainer(real: Scene) -> None:
    banned = real.model.config.banned_ids
    assert not np.isin(real.rollout.tokens, banned).any()
    forced = real.rollout.tokens.at[0, 0, 0].set(banned[0])
    logprobs = np.asarray(real.score(real.params, real.prompts, forced))
    assert logprobs[0, 0, 0] < -1e30
    assert np.isfinite(logprobs[0, 0, 1:]).all()


def test_old_logprobs_take_the_place_of_the_passes_own(scene: Scene) -> None:
    own = scene.score(scene.params, scene.prompts, scene.rollout.tokens)
    _, same = scene.update(CONFIG, scene.samples(old=own))
    assert same["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    _, other = scene.update(CONFIG, scene.samples(old=own - 0.5))
    assert other["ratio_mean"] == pytest.approx(np.exp(0.5), rel=1e-3)
    assert other["clip_high"] > 0


FORMS = [
    {"aggregate": "token-mean"},
    {"aggregate": "sequence-mean"},
    {"aggregate": "constant", "constant_norm": N},
    {
        **{"ratio": "sequence", "aggregate": "sequence-mean", "clip_low": 0.01, "clip_high": 0.01},
        **{"sampler_correction": 1.2, "sampler_ratio": "sequence", "kl_in": "reward"},
    },
    {"dual_clip": 1.3, "kl_clamp": 1e-3, "sampler_correction": 1.05},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: ",".join(map(str, form.values())))
def test_neither_micro_batches_nor_the_mesh_change_anything(scene: Scene, form: dict[str, Any]) -> None:
    config = replace(CONFIG, mu=2, **form)
    config.validate()
    own = scene.score(scene.params, scene.prompts, scene.rollout.tokens)
    moved = np.random.default_rng(10).normal(scale=0.3, size=(2, *own.shape)).astype(np.float32)
    samples = scene.samples(old=own + moved[0], sampled=own + moved[1])
    state, metrics = scene.update(config, samples)
    assert metrics["grad_norm"] > 1e-3
    assert metrics["clip_high"] + metrics["clip_low"] > 0
    for name in ("correction_capped", "clip_dual", "kl_clamped"):
        assert metrics.get(name, 0.5) > 0, f"{name}: the test would prove little"
    cut = scene.update(replace(config, micro_batch=G), samples)
    mesh = sharding.parse_mesh("data:2", jax.devices()[:2])
    with jax.set_mesh(mesh):
        optimizer = training.make_optimizer(config.optim, 5)
        step = make_update(scene.skeleton.merge, optimizer, config, "float32")
        start = training.start(scene.skeleton, jax.tree.map(jnp.copy, scene.params), optimizer, mesh)
        spread = step(start, training.place(jax.tree.map(np.asarray, samples), mesh))
    moments = jax.tree.leaves(state.optimizer.inner[0].mu)  # of the first step: the gradient
    for other, other_metrics in (cut, spread):
        assert metrics.keys() == other_metrics.keys()
        for name, value in metrics.items():
            assert float(other_metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-7), name
        for one, two in zip(moments, jax.tree.leaves(other.optimizer.inner[0].mu), strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_the_second_pass_is_taken_to_the_policy_that_sampled(scene: Scene) -> None:
    """mu = 2: two optimizer steps whose ratios are both to the log-probs from before the first."""
    config = replace(CONFIG, mu=2, optim=replace(CONFIG.optim, lr=0.05))
    old = scene.score(scene.params, scene.prompts, scene.rollout.tokens)
    samples = scene.samples(old=old)
    first, metrics = scene.update(config, samples)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    params = jax.tree.map(jnp.copy, first.params)
    step = scene.compiled[repr(config)]
    second, metrics = step(training.State(jax.tree.map(jnp.copy, params), first.optimizer), samples)
    assert metrics["ratio_max"] > 1.05

    def plain(params: Any) -> jax.Array:
        model = scene.skeleton.merge(params)
        logprobs, _ = response_logprobs(model, scene.prompts, scene.rollout.tokens, CONFIG.temperature)
        rows = (x.reshape(-1, N) for x in (logprobs, old, scene.reference))
        return policy_loss(
            *rows, jnp.asarray(ADVANTAGES).reshape(-1), jnp.asarray(scene.mask).reshape(-1, N), config
        )[0]

    value, grads = jax.value_and_grad(plain)(params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert int(second.optimizer.inner[0].count) == 2


def test_scores_do_not_depend_on_micro_batches(scene: Scene) -> None:
    cut = make_score(scene.skeleton.merge, replace(CONFIG, micro_batch=G), "float32")
    scores = cut(scene.params, scene.prompts, scene.rollout.tokens)
    whole = scene.score(scene.params, scene.prompts, scene.rollout.tokens)
    np.testing.assert_allclose(scores, whole, atol=1e-5)
    assert np.abs(np.asarray(whole)[0] - np.asarray(whole)[1]).max() > 1e-2, (
        "the order of the rows would show"
    )


def test_groups_without_variance_give_no_gradient(scene: Scene) -> None:
    silent = functools.partial(scene.samples, ref=None)
    state, metrics = scene.update(NO_KL, silent(advantages=jnp.zeros((B, G))))
    assert (metrics["grad_norm"], metrics["loss"]) == (0.0, 0.0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params, scene.params)))
    one = ADVANTAGES * np.asarray([[1.0], [0.0]], np.float32)
    _, alone = scene.update(NO_KL, silent(advantages=jnp.asarray(one)))
    assert alone["grad_norm"] > 0
    scale = np.asarray([1, 3], np.float32)[:, None, None]
    other = replace(scene.prompts, patches=scene.prompts.patches * scale)
    _, same = scene.update(NO_KL, silent(advantages=jnp.asarray(one), prompts=other))
    assert same["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-6), "the silent group has no say"


FLAT_FIRST = jnp.asarray([[0.0, 0.0, 0.0], [-1.2, 0.2, 1.0]])
DROP = replace(CONFIG, flat_groups="drop")


@pytest.mark.parametrize("micro_batch", [G, B * G])
def test_dropped_groups_leave_the_step_of_the_others(scene: Scene, micro_batch: int) -> None:
    """As if they had never been sampled: their KL and their tokens are gone too."""
    alone = scene.samples(advantages=FLAT_FIRST, mask=jnp.asarray(scene.mask).at[0].set(False))
    wanted, wanted_metrics = scene.update(CONFIG, alone)
    config = replace(DROP, micro_batch=micro_batch)
    state, metrics = scene.update(config, scene.samples(advantages=FLAT_FIRST))
    for name in wanted_metrics:
        assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-5, abs=1e-7), name
    assert metrics["tokens"] == LENGTHS[1].sum()
    for one, other in zip(*map(jax.tree.leaves, (state.params, wanted.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    _, kept = scene.update(CONFIG, scene.samples(advantages=FLAT_FIRST))
    assert kept["tokens"] == LENGTHS.sum()
    assert abs(kept["kl"] - metrics["kl"]) > 1e-6, "kept, they count"


def test_a_micro_batch_of_dropped_groups_is_not_computed(scene: Scene) -> None:
    """Shown by an image that would poison every gradient it takes part in."""
    poison = np.where(np.arange(B)[:, None, None] == 0, np.nan, 1).astype(np.float32)
    prompts = replace(scene.prompts, patches=scene.prompts.patches * poison)
    samples = functools.partial(scene.samples, advantages=FLAT_FIRST, prompts=prompts)
    assert np.isnan(scene.update(replace(CONFIG, micro_batch=G), samples())[1]["grad_norm"])
    assert scene.update(replace(DROP, micro_batch=G), samples())[1]["grad_norm"] > 0
    _, none = scene.update(replace(DROP, micro_batch=G), samples(advantages=jnp.zeros((B, G))))
    assert (none["grad_norm"], none["tokens"], none["loss"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("mesh", ["data:1", "data:2,fsdp:2"])
def test_flat_groups_come_last_on_every_device(mesh: str) -> None:
    rows, pieces = 16, 2
    flat = np.random.default_rng(0).random(rows) < 0.5
    advantages = np.where(flat[:, None], 0.0, 1.0 + np.arange(rows)[:, None] * np.asarray([1.0, -1.0]))
    numbers = np.arange(rows, dtype=np.float32)
    samples = Samples(
        prompts=numbers, tokens=numbers, mask=np.ones((rows, 2, 3), bool), sampled=numbers,  # type: ignore[arg-type]
        advantages=jnp.asarray(advantages), old=None, ref=None,
    )  # fmt: skip
    shards = 1 if mesh == "data:1" else 4
    with jax.set_mesh(sharding.parse_mesh(mesh, jax.devices()[:shards])):
        moved = jax.jit(flat_last, static_argnums=1)(samples, pieces)
    order = np.asarray(moved.tokens).astype(int)
    np.testing.assert_array_equal(moved.advantages, advantages.astype(np.float32)[order])
    np.testing.assert_array_equal(np.asarray(moved.mask).all(axis=(1, 2)), ~flat[order])
    np.testing.assert_array_equal(np.asarray(moved.mask).any(axis=(1, 2)), ~flat[order])
    share = rows // shards
    for device in range(shards):
        own = order[device * share : (device + 1) * share]
        assert sorted(own) == list(range(device * share, (device + 1) * share)), "no row changed its device"
        by_piece = own.reshape(-1, pieces).T.reshape(-1)  # rows i, i + pieces, ... form micro-batch i
        assert list(flat[by_piece]) == sorted(flat[by_piece])


def test_without_kl_no_reference_is_needed_and_with_it_there_must_be_one(scene: Scene) -> None:
    _, metrics = scene.update(NO_KL, scene.samples(ref=None))
    assert "kl" not in metrics
    with pytest.raises(ConfigError, match=r"kl_coef is 0\.05 but there are no ref_logprobs"):
        scene.update(CONFIG, scene.samples(ref=None))
