"""The GRPO objective, clipped surrogate plus KL penalty, as a pure function of log-probabilities.

The model is not known here: `update.py` computes the log-probabilities of the sampled tokens and calls
`policy_loss` inside its jitted step. N rows are rollouts (of any prompts), T their token positions; `mask`
alone says which positions count, and what stands in the others (NaN included) reaches neither the loss nor
its gradient.

Normalisation is global. A step that is cut into micro-batches computes `loss_denominator` once, over the
whole batch, and passes it to each call: the losses and the gradients of the micro-batches then sum to those
of the whole batch, however it is cut.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fundus_jax.records import ConfigError

# Differences of log-probabilities are clipped to this range before they are exponentiated. exp(89) overflows
# float32, and inf * 0 (a rollout of a zero-variance group) would be NaN; a token beyond e^20 has no usable
# gradient either way. Within it nothing changes.
MAX_LOG_RATIO = 20.0


class LossConfig(Protocol):
    """What the loss reads of a `GrpoConfig`, which itself would bring the optimizer with it."""

    clip_low: float
    clip_high: float
    dual_clip: float
    ratio: str
    kl: str
    kl_coef: float
    kl_in: str
    kl_clamp: float
    aggregate: str
    constant_norm: int
    sampler_correction: float
    sampler_ratio: str


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    config: LossConfig,
    *,
    sampled: jax.Array | None = None,
    denominator: jax.Array | float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics), float32 scalars; the loss is to be minimised.

    logprobs [N,T]: of the sampled tokens under the policy being trained (the only input that gets a
    gradient); old_logprobs [N,T]: the trainer's, under the policy that sampled them; ref_logprobs [N,T]:
    under the reference, None where `kl_coef` is 0. advantages [N], one number for all tokens of a rollout.
    mask [N,T]: True at the tokens that count. sampled [N,T]: old_logprobs as the sampler computed them, read
    where `sampler_correction` is not 0 only. All log-probabilities are at the sampling temperature.

    Per token: -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL, where

    * r = exp(logprobs - old_logprobs), with `ratio` "sequence" the geometric mean of that over the row, the
      same for all its tokens (GSPO, Zheng et al., 2025);
    * where A < 0, the min is at least `dual_clip` A, if that is not 0 (Ye et al., 2020). Above 1 + clip_high,
      which the config demands, it is what TRL calls `delta`: r clipped to it from above before the min;
    * w = min(exp(old_logprobs - sampled), sampler_correction), without gradient (truncated importance
      sampling; Yao et al., 2025), with `sampler_ratio` "sequence" of the sums over the row; 1 where off;
    * KL is `kl_estimate` between -kl_clamp and kl_clamp, if that is not 0, beyond which it has no gradient.
      With `kl_in` "reward" it is measured and no part of the loss (`credit.py` takes it off the reward).

    `config.aggregate` says how tokens are added up:

    * token-mean: sum over all tokens / number of tokens
    * sequence-mean: mean over the tokens of a row, then mean over rows
    * constant: sum over all tokens / (rows x constant_norm) (Dr. GRPO: no preference for short or long
      rollouts)

    Rows without a token add nothing and are not counted as rows. `denominator` replaces what
    `loss_denominator` gives for this mask.

    Metrics, means over tokens unless said otherwise: `kl` (before clamping; absent without ref_logprobs),
    `old_kl` (k3 estimate of how far the policy is from the one that sampled), `clip_low`, `clip_high` and,
    where it is on, `clip_dual` (share of tokens whose gradient the clip removed), `kl_clamped` (the same),
    `ratio_mean`, `ratio_max` (maximum), `correction` (w) and `correction_capped` (share), `tokens` (number).

    Raises ConfigError when `kl_coef` is not 0 and there is no ref_logprobs, or `sampler_correction` and there
    is no sampled; ValueError for shapes that do not fit.
    """
    _check_shapes(logprobs, old_logprobs, ref_logprobs, sampled, advantages, mask)
    _check_given(config, ref_logprobs, sampled)
    mask = mask.astype(bool)
    new, old = _known(logprobs, mask), jax.lax.stop_gradient(_known(old_logprobs, mask))
    log_ratio = _bounded(new - old)
    ratio = jnp.exp(_over(config.ratio, "ratio", log_ratio, mask, mean=True))
    weight = jax.lax.stop_gradient(advantages.astype(jnp.float32))[:, None]
    gain, token_metrics = _surrogate(ratio, weight, config)
    per_token = -gain
    token_metrics |= {"ratio_mean": ratio, "old_kl": jnp.expm1(log_ratio) - log_ratio}
    if config.sampler_correction != 0 and sampled is not None:
        drift = _over(config.sampler_ratio, "sampler_ratio", old - _known(sampled, mask), mask, mean=False)
        drift = jax.lax.stop_gradient(jnp.exp(_bounded(drift)))
        correction = jnp.minimum(drift, config.sampler_correction)
        per_token = per_token * correction
        token_metrics |= {"correction": correction, "correction_capped": drift > config.sampler_correction}
    if ref_logprobs is not None:
        kl = kl_estimate(new, jax.lax.stop_gradient(_known(ref_logprobs, mask)), config.kl)
        token_metrics["kl"] = kl
        if config.kl_clamp != 0:
            token_metrics["kl_clamped"] = jnp.abs(kl) > config.kl_clamp
        if config.kl_in == "loss" and config.kl_coef != 0:
            per_token = per_token + config.kl_coef * clamp_kl(kl, config.kl_clamp)

    loss = _aggregate(jnp.where(mask, per_token, 0), mask, config, denominator)
    tokens = mask.sum(dtype=jnp.float32)
    metrics = {
        name: jnp.where(mask, value, 0).sum() / jnp.maximum(tokens, 1)
        for name, value in token_metrics.items()
    }
    metrics |= {"ratio_max": jnp.where(mask, ratio, 0).max(initial=0), "tokens": tokens}
    return loss, jax.lax.stop_gradient(metrics)


