"""The objective beyond the clipped surrogate: sequence ratio, dual clip, sampler correction, penalties.

Number by number against TRL on the same tensors, and by hand where TRL has nothing like it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax.grpo.loss import combine_metrics, loss_denominator, policy_loss
from fundus_jax.records import ConfigError
from tests.grpo.cases import TWO_ROWS, Numbers, loss_and_gradient, make_case, rows_of

LOSS_TYPES = [
    ("grpo", "sequence-mean"),
    ("bnpo", "token-mean"),
    ("dapo", "token-mean"),
    ("dr_grpo", "constant"),
]
OFF = Numbers(kl_coef=0.0, clip_high=0.2)


def full(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case with one row that is as long as the array."""
    case["mask"][0] = True
    return case


def sampler_of(case: dict[str, np.ndarray], drift: float = 0.5) -> np.ndarray:
    """What a sampler with other kernels would have said: far enough off for a cap to act."""
    noise = np.random.default_rng(11).normal(size=case["mask"].shape)
    return (case["old_logprobs"] + drift * noise).astype(np.float32)


@pytest.mark.parametrize(("loss_type", "aggregate"), LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_trl_gives_the_same(
    loss_type: str, aggregate: str, level: str, delta: float | None, beta: float
) -> None:
    from tests.grpo.trl_reference import trl_loss

    config = Numbers(
        clip_high=0.28, dual_clip=delta or 0.0, ratio=level, kl_coef=beta, aggregate=aggregate
    )  # constant_norm is TRL's max_completion_length
    clipped = 0.0
    for seed in range(4):
        # Means over a row move less than its tokens: further, for the same clips to act.
        case = make_case(seed, rows=16, drift=1.5 if level == "sequence" else 0.6)
        theirs, gradient, metrics = trl_loss(
            case, loss_type, beta=beta, low=0.2, high=0.28, level=level, delta=delta
        )
        ours, our_gradient, our_metrics = loss_and_gradient(case, config)
        assert ours == pytest.approx(theirs, abs=1e-6)
        np.testing.assert_allclose(our_gradient, gradient, atol=1e-6, rtol=0)
        if level == "token":
            assert our_metrics["clip_high"] == pytest.approx(metrics["clip_ratio/high_mean"], abs=1e-6)
        clipped += our_metrics.get("clip_dual", 0.0)
    assert (clipped > 0) == (delta is not None)


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "aggregate"), LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_trl_corrects_for_the_sampler_alike(mode: str, loss_type: str, aggregate: str, beta: float) -> None:
    from tests.grpo.trl_reference import trl_correction, trl_loss

    cap = 1.3
    config = Numbers(kl_coef=beta, aggregate=aggregate, sampler_correction=cap, sampler_ratio=mode)
    for seed in range(3):
        case = full(make_case(seed, rows=16))
        sampled = sampler_of(case)
        correction = trl_correction(case, sampled, f"{mode}_truncate", cap)
        assert correction.shape == (16, 9 if mode == "token" else 1)
        theirs, gradient, _ = trl_loss(case, loss_type, beta=beta, low=0.2, high=0.3, correction=correction)
        ours, our_gradient, metrics = loss_and_gradient({**case, "sampled": sampled}, config)
        assert ours == pytest.approx(theirs, abs=1e-6)
        np.testing.assert_allclose(our_gradient, gradient, atol=1e-6, rtol=0)
        weights = np.broadcast_to(correction.numpy(), case["mask"].shape)[case["mask"]]
        assert metrics["correction"] == pytest.approx(weights.mean(), abs=1e-6)
        assert metrics["correction_capped"] == pytest.approx((weights == np.float32(cap)).mean(), abs=1e-6)
        assert 0 < metrics["correction_capped"] < 1


# ---- by hand ----------------------------------------------------------------------------------------------


def test_the_sequence_ratio_by_hand() -> None:
    # Row 0: ratios 1.5 and 1.1, so sqrt(1.65) = 1.28 < 1.3; row 1: 0.5, 1.5 and 1, so 0.75^(1/3) = 0.909.
    up, down = np.sqrt(1.65), 0.75 ** (1 / 3)
    config = Numbers(kl_coef=0.0, ratio="sequence", aggregate="sequence-mean")
    loss, gradient, metrics = loss_and_gradient(TWO_ROWS, config)
    assert loss == pytest.approx((-2 * up + down) / 2, abs=1e-6)
    # d exp(mean) / d one token = ratio / length; the mean over its tokens leaves that.
    by_hand = [[-2 * up / 2 / 2, -2 * up / 2 / 2, 0], [down / 3 / 2] * 3]
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)
    assert metrics["ratio_max"] == pytest.approx(up, abs=1e-6)
    clipped, gradient, metrics = loss_and_gradient(TWO_ROWS, replace(config, clip_high=0.25))
    assert clipped == pytest.approx((-2 * 1.25 + down) / 2, abs=1e-6)
    assert np.all(gradient[0] == 0)
    assert metrics["clip_high"] == pytest.approx(2 / 5), "the tokens of row 0"


