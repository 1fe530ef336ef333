"""Group-relative advantages: how much better a rollout did than the other rollouts of its own prompt.

Pure functions of arrays that work on numpy arrays (the loop, on the host) and inside `jax.jit` alike: what
comes in as numpy goes out as numpy. `rewards.py` makes the two inputs; `loss.py` takes the result. The
definition is that of GRPO (Shao et al., 2024) as TRL computes it, which the tests call to compare: sample
standard deviation (n - 1), `EPSILON` added to it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fundus_jax.records import ConfigError

Array = jax.Array | np.ndarray

EPSILON = 1e-4  # added to the standard deviation; the value is TRL's
SCALES = ("std", "none")
BASELINES = ("mean", "leave-one-out")


def group_advantages(rewards: Array, valid: Array, *, scale: str = "std", baseline: str = "mean") -> Array:
    """Returns the advantages [B,G], float32, of rewards [B,G]; one row is the group of one prompt.

    Only the rollouts marked in `valid` [B,G] bool form the mean and the deviation of their group; the others
    (the judge abstained) get 0, and their reward is never read, so it may be NaN. A group with fewer than two
    valid rollouts, or whose valid rewards are all equal, gets exactly 0: the difference of equal numbers from
    their mean need not be 0 in floating point, and dividing that rounding error by `EPSILON` would turn it
    into a gradient.

    `baseline="mean"` compares a rollout with all n valid ones of its group, `baseline="leave-one-out"` (RLOO,
    Ahmadian et al., 2024) with the n - 1 others, which is the same times n / (n - 1): a baseline that does
    not depend on the rollout itself leaves the policy gradient unbiased. `scale="std"` then divides by the
    deviation of the group, `scale="none"` (Dr. GRPO, RLOO) does not.

    Raises ConfigError for another scale or baseline, ValueError for shapes that are not two equal [B,G].
    """
    for name, value, known in (("scale", scale, SCALES), ("baseline", baseline, BASELINES)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    rewards, valid, xp = _checked(rewards, valid)
    count, varied = _shape_of_groups(rewards, valid, xp)
    mean = rewards.sum(axis=1, keepdims=True) / xp.maximum(count, 1)
    centred = xp.where(valid, rewards - mean, 0)
    if scale == "std":
        variance = (centred**2).sum(axis=1, keepdims=True) / xp.maximum(count - 1, 1)
        centred = centred / (xp.sqrt(variance) + xp.float32(EPSILON))
    if baseline == "leave-one-out":
        centred = centred * (count / xp.maximum(count - 1, 1))
    return xp.where(varied, centred, xp.float32(0))


def varied(rewards: Array, valid: Array) -> Any:
    """Returns which groups of rewards and valid [B,G] have valid rewards that differ, [B] bool: the others
    have no advantage."""
    return _shape_of_groups(*_checked(rewards, valid))[1][:, 0]


def group_stats(rewards: Array, valid: Array) -> dict[str, Any]:
    """Returns, as scalars, what share of the groups and rollouts of rewards and valid [B,G] teaches nothing.

    `zero_variance`: groups of at least two valid rollouts that all have the same reward; `too_few`: groups
    with fewer than two valid rollouts; `abstain`: rollouts that are not valid. `reward` and `reward_std` are
    the mean over the valid rollouts and the mean, over the groups with at least two, of the standard
    deviation within the group (both 0 where there is none to average).
    """
    rewards, valid, xp = _checked(rewards, valid)
    count, varied = _shape_of_groups(rewards, valid, xp)
    enough = count >= 2
    mean = rewards.sum(axis=1, keepdims=True) / xp.maximum(count, 1)
    squares = xp.where(valid, rewards - mean, 0) ** 2
    spread = xp.sqrt(squares.sum(axis=1, keepdims=True) / xp.maximum(count - 1, 1))
    return {
        "zero_variance": (enough & ~varied).mean(),
        "too_few": (~enough).mean(),
        "abstain": (~valid).mean(),
        "reward": rewards.sum() / xp.maximum(valid.sum(), 1),
        "reward_std": xp.where(varied, spread, 0).sum() / xp.maximum(enough.sum(), 1),
    }


def _checked(rewards: Array, valid: Array) -> tuple[Any, Any, Any]:
    """Returns rewards (float32, 0 where they do not count), valid (bool) and the array module of both."""
    if np.ndim(rewards) != 2 or np.shape(rewards) != np.shape(valid):
        raise ValueError(
            f"rewards has shape {np.shape(rewards)} and valid {np.shape(valid)}; "
            "both must be [B,G], one row a prompt"
        )
    xp: Any = jnp if isinstance(rewards, jax.Array) or isinstance(valid, jax.Array) else np
    valid = xp.asarray(valid, dtype=bool)
    return xp.where(valid, xp.asarray(rewards, dtype=xp.float32), xp.float32(0)), valid, xp


def _shape_of_groups(rewards: Any, valid: Any, xp: Any) -> tuple[Any, Any]:
    """Returns, per group [B,1], the number of valid rollouts (float32) and whether their rewards differ."""
    count = valid.sum(axis=1, keepdims=True).astype(xp.float32)
    low = xp.where(valid, rewards, xp.inf).min(axis=1, keepdims=True)
    high = xp.where(valid, rewards, -xp.inf).max(axis=1, keepdims=True)
    return count, high > low  # an empty group has low = inf, a single rollout low = high
