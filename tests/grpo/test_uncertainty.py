"""The reconstruction of UADT: what must hold of any shaping by uncertainty, and numbers by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fundus_jax.grpo.uncertainty import shape_advantages, uncertainty

B, G, N = 3, 4, 5
ADVANTAGES = hnp.arrays(np.float32, (B, G), elements=st.floats(-8, 8, width=32, allow_subnormal=False))
UNSURE = hnp.arrays(np.float32, (B,), elements=st.floats(0, 1, width=32))
STRENGTHS = st.floats(0, 1)
LOGPROBS = hnp.arrays(np.float32, (B, G, N), elements=st.floats(-30, 0, width=32))
MASKS = hnp.arrays(bool, (B, G, N))


def test_the_uncertainty_by_hand():
    # Perplexities 2 and 8 of two rollouts: entropies log 2 and log 8, their mean log 4, and 1 - 1/4.
    logprobs = np.log(np.array([[[0.5, 0.5, 0.5], [0.125, 1e-9, 1e-9]]]))
    mask = np.array([[[True, True, True], [True, False, False]]])
    assert uncertainty(logprobs, mask) == pytest.approx([0.75])


def test_the_shaping_by_hand():
    got = shape_advantages(np.array([[2.0, -2.0], [1.0, -1.0]]), np.array([0.5, 0.0]), 0.4)
    np.testing.assert_allclose(got, [[2.4, -1.6], [1.0, -1.0]])  # 0.4 x 0.5 x 2 = 0.4 more, and nothing


def test_it_is_the_entropy_of_what_was_sampled():
    """Enough draws from one distribution, and the surprise is its entropy."""
    random = np.random.default_rng(0)
    p = np.array([0.6, 0.25, 0.1, 0.05])
    drawn = random.choice(4, p=p, size=(1, 8, 4000))
    entropy = -(p * np.log(p)).sum()
    got = uncertainty(np.log(p)[drawn], np.ones(drawn.shape, bool))
    assert got == pytest.approx([1 - np.exp(-entropy)], abs=5e-3)


@given(LOGPROBS, MASKS)
@settings(deadline=None)
def test_uncertainty_lies_between_0_and_1_and_padding_is_not_read(logprobs, mask):
    got = uncertainty(logprobs, mask)
    assert got.shape == (B,)
    assert got.dtype == np.float32
    assert np.all((got >= 0) & (got <= 1))
    np.testing.assert_array_equal(uncertainty(np.where(mask, logprobs, np.nan), mask), got)


@given(LOGPROBS, MASKS, st.floats(1, 4))
@settings(deadline=None)
def test_less_likely_tokens_are_more_uncertain(logprobs, mask, factor):
    assert np.all(uncertainty(np.float32(factor) * logprobs, mask) >= uncertainty(logprobs, mask))


@given(ADVANTAGES, UNSURE, STRENGTHS)
@settings(deadline=None)
def test_signs_are_kept_and_sizes_bounded(advantages, unsure, strength):
    got = shape_advantages(advantages, unsure, strength)
    assert np.all(got * advantages >= 0)
    bound = np.abs(advantages) * np.float32(1 + strength)
    assert np.all(np.abs(got) <= bound * (1 + 1e-6))
    assert np.all(got[advantages == 0] == 0), "a group without variance stays without advantage"
    if strength < 0.999:
        assert np.all((got != 0) == (advantages != 0))


@given(ADVANTAGES, UNSURE, STRENGTHS)
@settings(deadline=None)
def test_nothing_changes_where_there_is_no_doubt_or_no_strength(advantages, unsure, strength):
    np.testing.assert_array_equal(shape_advantages(advantages, np.zeros(B, np.float32), strength), advantages)
    np.testing.assert_array_equal(shape_advantages(advantages, unsure, 0.0), advantages)


@given(ADVANTAGES, UNSURE, UNSURE, STRENGTHS)
@settings(deadline=None)
def test_more_doubt_never_lowers_an_advantage(advantages, one, other, strength):
    low, high = np.minimum(one, other), np.maximum(one, other)
    before, after = (shape_advantages(advantages, unsure, strength) for unsure in (low, high))
    assert np.all(after >= before)


@given(ADVANTAGES, UNSURE, STRENGTHS)
@settings(deadline=None)
def test_the_order_within_a_group_stays(advantages, unsure, strength):
    got = shape_advantages(advantages, unsure, strength)
    for before, after in zip(advantages, got, strict=True):
        assert np.all(np.diff(after[np.argsort(before, kind="stable")]) >= -1e-5)
