"""Group-relative advantages: their properties, hand-computed cases, and TRL's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fundus_jax.grpo.advantages import group_advantages, group_stats, varied
from fundus_jax.records import ConfigError

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
# Rewards of this project are sums of a few weighted ratings: thirty-seconds cover them and are exact in
# float32.
REWARDS = st.integers(-64, 96).map(lambda steps: steps / 32)


@st.composite
def groups(draw, all_valid=False, shapes=SHAPES):
    shape = draw(shapes)
    rewards = draw(hnp.arrays(np.float32, shape, elements=REWARDS.map(np.float32)))
    valid = np.ones(shape, bool) if all_valid else draw(hnp.arrays(bool, shape))
    return rewards, valid


scales = st.sampled_from(["std", "none"])


def test_a_group_by_hand():
    rewards = np.array([[1.0, 2.0, 3.0, 6.0]], np.float32)
    everyone = np.ones((1, 4), bool)
    # mean 3, squares 4 + 1 + 0 + 9 = 14, sample variance 14 / 3
    expected = np.array([[-2.0, -1.0, 0.0, 3.0]]) / (np.sqrt(14 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, everyone), expected, rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, everyone, scale="none"), [[-2, -1, 0, 3]])


def test_leave_one_out_by_hand():
    rewards = np.array([[1.0, 2.0, 3.0, 6.0], [1.0, 5.0, np.nan, np.nan], [4.0, np.nan, np.nan, np.nan]])
    others = [[-8 / 3, -4 / 3, 0, 4], [-4, 4, 0, 0], [0, 0, 0, 0]]  # less 11/3, 10/3, 9/3, 6/3; less 5 and 1
    got = group_advantages(rewards, ~np.isnan(rewards), scale="none", baseline="leave-one-out")
    np.testing.assert_allclose(got, others, rtol=1e-6)
    assert got.dtype == np.float32


def test_an_abstaining_rollout_leaves_the_statistics():
    rewards = np.array([[1.0, 3.0, np.nan, 2.0]], np.float32)
    valid = np.array([[True, True, False, True]])
    without = group_advantages(np.array([[1.0, 3.0, 2.0]]), np.ones((1, 3), bool))
    got = group_advantages(rewards, valid)
    np.testing.assert_array_equal(got[0, [0, 1, 3]], without[0])
    assert got[0, 2] == 0
    as_a_zero = group_advantages(np.nan_to_num(rewards), np.ones((1, 4), bool))
    assert as_a_zero[0, 2] < -1
    assert np.all(got[0, [0, 1, 3]] != as_a_zero[0, [0, 1, 3]])


def test_equal_rewards_give_exactly_zero():
    # The mean of equal numbers is often not that number: the quotient would then be far from 0.
    third = np.float32(2.3) / np.float32(3)
    rewards = np.array([[third] * 7, [0.1] * 7, [1e6 + 0.1] * 7], np.float32)
    for scale in ("std", "none"):
        assert np.all(group_advantages(rewards, np.ones((3, 7), bool), scale=scale) == 0)


@given(groups(all_valid=True), scales)
@settings(deadline=None)
def test_they_sum_to_zero(case, scale):
    got = group_advantages(*case, scale=scale)
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-5)


@given(groups())
@settings(deadline=None)
def test_leave_one_out_is_the_mean_of_the_group_stretched(case):
    """Each reward less the mean of the others, as the words say; what is not valid is no other."""
    rewards, valid = case
    got = group_advantages(rewards, valid, scale="none", baseline="leave-one-out")
    for row, good, advantage in zip(rewards, valid, got, strict=True):
        for i in np.flatnonzero(good):
            others = row[good & (np.arange(len(row)) != i)]
            wanted = row[i] - others.mean() if len(others) else 0.0
            assert advantage[i] == pytest.approx(wanted, abs=1e-5)
        assert np.all(advantage[~good] == 0)


@given(groups())
@settings(deadline=None)
def test_groups_that_are_varied_are_those_with_advantages(case):
    for baseline in ("mean", "leave-one-out"):
        np.testing.assert_array_equal(
            varied(*case), (group_advantages(*case, baseline=baseline) != 0).any(axis=1)
        )


@given(groups(), scales, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_does_not_matter(case, scale, random):
    rewards, valid = case
    columns = list(range(rewards.shape[1]))
    random.shuffle(columns)
    got = group_advantages(rewards, valid, scale=scale)
    np.testing.assert_allclose(
        group_advantages(rewards[:, columns], valid[:, columns], scale=scale), got[:, columns], atol=1e-5
    )


@given(groups(), scales, st.integers(-4, 4))
@settings(deadline=None)
def test_a_constant_added_to_all_rewards_changes_nothing(case, scale, constant):
    rewards, valid = case
    np.testing.assert_allclose(
        group_advantages(rewards + np.float32(constant), valid, scale=scale),
        group_advantages(rewards, valid, scale=scale),
        atol=1e-4,
    )


@given(groups(), st.sampled_from([2.0, 4.0, 16.0]))
@settings(deadline=None)
def test_the_scale_of_rewards_matters_only_without_std(case, factor):
    rewards, valid = case
    scaled = group_advantages(rewards * np.float32(factor), valid)
    # A deviation of 1/32 is 300 times the epsilon, hence the tolerance.
    np.testing.assert_allclose(scaled, group_advantages(rewards, valid), rtol=1e-2, atol=1e-5)
    unscaled = group_advantages(rewards * np.float32(factor), valid, scale="none")
    np.testing.assert_allclose(unscaled, factor * group_advantages(rewards, valid, scale="none"), rtol=1e-5)


@given(groups(), scales)
@settings(deadline=None)
def test_the_better_rollout_has_the_higher_advantage(case, scale):
    rewards, valid = case
    got = group_advantages(rewards, valid, scale=scale)
    for row, good, advantage in zip(rewards, valid, got, strict=True):
        order = np.argsort(row[good], kind="stable")
        assert np.all(np.diff(advantage[good][order]) >= 0)
        if good.sum() >= 2 and np.ptp(row[good]) > 0:
            assert advantage[good].max() > 0 > advantage[good].min()


@given(groups(), scales)
@settings(deadline=None)
def test_what_is_not_valid_is_never_read(case, scale):
    rewards, valid = case
    got = group_advantages(np.where(valid, rewards, np.float32(np.nan)), valid, scale=scale)
    other = group_advantages(np.where(valid, rewards, np.float32(77)), valid, scale=scale)
    np.testing.assert_array_equal(got, other)
    assert np.all(got[~valid] == 0)
    assert np.all(got[valid.sum(axis=1) < 2] == 0)


@given(groups(shapes=st.sampled_from([(1, 4), (3, 2)])), scales)  # each new shape is a compilation
@settings(max_examples=25, deadline=None)
def test_jax_under_jit_gives_the_numbers_of_numpy(case, scale):
    rewards, valid = case
    got = jax.jit(group_advantages, static_argnames="scale")(
        jnp.asarray(rewards), jnp.asarray(valid), scale=scale
    )
    here = group_advantages(rewards, valid, scale=scale)
    assert isinstance(here, np.ndarray)
    assert here.dtype == got.dtype == np.float32
    np.testing.assert_allclose(got, here, atol=1e-5)
    stats = jax.jit(group_stats)(jnp.asarray(rewards), jnp.asarray(valid))
    for name, value in group_stats(rewards, valid).items():
        np.testing.assert_allclose(stats[name], value, atol=1e-5, err_msg=name)


def test_stats_by_hand():
    rewards = np.array([[1, 1, 1], [0, 1, 2], [5, 0, 0], [2, 2, 9]], np.float32)
    valid = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
    stats = group_stats(rewards, valid)
    assert stats["zero_variance"] == 0.5  # the first and the last
    assert stats["too_few"] == 0.25
    assert stats["abstain"] == 0.25
    assert stats["reward"] == pytest.approx(15 / 9)
    assert stats["reward_std"] == pytest.approx(1 / 3)  # 0, 1 and 0


@pytest.mark.parametrize("scale", ["std", "none"])
def test_trl_gives_the_same(scale):
    from tests.grpo.trl_reference import trl_advantages

    random = np.random.default_rng(5)
    rewards = random.integers(0, 13, (64, 4)).astype(np.float32) / 4
    rewards[:8] = rewards[:8, :1]  # zero variance
    for valid in (np.ones((64, 4), bool), random.random((64, 4)) < 0.8):
        theirs, metrics = trl_advantages(rewards, valid, scale)
        enough = valid.sum(axis=1) >= 2  # with one valid rollout TRL divides 0 by NaN and then also says 0
        ours = group_advantages(rewards, valid, scale=scale)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
        assert np.abs(theirs).max() > 1
        if valid.all():
            assert group_stats(rewards, valid)["zero_variance"] == pytest.approx(
                metrics["frac_reward_zero_std"]
            )
        assert enough.any()


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_trl_leaves_one_out_alike(beta):
    from fundus_jax.grpo.config import GrpoConfig
    from fundus_jax.grpo.credit import credit
    from tests.grpo.trl_reference import trl_rloo

    random = np.random.default_rng(6)
    rewards = random.integers(0, 13, (16, 4)).astype(np.float32) / 4
    policy = -random.gamma(1.0, 1.0, (64, 9)).astype(np.float32)
    reference = policy + random.normal(size=policy.shape).astype(np.float32)
    mask = np.arange(9) < random.integers(1, 10, 64)[:, None]
    mask[0] = True
    config = GrpoConfig(baseline="leave-one-out", scale="none", kl_coef=beta)
    if beta:
        config.kl, config.kl_in = "k1", "reward"
    config.validate()
    shape = (16, 4, 9)
    for valid in (np.ones((16, 4), bool), random.random((16, 4)) < 0.8):
        theirs = trl_rloo(rewards, valid, policy, reference, mask, beta)
        arrays = (array.reshape(shape) for array in (policy, mask, reference))
        ours, _ = credit(np.where(valid, rewards, np.nan), valid, *arrays, config)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
        assert np.abs(theirs).max() > 1


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match="baseline is 'median'; it must be one of mean, leave-one-out"):
        group_advantages(np.zeros((1, 2)), np.ones((1, 2), bool), baseline="median")
    with pytest.raises(ConfigError, match="scale is 'batch'"):
        group_advantages(np.zeros((1, 2)), np.ones((1, 2), bool), scale="batch")
    with pytest.raises(ValueError, match=r"\(2,\).*\[B,G\]"):
        group_advantages(np.zeros(2), np.ones(2, bool))
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 1\)"):
        group_stats(np.zeros((1, 2)), np.ones((1, 1), bool))
