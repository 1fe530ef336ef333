"""The update on a mesh that cuts rows and weights: the numbers of one device."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import sharding, training
from fundus_jax.base import policy
from fundus_jax.grpo.update import make_score, make_update
from tests import small
from tests.grpo.test_update import CONFIG, Scene


def test_fsdp_and_tensor_change_no_number(tmp_path: Path) -> None:
    """Of scores and of an update, with the weights of both towers of a small Qwen2.5-VL cut along both."""
    real = Scene(tmp_path / "hf", lambda config: small.stir(policy.fresh(config, 0), deviation=0.15))
    mesh = sharding.parse_mesh("data:1,fsdp:2,tensor:2", jax.devices()[:4])
    state, metrics = real.update(CONFIG, real.samples())
    assert metrics["grad_norm"] > 1e-3
    assert metrics["kl"] > 1e-6
    with jax.set_mesh(mesh):
        optimizer = training.make_optimizer(CONFIG.optim, 5)
        params = jax.tree.map(jnp.copy, real.params)
        start = training.start(real.skeleton, params, optimizer, mesh)
        for tower in ("text", "visual"):
            cut = [str(leaf.sharding.spec) for leaf in jax.tree.leaves(start.params[tower])]
            assert any("fsdp" in spec and "tensor" in spec for spec in cut)
        placed = training.place(jax.tree.map(np.asarray, real.samples()), mesh)
        scores = make_score(real.skeleton.merge, CONFIG, "float32")
        spread_scores = scores(start.params, placed.prompts, placed.tokens)
        step = make_update(real.skeleton.merge, optimizer, CONFIG, "float32")
        spread, spread_metrics = step(start, placed)
    alone = real.score(real.params, real.prompts, real.rollout.tokens)
    np.testing.assert_allclose(spread_scores, alone, rtol=0, atol=1e-5)
    for name, value in metrics.items():
        assert float(spread_metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    adam, other_adam = state.optimizer.inner[0], spread.optimizer.inner[0]
    for one, other in ((adam.mu, other_adam.mu), (adam.nu, other_adam.nu)):  # the gradient, and its square
        for (path, leaf), found in zip(
            jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
        ):
            scale = np.abs(leaf).max()
            np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-4 * scale, err_msg=str(path))