def test_the_dual_clip_by_hand() -> None:
    # Only the second token of row 1 has a negative advantage and a ratio (1.5) above 1.4.
    without, plain, _ = loss_and_gradient(TWO_ROWS, OFF)
    loss, gradient, metrics = loss_and_gradient(TWO_ROWS, replace(OFF, dual_clip=1.4))
    assert loss - without == pytest.approx((1.4 - 1.5) / 5, abs=1e-6)
    assert plain[1, 1] == pytest.approx(1.5 / 5)
    assert gradient[1, 1] == 0
    cut = np.array([[False] * 3, [False, True, False]])
    np.testing.assert_array_equal(gradient, np.where(cut, 0, plain))
    assert metrics["clip_dual"] == pytest.approx(1 / 5)
    unmoved, _, metrics = loss_and_gradient(TWO_ROWS, replace(OFF, dual_clip=1.6))
    assert (unmoved, metrics["clip_dual"]) == (without, 0)


def test_a_dual_clip_bounds_what_one_token_can_cost() -> None:
    case = make_case(3)
    case["old_logprobs"] = case["logprobs"] - np.float32(8)  # ratios of e^8
    case["advantages"] = -np.ones(6, np.float32)
    assert loss_and_gradient(case, OFF)[0] == pytest.approx(np.exp(8), rel=1e-4)
    loss, gradient, _ = loss_and_gradient(case, replace(OFF, dual_clip=3.0))
    assert loss == pytest.approx(3.0)
    assert np.all(gradient == 0)


def test_the_sampler_correction_by_hand() -> None:
    # The trainer finds the tokens 2, 1 / 2, -; 1, 4 and 1 times as likely as the sampler did.
    factors = np.array([[2, 0.5, 7], [1, 4, 1]], np.float32)
    case = {**TWO_ROWS, "sampled": TWO_ROWS["old_logprobs"] - np.log(factors)}
    weights = np.minimum(factors, 3)
    # The surrogates of test_loss.py, clipped at 1.2: 1.2 x 2, 1.1 x 2 and -0.8, -1.5, -1.
    surrogates = np.array([[-2.4, -2.2, 0], [0.8, 1.5, 1.0]])
    loss, gradient, metrics = loss_and_gradient(case, replace(OFF, sampler_correction=3.0))
    assert loss == pytest.approx((weights * surrogates).sum() / 5, abs=1e-6)
    _, plain, _ = loss_and_gradient(TWO_ROWS, OFF)
    np.testing.assert_allclose(gradient, plain * weights, atol=1e-6)
    assert metrics["correction"] == pytest.approx((2 + 0.5 + 1 + 3 + 1) / 5)
    assert metrics["correction_capped"] == pytest.approx(1 / 5)
    config = replace(OFF, sampler_correction=3.0, sampler_ratio="sequence")
    loss, _, _ = loss_and_gradient(case, config)  # 2 / 2 and 1 x 4 x 1, at most 3
    assert loss == pytest.approx((-4.6 + 3 * 3.3) / 5, abs=1e-6)


def test_a_sampler_that_agrees_needs_no_correction() -> None:
    case = {**make_case(2), "sampled": make_case(2)["old_logprobs"]}
    for mode in ("token", "sequence"):
        config = Numbers(sampler_correction=2.0, sampler_ratio=mode)
        corrected, plain = loss_and_gradient(case, config), loss_and_gradient(make_case(2), Numbers())
        assert corrected[0] == plain[0]
        np.testing.assert_array_equal(corrected[1], plain[1])
        assert corrected[2]["correction"] == 1


@pytest.mark.parametrize(("kl", "values"), [("k1", (0.5, -0.5)), ("k2", (0.24, 0.24)), ("k3", (0.19, 0.3))])
def test_the_kl_clamp_by_hand(kl: str, values: tuple[float, float]) -> None:
    # d = log of 2, 1, 1/2, 1 and 1/2: k1 is +-0.69, k2 0.24, k3 0.19 and 0.31.
    plain, base, _ = loss_and_gradient(TWO_ROWS, OFF)
    bound = max(values)
    config = replace(OFF, kl=kl, kl_coef=1.0, kl_clamp=bound if kl != "k2" else 0.3)
    loss, gradient, metrics = loss_and_gradient(TWO_ROWS, config)
    assert loss - plain == pytest.approx((values[0] + 2 * values[1]) / 5, abs=2e-3)
    clamped = {"k1": 3, "k2": 0, "k3": 2}[kl]
    assert metrics["kl_clamped"] == pytest.approx(clamped / 5)
    moved = (np.abs(gradient - base) > 1e-6).sum()
    assert moved == {"k1": 2, "k2": 3, "k3": 1}[kl], "a clamped token is not pulled (k1 pulls all alike)"