def _surrogate(
    ratio: jax.Array, weight: jax.Array, config: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What is to be maximised, and where its gradient is cut off: of ratios [N,T] or [N,1], weights [N,1]."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    gain = jnp.minimum(ratio * weight, jnp.clip(ratio, low, high) * weight)
    cut = {"clip_low": (ratio < low) & (weight < 0), "clip_high": (ratio > high) & (weight > 0)}
    if config.dual_clip == 0:
        return gain, cut
    bounded = jnp.where(weight < 0, jnp.maximum(gain, config.dual_clip * weight), gain)
    return bounded, cut | {"clip_dual": (ratio > config.dual_clip) & (weight < 0)}


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: str) -> jax.Array:
    """Returns the estimate, per token, of KL(policy || reference) from tokens that the policy sampled.

    `kind` is k1, k2 or k3, after J. Schulman, "Approximating KL divergence" (2020). Raises ConfigError for
    another kind.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference**2 / 2
    if kind == "k3":
        bounded = jnp.clip(difference, -MAX_LOG_RATIO, None)
        return jnp.expm1(-bounded) + bounded
    raise ConfigError(f"kl is {kind!r}; it must be k1, k2 or k3")


def clamp_kl(kl: jax.Array, bound: float) -> jax.Array:
    """Returns estimates of the KL between -bound and bound, as they are for bound 0."""
    return jnp.clip(kl, -bound, bound) if bound else kl


def loss_denominator(mask: jax.Array, config: LossConfig) -> jax.Array:
    """Returns what `policy_loss` divides its sum by for `mask` [N,T]: a float32 scalar, at least 1.

    token-mean: number of tokens; sequence-mean: number of rows with a token; constant: that number x
    `constant_norm`.
    """
    mask = mask.astype(bool)
    if config.aggregate == "token-mean":
        count = mask.sum(dtype=jnp.float32)
    else:
        count = mask.any(axis=1).sum(dtype=jnp.float32)
    if config.aggregate == "constant":
        count = count * config.constant_norm
    return jnp.maximum(count, 1)


def combine_metrics(stacked: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns the metrics of a batch from those of its M micro-batches, stacked to [M] as `lax.scan` does.

    Means are weighted by `tokens`, `ratio_max` is a maximum, `tokens` a sum: the result is what one call on
    all rows would give.
    """
    tokens = stacked["tokens"]
    total = tokens.sum()
    combined = {name: (value * tokens).sum() / jnp.maximum(total, 1) for name, value in stacked.items()}
    return combined | {"ratio_max": stacked["ratio_max"].max(), "tokens": total}


def _known(values: jax.Array, where: jax.Array) -> jax.Array:
    """Returns float32 values, 0 where they do not count: before any arithmetic, so no gradient is NaN."""
    return jnp.where(where, values.astype(jnp.float32), 0)


def _bounded(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _over(level: str, name: str, values: jax.Array, mask: jax.Array, *, mean: bool) -> jax.Array:
    """values [N,T], 0 where mask is not: as they are ("token"), or their sum or mean over the row, [N,1]."""
    if level == "token":
        return values
    if level != "sequence":
        raise ConfigError(f"{name} is {level!r}; it must be token or sequence")
    total = values.sum(axis=1, keepdims=True)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True, dtype=jnp.float32), 1) if mean else total


def _aggregate(per_token: jax.Array, mask: jax.Array, config: LossConfig, denominator: Any) -> jax.Array:
    if config.aggregate not in ("token-mean", "sequence-mean", "constant"):
        raise ConfigError(
            f"aggregate is {config.aggregate!r}; it must be token-mean, sequence-mean or constant"
        )
    rows = per_token.sum(axis=1)
    if config.aggregate == "sequence-mean":
        rows = rows / jnp.maximum(mask.sum(axis=1, dtype=jnp.float32), 1)
    return rows.sum() / (loss_denominator(mask, config) if denominator is None else denominator)


def _check_given(config: LossConfig, ref: jax.Array | None, sampled: jax.Array | None) -> None:
    if config.kl_in not in ("loss", "reward"):
        raise ConfigError(f"kl_in is {config.kl_in!r}; it must be loss or reward")
    if config.kl_coef != 0 and ref is None:
        raise ConfigError(
            f"kl_coef is {config.kl_coef} but there are no ref_logprobs; pass them or set kl_coef to 0"
        )
    if config.sampler_correction != 0 and sampled is None:
        raise ConfigError(
            f"sampler_correction is {config.sampler_correction} but the sampler's log-probs are not given; "
            "pass sampled or set sampler_correction to 0"
        )


def _check_shapes(
    logprobs: jax.Array,
    old: jax.Array,
    ref: jax.Array | None,
    sampled: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
) -> None:
    given = {"old_logprobs": old, "mask": mask, "ref_logprobs": ref, "sampled": sampled}
    shapes = {name: array.shape for name, array in given.items() if array is not None}
    for name, shape in shapes.items():
        if shape != logprobs.shape or len(shape) != 2:  # a [N,1] array would broadcast without a sound
            raise ValueError(f"{name} has shape {shape}, logprobs has {logprobs.shape}; both must be [N,T]")
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages has shape {advantages.shape}; it must be {logprobs.shape[:1]}, one number a row"
        )
