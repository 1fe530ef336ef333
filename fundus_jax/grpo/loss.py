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
    kl: str
    kl_coef: float
    aggregate: str
    constant_norm: int


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    config: LossConfig,
    *,
    denominator: jax.Array | float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics), float32 scalars; the loss is to be minimised.

    logprobs [N,T]: of the sampled tokens under the policy being trained (the only input that gets a
    gradient); old_logprobs [N,T]: under the policy that sampled them; ref_logprobs [N,T]: under the
    reference, None where `kl_coef` is 0. advantages [N], one number for all tokens of a rollout. mask [N,T]:
    True at the tokens that count. All log-probabilities are at the sampling temperature.

    Per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL, with r = exp(logprobs -
    old_logprobs) and, with d = logprobs - ref_logprobs, KL = d (k1), d^2 / 2 (k2) or exp(-d) - 1 + d (k3). k1
    is the unbiased value but, used in a loss, its gradient has expectation zero: it penalises nothing and is
    there for comparison. `config.aggregate` says how tokens are added up:

    * token-mean: sum over all tokens / number of tokens
    * sequence-mean: mean over the tokens of a row, then mean over rows
    * constant: sum over all tokens / (rows x constant_norm) (Dr. GRPO: no preference for short or long
      rollouts)

    Rows without a token add nothing and are not counted as rows. `denominator` replaces what
    `loss_denominator` gives for this mask.

    Metrics, means over tokens unless said otherwise: `kl` (absent without ref_logprobs), `old_kl` (k3
    estimate of how far the policy is from the one that sampled), `clip_low` and `clip_high` (share of tokens
    whose gradient the clip removed), `ratio_mean`, `ratio_max` (maximum), `tokens` (number).

    Raises ConfigError when `kl_coef` is not 0 and there is no ref_logprobs, ValueError for shapes that do not
    fit.
    """
    _check_shapes(logprobs, old_logprobs, ref_logprobs, advantages, mask)
    if config.kl_coef != 0 and ref_logprobs is None:
        raise ConfigError(
            f"kl_coef is {config.kl_coef} but there are no ref_logprobs; pass them or set kl_coef to 0"
        )
    mask = mask.astype(bool)
    new = _known(logprobs, mask)
    log_ratio = jnp.clip(
        new - jax.lax.stop_gradient(_known(old_logprobs, mask)), -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    ratio = jnp.exp(log_ratio)
    weight = jax.lax.stop_gradient(advantages.astype(jnp.float32))[:, None]
    per_token = -jnp.minimum(
        ratio * weight, jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * weight
    )

    token_metrics = {
        "clip_low": (ratio < 1 - config.clip_low) & (weight < 0),
        "clip_high": (ratio > 1 + config.clip_high) & (weight > 0),
        "ratio_mean": ratio,
        "old_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    if ref_logprobs is not None:
        kl = kl_estimate(new, jax.lax.stop_gradient(_known(ref_logprobs, mask)), config.kl)
        token_metrics["kl"] = kl
        if config.kl_coef != 0:
            per_token = per_token + config.kl_coef * kl

    loss = _aggregate(jnp.where(mask, per_token, 0), mask, config, denominator)
    tokens = mask.sum(dtype=jnp.float32)
    metrics = {
        name: jnp.where(mask, value, 0).sum() / jnp.maximum(tokens, 1)
        for name, value in token_metrics.items()
    }
    metrics |= {"ratio_max": jnp.where(mask, ratio, 0).max(initial=0), "tokens": tokens}
    return loss, jax.lax.stop_gradient(metrics)


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


def _aggregate(per_token: jax.Array, mask: jax.Array, config: LossConfig, denominator: Any) -> jax.Array:
    if config.aggregate not in ("token-mean", "sequence-mean", "constant"):
        raise ConfigError(
            f"aggregate is {config.aggregate!r}; it must be token-mean, sequence-mean or constant"
        )
    rows = per_token.sum(axis=1)
    if config.aggregate == "sequence-mean":
        rows = rows / jnp.maximum(mask.sum(axis=1, dtype=jnp.float32), 1)
    return rows.sum() / (loss_denominator(mask, config) if denominator is None else denominator)


def _check_shapes(
    logprobs: jax.Array, old: jax.Array, ref: jax.Array | None, advantages: jax.Array, mask: jax.Array
) -> None:
    shapes = {"old_logprobs": old.shape, "mask": mask.shape} | (
        {} if ref is None else {"ref_logprobs": ref.shape}
    )
    for name, shape in shapes.items():
        if shape != logprobs.shape or len(shape) != 2:  # a [N,1] array would broadcast without a sound
            raise ValueError(f"{name} has shape {shape}, logprobs has {logprobs.shape}; both must be [N,T]")
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages has shape {advantages.shape}; it must be {logprobs.shape[:1]}, one number a row"
        )
