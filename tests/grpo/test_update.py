"""The update on rollouts: the group-shared pass against plain full rows, the sampler, images, micro-batches, silent groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fundus_jax import training
from fundus_jax.base import policy
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.loss import policy_loss
from fundus_jax.grpo.rollout import Rollout, generate
from fundus_jax.grpo.update import Samples, make_score, make_update, response_logprobs
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
ADVANTAGES = np.asarray([[1.0, -0.5, -0.5], [-1.2, 0.2, 1.0]], np.float32)


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


class Scene:
    """A stirred policy, prompts of unequal length with images of unequal size, and rollouts of it."""

    def __init__(self, directory: Path) -> None:
        sizes = small.config().policy
        policy.write_policy(directory, sizes, ["the retina shows a few red dots; what can you see here?"])
        config = read_config(directory)
        # Two of the tokens end an answer, so that rollouts are of unequal length.
        self.model = small.stir(policy.fresh(config, 0), deviation=0.15)
        self.processor = Processor.from_pretrained(directory)
        self.prompts = self.processor(
            [f"{IMAGE}what can you see here?", f"red {IMAGE}dots"], [[picture(84, 28, 0)], [picture(56, 56, 1)]],
        )  # fmt: skip
        self.skeleton, self.params = training.split(self.model)
        self.rollout = generate(
            self.model, self.prompts, max_new_tokens=N, temperature=CONFIG.temperature, group_size=G, seed=0
        )
        lengths = np.asarray([[7, 3, 1], [5, 7, 2]])  # what follows counts as padding
        self.mask = np.arange(N) < lengths[..., None]

    def samples(self, **changes: Any) -> Samples:
        values: dict[str, Any] = {
            "prompts": self.prompts, "tokens": self.rollout.tokens, "mask": jnp.asarray(self.mask),
            "sampled": self.rollout.logprobs, "advantages": jnp.asarray(ADVANTAGES), "old": None, "ref": self.reference(),
        }  # fmt: skip
        return Samples(**{**values, **changes})

    def reference(self) -> jax.Array:
        """Log-probs of a policy that is another one."""
        moved = jax.tree.map(lambda leaf: leaf * 1.02, self.params)
        return make_score(self.skeleton.merge, CONFIG, "float32")(moved, self.prompts, self.rollout.tokens)

    def update(self, config: GrpoConfig, samples: Samples) -> tuple[training.State, dict[str, float]]:
        """One update from the first weights."""
        optimizer = training.make_optimizer(config.optim, 5)
        params = jax.tree.map(jnp.copy, self.params)  # the state is donated
        step = make_update(self.skeleton.merge, optimizer, config, "float32")
        state, metrics = step(training.State(params, optimizer.init(params)), samples)
        return state, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("update") / "hf")


def full_rows(prompts: Batch, tokens: np.ndarray, mask: np.ndarray) -> tuple[Batch, np.ndarray]:
    """Prompt and response as one row each, B * G of them, right-padded; and at which positions the response's tokens stand [B*G,N]."""
    rows, places = [], []
    width = prompts.tokens.shape[1] + tokens.shape[2]
    for b in range(tokens.shape[0]):
        start = int(prompts.mask[b].sum())
        for g in range(tokens.shape[1]):
            count = int(mask[b, g].sum())
            whole = np.zeros(width, np.int32)
            whole[:start] = prompts.tokens[b, :start]
            whole[start : start + count] = tokens[b, g, :count]
            positions = np.zeros((3, width), np.int32)
            positions[:, :start] = prompts.positions[b, :, :start]
            positions[:, start : start + count] = prompts.positions[b, :, :start].max() + 1 + np.arange(count)
            index = np.full(width, -1, np.int32)
            index[:start] = prompts.image_index[b, :start]
            images = {name: getattr(prompts, name)[b] for name in ("patches", "patch_hw", "patch_image")}
            rows.append({"tokens": whole, "mask": np.arange(width) < start + count, "positions": positions, "image_index": index, **images})
            places.append(np.minimum(start + np.arange(tokens.shape[2]), width - 1))
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]}), np.stack(places)


