"""From the scores of a step to the advantages of its rollouts: penalties, comparison, uncertainty.

What the config leaves off costs nothing and changes nothing. Pure functions of numpy arrays, on the host:
every process computes the same from the same. Neighbours: `rewards` (the scores), `advantages` (the
comparison), `uncertainty`, `loss`.
"""

import jax.numpy as jnp
import numpy as np

from fundus_jax.grpo.advantages import group_advantages, group_stats
from fundus_jax.grpo.config import GrpoConfig
from fundus_jax.grpo.loss import clamp_kl, kl_estimate
from fundus_jax.grpo.uncertainty import shape_advantages, uncertainty


def credit(
    rewards: np.ndarray,
    valid: np.ndarray,
    logprobs: np.ndarray,
    mask: np.ndarray,
    ref: np.ndarray | None,
    config: GrpoConfig,
) -> tuple[np.ndarray, dict[str, float]]:
    """Returns (advantages [B,G], metrics) of rewards [B,G], of which those in valid [B,G] count.

    logprobs [B,G,N]: the sampler's, at the tokens of mask [B,G,N]; ref [B,G,N]: the reference's, needed with
    `kl_in` "reward" only.

    Metrics: those of `group_stats`, on the rewards less their penalties; `reward/overlong` and `reward/kl`,
    the mean penalties (0 or negative; the KL's may be positive where its estimate is not); `uncertainty`, its
    mean, and `uncertainty_shift`, the mean change of an advantage; each where it is on.
    """
    told = {}
    if config.overlong_cache:
        penalty = overlong(mask.sum(axis=2), config.max_new_tokens, config.overlong_cache)
        penalty = config.overlong_weight * penalty
        rewards, told["reward/overlong"] = rewards + penalty, penalty.mean()
    if config.kl_in == "reward" and ref is not None:
        penalty = -config.kl_coef * summed_kl(logprobs, ref, mask, config)
        rewards, told["reward/kl"] = rewards + penalty, penalty.mean()
    told |= group_stats(rewards, valid)
    advantages = group_advantages(rewards, valid, scale=config.scale, baseline=config.baseline)
    advantages = np.asarray(advantages, np.float32)
    if config.uncertainty:
        unsure = uncertainty(logprobs, mask)
        shaped = shape_advantages(advantages, unsure, config.uncertainty)
        told |= {"uncertainty": unsure.mean(), "uncertainty_shift": (shaped - advantages).mean()}
        advantages = shaped
    return advantages, {name: float(value) for name, value in told.items()}


def overlong(lengths: np.ndarray, limit: int, cache: int) -> np.ndarray:
    """Returns DAPO's soft punishment (Yu et al., 2025, equation 13) of rollouts of `lengths` tokens, float32:
    0 up to limit - cache tokens, from there falling linearly to -1 at `limit`."""
    return -np.clip((lengths - (limit - cache)) / cache, 0, 1).astype(np.float32)


def summed_kl(logprobs: np.ndarray, ref: np.ndarray, mask: np.ndarray, config: GrpoConfig) -> np.ndarray:
    """Returns the estimate of KL(policy || reference) of each rollout, [B,G]: the sum over its tokens, each
    clamped, of log-probs [B,G,N] of the policy that sampled and of the reference."""
    policy, reference = (jnp.where(mask, values, 0) for values in (logprobs, ref))
    return np.asarray(clamp_kl(kl_estimate(policy, reference, config.kl), config.kl_clamp).sum(axis=2))
