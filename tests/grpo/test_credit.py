"""From scores to advantages: penalties by hand and against TRL, and what is off changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundus_jax.grpo.advantages import group_advantages, group_stats
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.credit import credit, overlong, summed_kl
from fundus_jax.grpo.uncertainty import shape_advantages, uncertainty

B, G, N = 2, 3, 8
REWARDS = np.array([[1, 0, 2], [1, 1, np.nan]], np.float32)
VALID = ~np.isnan(REWARDS)
LENGTHS = np.array([[8, 4, 6], [8, 5, 1]])
MASK = np.arange(N) < LENGTHS[..., None]
LOGPROBS = np.where(MASK, np.log(0.5), 0).astype(np.float32)
REF = np.where(MASK, np.log(0.25), 7).astype(np.float32)  # padding of a reference may hold anything


def credited(**changes: Any) -> tuple[np.ndarray, dict[str, float]]:
    config = GrpoConfig(group_size=G, max_new_tokens=N, prompts_per_step=B, micro_batch=B * G, **changes)
    config.validate()
    return credit(REWARDS, VALID, LOGPROBS, MASK, REF, config)


def test_what_is_off_changes_nothing() -> None:
    advantages, told = credited()
    np.testing.assert_array_equal(advantages, group_advantages(REWARDS, VALID))
    assert told == {name: float(value) for name, value in group_stats(REWARDS, VALID).items()}


def test_soft_punishment_by_hand() -> None:
    np.testing.assert_allclose(
        overlong(np.array([1, 15, 16, 17, 18, 19, 20]), 20, 4), [0, 0, 0, -0.25, -0.5, -0.75, -1]
    )
    assert overlong(np.array([20]), 20, 20) == [-1]


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 60))
@settings(deadline=None)
def test_trl_punishes_alike(limit: int, cache: int, length: int) -> None:
    rewards = pytest.importorskip("trl.rewards", reason="the comparison with TRL needs trl")
    cache, length = min(cache, limit), min(length, limit)
    theirs = rewards.get_soft_overlong_punishment(limit, cache)([[1] * length])
    np.testing.assert_allclose(overlong(np.array([length]), limit, cache), theirs, atol=1e-7)


def test_long_rollouts_lose_reward() -> None:
    advantages, told = credited(overlong_cache=4, overlong_weight=0.5)
    penalty = 0.5 * np.array([[-1, 0, -0.5], [-1, -0.25, 0]], np.float32)
    np.testing.assert_allclose(advantages, group_advantages(REWARDS + penalty, VALID), atol=1e-6)
    assert told["reward/overlong"] == pytest.approx(penalty.mean())
    assert told["zero_variance"] == 0, "the second group's lengths tell its rollouts apart"
    assert told["reward"] == pytest.approx((5 + penalty[VALID].sum()) / 5)


@pytest.mark.parametrize(
    ("kl", "value"), [("k1", np.log(2)), ("k2", np.log(2) ** 2 / 2), ("k3", np.log(2) - 0.5)]
)
def test_kl_in_the_reward_by_hand(kl: str, value: float) -> None:
    """Each token is twice as likely as under the reference, and the sum over a rollout is taken off."""
    advantages, told = credited(kl=kl, kl_in="reward", kl_coef=0.1, scale="none")
    penalty = -0.1 * value * LENGTHS
    np.testing.assert_allclose(
        advantages, group_advantages(REWARDS + penalty, VALID, scale="none"), atol=1e-6
    )
    assert told["reward/kl"] == pytest.approx(penalty.mean(), rel=1e-5)
    clamped, _ = credited(kl=kl, kl_in="reward", kl_coef=0.1, scale="none", kl_clamp=0.1)
    penalty = -0.1 * 0.1 * LENGTHS
    np.testing.assert_allclose(clamped, group_advantages(REWARDS + penalty, VALID, scale="none"), atol=1e-6)


def test_padding_has_no_divergence() -> None:
    config = GrpoConfig(kl="k3")
    spoilt = np.where(MASK, REF, np.nan)
    np.testing.assert_array_equal(
        summed_kl(LOGPROBS, spoilt, MASK, config), summed_kl(LOGPROBS, REF, MASK, config)
    )


def test_the_baseline_is_that_of_the_config() -> None:
    advantages, _ = credited(baseline="leave-one-out", scale="none")
    np.testing.assert_allclose(advantages[0], [0, -1.5, 1.5])


def test_uncertainty_shapes_what_was_compared() -> None:
    advantages, told = credited(uncertainty=0.5)
    unsure = uncertainty(LOGPROBS, MASK)
    np.testing.assert_allclose(unsure, 0.5)  # every token had one half
    plain = group_advantages(REWARDS, VALID)
    np.testing.assert_array_equal(advantages, shape_advantages(plain, unsure, 0.5))
    assert told["uncertainty"] == pytest.approx(0.5)
    assert told["uncertainty_shift"] == pytest.approx(0.25 * np.abs(plain).mean())