def plain_logprobs(model: Any, rows: Batch, places: np.ndarray, tokens: jax.Array) -> jax.Array:
    """log p [B*G,N] of the responses by the model's ordinary pass over whole conversations."""
    states = jnp.take_along_axis(model.hidden(rows), jnp.asarray(places - 1)[..., None], axis=1)
    flat = tokens.reshape(-1, tokens.shape[-1])
    return token_logprobs(states, model.head, flat, banned=model.config.banned_ids, temperature=CONFIG.temperature)[0]


def test_sampler_and_trainer_agree_at_step_one(scene: Scene) -> None:
    logprobs, entropy = response_logprobs(scene.model, scene.prompts, scene.rollout.tokens, CONFIG.temperature)
    real = np.asarray(scene.rollout.mask)
    np.testing.assert_allclose(np.where(real, logprobs, 0), scene.rollout.logprobs, atol=1e-4)
    assert np.asarray(entropy)[real].min() > 0
    _, metrics = scene.update(CONFIG, scene.samples(mask=scene.rollout.mask))
    assert 0 <= metrics["sampler_gap"] < 1e-4
    shifted = scene.samples(mask=scene.rollout.mask, sampled=scene.rollout.logprobs - 0.25)
    assert scene.update(CONFIG, shifted)[1]["sampler_gap"] == pytest.approx(0.25, abs=1e-4), "it would be seen"


def test_the_ratio_of_the_on_policy_step_is_exactly_one(scene: Scene) -> None:
    _, metrics = scene.update(CONFIG, scene.samples())
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["old_kl"]) == (1.0, 1.0, 0.0)
    assert (metrics["clip_low"], metrics["clip_high"]) == (0.0, 0.0)
    assert metrics["tokens"] == scene.mask.sum()
    assert metrics["kl"] > 0


def test_old_logprobs_take_the_place_of_the_passes_own(scene: Scene) -> None:
    score = make_score(scene.skeleton.merge, CONFIG, "float32")
    own = score(scene.params, scene.prompts, scene.rollout.tokens)
    _, same = scene.update(CONFIG, scene.samples(old=own))
    assert same["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    _, other = scene.update(CONFIG, scene.samples(old=own - 0.5))
    assert other["ratio_mean"] == pytest.approx(np.exp(0.5), rel=1e-3)
    assert other["clip_high"] > 0


def test_the_shared_pass_has_the_gradient_of_whole_rows(scene: Scene) -> None:
    """In float64, where only a difference in what is computed is left."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), scene.params)
        prompts = replace(scene.prompts, patches=scene.prompts.patches.astype(np.float64))
        tokens, mask = jnp.asarray(scene.rollout.tokens), jnp.asarray(scene.mask)
        rows, places = full_rows(prompts, np.asarray(tokens), scene.mask)
        flat, ref = mask.reshape(-1, N), jnp.asarray(scene.reference()).reshape(-1, N)

        def value(logprobs: jax.Array) -> jax.Array:
            old = jax.lax.stop_gradient(logprobs) - 0.05
            return policy_loss(logprobs, old, ref, jnp.asarray(ADVANTAGES).reshape(-1), flat, CONFIG)[0]

        def shared(params: Any) -> jax.Array:
            model = scene.skeleton.merge(params)
            return value(response_logprobs(model, prompts, tokens, CONFIG.temperature)[0].reshape(-1, N))

        def plain(params: Any) -> jax.Array:
            return value(plain_logprobs(scene.skeleton.merge(params), rows, places, tokens))

        (one, grads), (other, grads_plain) = (jax.jit(jax.value_and_grad(f))(params) for f in (shared, plain))
        np.testing.assert_allclose(one, other, rtol=1e-6)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads_plain):
            mine = grads
            for key in path:
                mine = mine[key.key]
            scale = np.abs(grad).max()
            assert scale > 0, f"{path} has no gradient: the test would prove nothing"
            np.testing.assert_allclose(mine, grad, rtol=0, atol=1e-5 * scale, err_msg=str(path))


def test_one_update_moves_the_weights_as_whole_rows_would(scene: Scene) -> None:
    """The compiled float32 step, against the gradient's norm of the plain pass."""
    tokens, mask = scene.rollout.tokens, jnp.asarray(scene.mask).reshape(-1, N)
    rows, places = full_rows(scene.prompts, np.asarray(tokens), scene.mask)

    def plain(params: Any) -> jax.Array:
        logprobs = plain_logprobs(scene.skeleton.merge(params), rows, places, tokens)
        old, ref = jax.lax.stop_gradient(logprobs), scene.reference().reshape(-1, N)
        return policy_loss(logprobs, old, ref, jnp.asarray(ADVANTAGES).reshape(-1), mask, CONFIG)[0]

    value, grads = jax.value_and_grad(plain)(scene.params)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    _, metrics = scene.update(CONFIG, scene.samples())
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean", "constant"])
def test_micro_batches_change_nothing(scene: Scene, aggregate: str) -> None:
    config = replace(CONFIG, aggregate=aggregate, constant_norm=N if aggregate == "constant" else 0)
    state, metrics = scene.update(config, scene.samples())
    cut, metrics_cut = scene.update(replace(config, micro_batch=G), scene.samples())
    assert metrics.keys() == metrics_cut.keys()
    for name in metrics:
        assert metrics_cut[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-7), name
    first = jax.tree.leaves(scene.params)
    for before, one, other in zip(first, *(jax.tree.leaves(s.optimizer.inner[0].mu) for s in (state, cut)), strict=True):
        assert before.shape == one.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * np.abs(one).max() + 1e-9)