def test_kl_in_the_reward_is_no_part_of_the_loss() -> None:
    case = make_case(4)
    plain, gradient, _ = loss_and_gradient(case, replace(OFF, kl_coef=0.0))
    loss, same, metrics = loss_and_gradient(case, replace(OFF, kl_coef=0.3, kl_in="reward"))
    assert loss == plain
    np.testing.assert_array_equal(same, gradient)
    assert metrics["kl"] > 0, "but it is measured"


# ---- what may not change it -------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "gspo": {"ratio": "sequence"},
    "dual clip": {"dual_clip": 1.5},
    "correction": {"sampler_correction": 1.3},
    "corrected rows": {"sampler_correction": 1.3, "sampler_ratio": "sequence"},
    "clamp": {"kl_clamp": 0.05},
    "reward": {"kl_in": "reward"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean", "constant"])
def test_micro_batches_and_padding_change_nothing(form: str, aggregate: str) -> None:
    config = Numbers(aggregate=aggregate, **FORMS[form])
    case = make_case(3, rows=12, empty_rows=2, drift=0.8)
    case["sampled"] = sampler_of(case)
    loss, gradient, metrics = loss_and_gradient(case, config)
    whole = loss_denominator(jnp.asarray(case["mask"]), config)
    parts = [
        loss_and_gradient(rows_of(case, slice(start, start + 3)), config, denominator=whole)
        for start in range(0, 12, 3)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, atol=1e-7)
    stacked = {name: jnp.asarray([part[2][name] for part in parts]) for name in metrics}
    for name, value in combine_metrics(stacked).items():
        assert float(value) == pytest.approx(metrics[name], abs=1e-5), name
    for filling in np.array([np.nan, -np.inf], np.float32):
        spoilt = {**case, "advantages": np.where(case["mask"].any(axis=1), case["advantages"], filling)}
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "sampled"):
            spoilt[name] = np.where(case["mask"], case[name], filling)
        again = loss_and_gradient(spoilt, config)
        assert (again[0], again[2]) == (loss, metrics)
        np.testing.assert_array_equal(again[1], gradient)


@pytest.mark.parametrize("form", FORMS)
def test_a_policy_that_ran_away_stays_finite(form: str) -> None:
    case = make_case(5)
    signs = np.where(np.arange(9) % 2, 1, -1).astype(np.float32)
    for name in ("old_logprobs", "ref_logprobs"):
        case[name] = case["logprobs"] + np.float32(200) * signs
    case["sampled"] = case["old_logprobs"] + np.float32(200) * signs
    loss, gradient, metrics = loss_and_gradient(case, Numbers(**FORMS[form]))
    assert np.isfinite([loss, *metrics.values()]).all()
    assert np.isfinite(gradient).all()


def test_what_is_sampled_gets_no_gradient() -> None:
    case = {name: jnp.asarray(value) for name, value in full(make_case(7)).items()}
    config = Numbers(sampler_correction=1.3)

    def function(sampled: jax.Array, old: jax.Array) -> jax.Array:
        return policy_loss(**{**case, "old_logprobs": old}, config=config, sampled=sampled)[0]

    for gradient in jax.grad(function, argnums=(0, 1))(case["old_logprobs"] - 0.1, case["old_logprobs"]):
        assert np.all(np.asarray(gradient) == 0)


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "row"}, "ratio is 'row'; it must be token or sequence"),
        ({"kl_in": "both"}, "kl_in is 'both'; it must be loss or reward"),
        ({"sampler_correction": 2.0}, "sampler_correction is 2.0 but the sampler's log-probs are not given"),
    ],
)
def test_what_cannot_be_computed_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loss_and_gradient(make_case(9), Numbers(**changes))


def test_unknown_levels_of_the_correction_are_named() -> None:
    case = {**make_case(9), "sampled": make_case(9)["old_logprobs"]}
    with pytest.raises(ConfigError, match="sampler_ratio is 'row'"):
        loss_and_gradient(case, Numbers(sampler_correction=2.0, sampler_ratio="row"))
    with pytest.raises(ValueError, match="sampled has shape"):
        loss_and_gradient({**case, "sampled": np.ones((6, 1), np.float32)}, Numbers())
