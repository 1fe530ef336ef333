"""The GRPO objective: hand-computed cases, TRL's numbers, and what may never change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundus_jax.grpo.loss import combine_metrics, kl_estimate, loss_denominator, policy_loss
from fundus_jax.records import ConfigError
from tests.grpo.cases import TWO_ROWS, Numbers, loss_and_gradient, make_case, rows_of

AGGREGATES = ("token-mean", "sequence-mean", "constant")


# ---- by hand ----------------------------------------------------------------------------------------------

# min(1.5 x 2, 1.3 x 2) and 1.1 x 2; min(-0.5, -0.8), min(-1.5, -1.3) and -1
SURROGATES = [[-2.6, -2.2], [0.8, 1.5, 1.0]]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("token-mean", (-4.8 + 3.3) / 5),
        ("sequence-mean", (-4.8 / 2 + 3.3 / 3) / 2),
        ("constant", (-4.8 + 3.3) / (2 * 17)),
    ],
)
def test_the_clipped_surrogate_by_hand(aggregate, expected):
    assert np.isclose(sum(map(sum, SURROGATES)), -1.5)
    loss, gradient, metrics = loss_and_gradient(TWO_ROWS, Numbers(kl_coef=0.0, aggregate=aggregate))
    assert loss == pytest.approx(expected, abs=1e-6)
    # Clipped tokens have no gradient, the others have -ratio x advantage x weight.
    weight = {"token-mean": [0.2, 0.2], "sequence-mean": [1 / 4, 1 / 6], "constant": [1 / 34, 1 / 34]}[
        aggregate
    ]
    by_hand = [[0, -2.2 * weight[0], 0], [0, 1.5 * weight[1], 1.0 * weight[1]]]
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)
    assert metrics["clip_high"] == pytest.approx(1 / 5)
    assert metrics["clip_low"] == pytest.approx(1 / 5)
    assert metrics["ratio_mean"] == pytest.approx((1.5 + 1.1 + 0.5 + 1.5 + 1) / 5)
    assert metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["tokens"] == 5


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # d = log of 2, 1, 1/2, 1 and 1/2
        ("k1", -np.log(2) / 5),
        ("k2", 3 * np.log(2) ** 2 / 2 / 5),
        ("k3", ((0.5 - 1 + np.log(2)) + 2 * (2 - 1 - np.log(2))) / 5),
    ],
)
def test_the_kl_penalty_by_hand(kl, expected):
    without, _, _ = loss_and_gradient(TWO_ROWS, Numbers(kl_coef=0.0))
    loss, _, metrics = loss_and_gradient(TWO_ROWS, Numbers(kl=kl, kl_coef=0.5))
    assert metrics["kl"] == pytest.approx(expected, abs=1e-6)
    assert loss - without == pytest.approx(0.5 * expected, abs=1e-6)


@given(st.floats(-5, 5))
@settings(deadline=None)
def test_kl_estimators_have_the_right_derivatives(difference):
    for kind, slope in (("k1", 1.0), ("k2", difference), ("k3", 1 - np.exp(-difference))):
        got = jax.grad(lambda x, kind=kind: kl_estimate(x, jnp.float32(0), kind))(jnp.float32(difference))
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-5)


@given(st.floats(-5, 5))
@settings(deadline=None)
def test_k2_and_k3_are_never_negative(difference):
    for kind in ("k2", "k3"):
        assert kl_estimate(jnp.float32(difference), jnp.float32(0), kind) >= 0


# ---- TRL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("empty_rows", [0, 2])
@pytest.mark.parametrize(
    ("loss_type", "aggregate"),
    [("grpo", "sequence-mean"), ("bnpo", "token-mean"), ("dapo", "token-mean"), ("dr_grpo", "constant")],
)
def test_trl_gives_the_same(loss_type, aggregate, empty_rows, beta):
    from tests.grpo.trl_reference import MAX_COMPLETION_LENGTH, trl_loss

    config = Numbers(kl_coef=beta, aggregate=aggregate, constant_norm=MAX_COMPLETION_LENGTH)
    for seed in range(5):
        case = make_case(seed, rows=16, empty_rows=empty_rows)
        rows, options, total = len(case["mask"]), {}, None
        if loss_type == "dapo":  # TRL's normaliser over a whole generation batch, of which this is a part
            total = int(case["mask"].sum()) + 40
            options = {"denominator": float(total)}
        if empty_rows:  # TRL counts rows without tokens as rows; told so, we do too
            per_row = {"sequence-mean": rows, "constant": rows * MAX_COMPLETION_LENGTH}
            options |= {"denominator": per_row[aggregate]} if aggregate in per_row else {}
        theirs, gradient, trl_metrics = trl_loss(
            case, loss_type, beta=beta, low=0.2, high=0.3, total_tokens=total
        )
        ours, our_gradient, metrics = loss_and_gradient(case, config, **options)
        assert ours == pytest.approx(theirs, abs=1e-6)
        np.testing.assert_allclose(our_gradient, gradient, atol=1e-6, rtol=0)
        assert metrics["clip_low"] == pytest.approx(trl_metrics["clip_ratio/low_mean"], abs=1e-6)
        assert metrics["clip_high"] == pytest.approx(trl_metrics["clip_ratio/high_mean"], abs=1e-6)
        assert 0 < metrics["clip_low"] < 1
        assert 0 < metrics["clip_high"] < 1
        if beta:
            assert metrics["kl"] == pytest.approx(trl_metrics["kl"], abs=1e-6)


# ---- what may not change it -------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (2, 3, 7)])
def test_micro_batches_do_not_change_loss_or_gradient(aggregate, sizes):
    config = Numbers(aggregate=aggregate)
    case = make_case(3, rows=12, empty_rows=2)
    loss, gradient, metrics = loss_and_gradient(case, config)
    whole = loss_denominator(jnp.asarray(case["mask"]), config)
    bounds = np.cumsum((0, *sizes))
    parts = [
        loss_and_gradient(rows_of(case, slice(start, stop)), config, denominator=whole)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, atol=1e-7)
    stacked = {name: jnp.asarray([part[2][name] for part in parts]) for name in metrics}
    for name, value in combine_metrics(stacked).items():
        assert float(value) == pytest.approx(metrics[name], abs=1e-5), name


def test_without_the_global_denominator_micro_batches_would_change_it():
    """The test above can fail: rows of different lengths, each normalised by itself, give another mean."""
    config, case = Numbers(), make_case(3, rows=12)
    loss, _, _ = loss_and_gradient(case, config)
    parts = [loss_and_gradient(rows_of(case, slice(row, row + 1)), config)[0] for row in range(12)]
    assert abs(np.mean(parts) - loss) > 1e-3


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_padding_never_matters(aggregate, kl):
    config = Numbers(aggregate=aggregate, kl=kl)
    case = make_case(1, empty_rows=2)
    loss, gradient, metrics = loss_and_gradient(case, config)
    for filling in np.array([np.nan, np.inf, -np.inf, 1e30], np.float32):
        spoilt = {**case, "advantages": np.where(case["mask"].any(axis=1), case["advantages"], filling)}
        for name in ("logprobs", "old_logprobs", "ref_logprobs"):
            spoilt[name] = np.where(case["mask"], case[name], filling)
        again = loss_and_gradient(spoilt, config)
        assert again[0] == loss
        np.testing.assert_array_equal(again[1], gradient)
        assert again[2] == metrics
    assert np.all(gradient[~case["mask"]] == 0)
    without = loss_and_gradient(rows_of(case, slice(2, None)), config)
    assert without[0] == pytest.approx(loss, abs=1e-6)


def test_nothing_to_learn_from_gives_zero():
    case = make_case(2, rows=3, empty_rows=3)
    for aggregate in AGGREGATES:
        loss, gradient, metrics = loss_and_gradient(case, Numbers(aggregate=aggregate))
        assert loss == 0
        assert np.all(gradient == 0)
        assert set(metrics.values()) == {0.0}


@given(st.integers(0, 1000), st.sampled_from(AGGREGATES), st.sampled_from(["k1", "k2", "k3"]))
@settings(max_examples=15, deadline=None)
def test_the_order_of_rows_does_not_matter(seed, aggregate, kl):
    config, case = Numbers(aggregate=aggregate, kl=kl), make_case(seed)
    order = np.random.default_rng(seed).permutation(6)
    loss, gradient, _ = loss_and_gradient(case, config)
    other, moved, _ = loss_and_gradient(rows_of(case, order), config)
    assert other == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(moved, gradient[order], atol=1e-6)


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    case = make_case(4, drift=0.0)
    _, gradient, metrics = loss_and_gradient(case, Numbers(kl_coef=0.0))
    expected = np.where(case["mask"], -case["advantages"][:, None], 0) / case["mask"].sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    assert metrics["ratio_max"] == 1
    assert metrics["old_kl"] == 0


def test_a_policy_that_ran_away_stays_finite():
    case = make_case(5)
    for name in ("old_logprobs", "ref_logprobs"):
        case[name] = case["logprobs"] + np.float32(200) * np.where(np.arange(9) % 2, 1, -1).astype(np.float32)
    case["advantages"] = np.array([0, 1, -1, 0, 1, -1], np.float32)
    loss, gradient, metrics = loss_and_gradient(case, Numbers())
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))
    assert all(np.isfinite(value) for value in metrics.values())


def test_half_precision_inputs_are_computed_in_float32():
    case = make_case(6)
    exact, _, _ = loss_and_gradient(
        {**case, "logprobs": np.asarray(case["logprobs"], jnp.bfloat16)}, Numbers()
    )
    rounded = np.asarray(np.asarray(case["logprobs"], jnp.bfloat16), np.float32)
    assert exact == pytest.approx(loss_and_gradient({**case, "logprobs": rounded}, Numbers())[0], abs=1e-7)


def test_only_the_policy_gets_a_gradient():
    case = {name: jnp.asarray(value) for name, value in make_case(7).items()}

    def function(old, ref, advantages):
        return policy_loss(case["logprobs"], old, ref, advantages, case["mask"], Numbers())[0]

    arguments = (case["old_logprobs"], case["ref_logprobs"], case["advantages"])
    for gradient in jax.grad(function, argnums=(0, 1, 2))(*arguments):
        assert np.all(np.asarray(gradient) == 0)


# ---- refusals ---------------------------------------------------------------------------------------------


def test_the_reference_may_be_absent_only_without_a_penalty():
    case = {**make_case(8), "ref_logprobs": None}
    arguments = [value if value is None else jnp.asarray(value) for value in case.values()]
    loss, metrics = policy_loss(*arguments, Numbers(kl_coef=0.0))
    assert float(loss) == pytest.approx(loss_and_gradient(make_case(8), Numbers(kl_coef=0.0))[0], abs=1e-6)
    assert "kl" not in metrics
    with pytest.raises(ConfigError, match="kl_coef is 0.1"):
        policy_loss(*arguments, Numbers())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("old_logprobs", (6, 1)),
        ("ref_logprobs", (1, 9)),
        ("mask", (6,)),
        ("advantages", (6, 1)),
        ("advantages", (1,)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(name, shape):
    case = {**make_case(9), name: np.ones(shape, np.float32)}
    with pytest.raises(ValueError, match=name):
        loss_and_gradient(case, Numbers())


def test_unknown_choices_are_refused():
    case = make_case(9)
    with pytest.raises(ConfigError, match="aggregate is 'mean'"):
        loss_and_gradient(case, Numbers(aggregate="mean"))
    with pytest.raises(ConfigError, match="kl is 'k4'"):
        loss_and_gradient(case, Numbers(kl="k4"))