def test_images_matter_to_score_and_update(scene: Scene) -> None:
    patches = scene.prompts.patches.copy()
    patches[1] = np.where(patches[1] != 0, -patches[1], 0)
    other = replace(scene.prompts, patches=patches)
    score = make_score(scene.skeleton.merge, CONFIG, "float32")
    seen, changed = (np.asarray(score(scene.params, prompts, scene.rollout.tokens)) for prompts in (scene.prompts, other))
    assert np.abs(changed - seen)[1].max() > 1e-2
    assert np.array_equal(changed[0], seen[0]), "and those of another row do not"
    one, two = (scene.update(CONFIG, scene.samples(prompts=prompts))[1]["loss"] for prompts in (scene.prompts, other))
    assert one != two


def test_groups_without_variance_give_no_gradient(scene: Scene) -> None:
    silent = replace(CONFIG, kl_coef=0.0)
    state, metrics = scene.update(silent, scene.samples(advantages=jnp.zeros((B, G)), ref=None))
    assert (metrics["grad_norm"], metrics["loss"]) == (0.0, 0.0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params, scene.params)))
    half = np.stack([ADVANTAGES[0], np.zeros(G, np.float32)])
    _, metrics = scene.update(silent, scene.samples(advantages=jnp.asarray(half), ref=None))
    assert metrics["grad_norm"] > 0


def test_without_kl_no_reference_is_needed_and_with_it_there_must_be_one(scene: Scene) -> None:
    _, metrics = scene.update(replace(CONFIG, kl_coef=0.0), scene.samples(ref=None))
    assert "kl" not in metrics
    with pytest.raises(ConfigError, match="kl_coef is 0.05 but there are no ref_logprobs"):
        scene.update(CONFIG, scene.samples(ref=None))


def test_image_ids_are_impossible_for_sampler_and_trainer(scene: Scene) -> None:
    banned = scene.model.config.banned_ids
    assert not np.isin(scene.rollout.tokens, banned).any()
    tokens = jnp.asarray(scene.rollout.tokens).at[0, 0, 0].set(banned[0])
    logprobs, _ = response_logprobs(scene.model, scene.prompts, tokens, CONFIG.temperature)
    assert logprobs[0, 0, 0] < -1e30
    assert np.isfinite(np.asarray(logprobs)[0, 0, 1:]).all()


def test_the_scene_is_one_that_could_fail(scene: Scene) -> None:
    rollout: Rollout = scene.rollout
    assert len({tuple(row) for row in np.asarray(rollout.tokens).reshape(-1, N)}) == B * G
    assert len({int(row.sum()) for row in np.asarray(scene.prompts.mask)}) == B, "prompts of unequal length"
    assert len({int((row >= 0).sum()) for row in np.asarray(scene.prompts.image_index)}) == B, "images of unequal size"
