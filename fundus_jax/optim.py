"""Builds the optimizer of every stage: clipping, AdamW or Muon, a schedule, a guard against NaN gradients.

AdamW is what the real model is trained with. Muon is for the small policy of the demo, whose vision tower
learns nothing from Adam in the time there is. Both are optax transformations without host code, so a step
with them can be jitted, sharded and donated. The loops own the parameters and decide what to do when
`notfinite_count` grows; `checkpoints.py` stores the state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fundus_jax.muon import decays, muon
from fundus_jax.records import ConfigError

Schedule = Callable[[Any], jax.Array]


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """What a stage says about its optimizer. Mutable, for command lines to override; `validate` checks.

    Attributes:
        name: "adamw", or "muon" (matrices by Muon, the rest by Adam).
        lr: the peak learning rate.
        warmup: updates in which the rate rises linearly to `lr`; below 1, this share of all, one at least.
        decay: after that, "cosine" down to `final_fraction * lr` at the last step, or "constant".
        final_fraction: see `decay`.
        b1: Adam's decay of the mean gradient.
        b2: Adam's decay of its square; 0.98 is what was measured for the few steps of the "muon" recipe.
        eps: Adam's, added to the root.
        weight_decay: decoupled, times the learning rate; not on biases, norms and vectors.
        clip_norm: largest global norm of the gradient.
        adam_lr_ratio: with "muon", Adam's learning rate is `lr` times this.
        skip_nonfinite: after so many steps in a row without a finite gradient the loop gives up.
    """

    name: str = "adamw"
    lr: float = 1e-5
    warmup: float = 0
    decay: str = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    adam_lr_ratio: float = 0.3
    skip_nonfinite: int = 3

    def validate(self) -> None:
        """Raises ConfigError for the first field that is out of bounds."""
        inf = float("inf")
        bounds: dict[str, tuple[bool, str]] = {
            "name": (self.name in ("adamw", "muon"), '"adamw" or "muon"'),
            "lr": (0 < self.lr < inf, "a number above 0"),
            "warmup": (
                0 <= self.warmup < 1 or float(self.warmup).is_integer() and self.warmup > 0,
                "a number of updates, or a share of them below 1",
            ),
            "decay": (self.decay in ("cosine", "constant"), '"cosine" or "constant"'),
            "final_fraction": (0 <= self.final_fraction <= 1, "between 0 and 1"),
            "b1": (0 <= self.b1 < 1, "at least 0 and below 1"),
            "b2": (0 <= self.b2 < 1, "at least 0 and below 1"),
            "eps": (0 < self.eps < inf, "a number above 0"),
            "weight_decay": (0 <= self.weight_decay < inf, "0 or more"),
            "clip_norm": (0 < self.clip_norm <= inf, "above 0; inf clips nothing"),
            "adam_lr_ratio": (0 < self.adam_lr_ratio < inf, "a number above 0"),
            "skip_nonfinite": (self.skip_nonfinite >= 1, "1 or more"),
        }
        for field, (good, wanted) in bounds.items():
            if not good:
                raise ConfigError(f"optim.{field} is {getattr(self, field)!r}; it has to be {wanted}")

    def warmup_of(self, total: int) -> int:
        """The updates of the warm-up in a stage of `total`."""
        share = min(math.ceil(self.warmup * total), total - 1)
        return max(share, 0) if self.warmup < 1 else int(self.warmup)


class GuardState(NamedTuple):
    """State of `make_optimizer`'s transformation.

    Attributes:
        notfinite_count: steps in a row, up to now, that were skipped; int32 scalar.
        skipped: all steps that were skipped; int32 scalar.
        inner: state of the optimizer proper.
    """

    notfinite_count: jax.Array
    skipped: jax.Array
    inner: Any


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The transformation of a stage of `total_steps` updates: guard, then clipping, then AdamW or Muon.

    A step whose gradient holds a NaN or an infinity leaves parameters, moments and schedule as they are, bit
    for bit, and is counted. Unlike `optax.apply_if_finite` it is never let through: the loop has to compare
    `notfinite_count(state)` with `config.skip_nonfinite` and give up. A gradient of zero (a step in which no
    rollout taught anything) leaves them too, uncounted: momentum alone would go on, by a whole step of Muon.

    Raises:
        ConfigError: a field is out of bounds, or the warm-up is longer than the stage.
    """
    config.validate()
    schedule = make_schedule(config, total_steps)
    if config.name == "muon":
        inner = muon(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_lr_ratio=config.adam_lr_ratio,
        )
    else:
        inner = optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
        )
    return _guarded(inner, config.clip_norm)


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of update number `count` (from 0): no update is wasted on a rate of zero.

    The first of `warmup` updates has lr / warmup, the last has lr; the last of all has final_fraction * lr.
    """
    warmup = config.warmup_of(total_steps)
    if not 0 <= warmup < max(total_steps, 1):
        raise ConfigError(f"optim.warmup is {warmup} of {total_steps} steps; it has to be less than that")

    def rate(count: Any) -> jax.Array:
        done = jnp.asarray(count, jnp.float32) + 1.0
        rising = jnp.minimum(done / max(warmup, 1), 1.0)
        progress = jnp.clip((done - warmup) / (total_steps - warmup), 0.0, 1.0)
        falling = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if config.decay == "cosine" else 1.0
        return config.lr * rising * (config.final_fraction + (1.0 - config.final_fraction) * falling)

    return rate


def notfinite_count(state: GuardState) -> jax.Array:
    """How many updates in a row, up to now, were skipped for their gradient; int32 scalar."""
    return state.notfinite_count


def skipped_steps(state: GuardState) -> jax.Array:
    """How many updates were skipped in all; int32 scalar."""
    return state.skipped


def like_params(state: Any, values: Any, default: Any) -> Any:
    """A tree like the optimizer's `state` that has, for a leaf that belongs to a parameter, that one's value.

    This is how the moments get the parameters' shardings: `like_params(jax.eval_shape(tx.init, params),
    shardings, replicated)`. A leaf belongs to the parameter whose path ends its own.

    Args:
        state: an optimizer state, concrete or abstract.
        values: a tree like the parameters, of anything that is a leaf.
        default: for leaves that belong to no parameter, such as counters.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(values))

    def pick(path: tuple[Any, ...], _: Any) -> Any:
        owners = (by_path[path[start:]] for start in range(len(path)) if path[start:] in by_path)
        return next(owners, default)

    return jax.tree_util.tree_map_with_path(pick, state)


def decay_mask(params: Any) -> Any:
    """A tree of bool like `params`: which of them weight decay pulls on."""
    return jax.tree_util.tree_map_with_path(decays, params)


def _guarded(inner: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """`inner` behind clipping by the global norm; a gradient of norm 0, or of none, changes nothing."""

    def init(params: Any) -> GuardState:
        # Two arrays, not one twice: a state with a buffer in two places can not be donated.
        return GuardState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, GuardState]:
        squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(updates)]
        norm = jnp.sqrt(sum(squares, jnp.zeros(())))
        finite = jnp.isfinite(norm)
        counts = finite & (norm > 0)
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        clipped = jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), updates)
        moves, moved = inner.update(clipped, state.inner, params)
        # -0.0 and not 0.0: only p + (-0.0) gives back every p, itself -0.0 included.
        moves = jax.tree.map(lambda new: jnp.where(counts, new, jnp.full_like(new, -0.0)), moves)
        kept = jax.tree.map(lambda new, old: jnp.where(counts, new, old), moved, state.inner)
        skipped = 1 - finite.astype(jnp.int32)
        return moves, GuardState((state.notfinite_count + 1) * skipped, state.skipped + skipped, kept)

    return optax.GradientTransformation(init, update)
