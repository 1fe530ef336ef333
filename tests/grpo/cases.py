"""Tensors for tests of the objective, and the loss of them with its gradient."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from fundus_jax.grpo.loss import policy_loss


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What the loss reads of a GrpoConfig."""

    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float = 0.0
    ratio: str = "token"
    kl: str = "k3"
    kl_coef: float = 0.1
    kl_in: str = "loss"
    kl_clamp: float = 0.0
    aggregate: str = "token-mean"
    constant_norm: int = 17
    sampler_correction: float = 0.0
    sampler_ratio: str = "token"


def make_case(seed=0, rows=6, length=9, empty_rows=0, drift=0.4):
    """Rows of different lengths of a policy that has moved enough for both clips to act."""
    random = np.random.default_rng(seed)
    logprobs = -random.gamma(1.0, 1.0, (rows, length))
    lengths = random.integers(1, length + 1, rows)
    lengths[:empty_rows] = 0
    case = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + drift * random.normal(size=logprobs.shape),
        "ref_logprobs": logprobs + drift * random.normal(size=logprobs.shape),
        "advantages": random.normal(size=rows),
        "mask": np.arange(length) < lengths[:, None],
    }
    return {name: value if name == "mask" else value.astype(np.float32) for name, value in case.items()}


@functools.partial(jax.jit, static_argnames="config")
def _loss_and_gradient(case, config, denominator):
    def function(logprobs):
        return policy_loss(**{**case, "logprobs": logprobs}, config=config, denominator=denominator)

    return jax.value_and_grad(function, has_aux=True)(case["logprobs"])


def loss_and_gradient(case, config, denominator=None):
    """Returns (loss, gradient by logprobs, metrics)."""
    (loss, metrics), gradient = _loss_and_gradient(case, config, denominator)
    return float(loss), np.asarray(gradient), {name: float(value) for name, value in metrics.items()}


def rows_of(case, which):
    return {name: value[which] for name, value in case.items()}


TWO_ROWS = {
    # ratios 1.5, 1.1 (row 0, advantage 2) and 0.5, 1.5, 1 (row 1, advantage -1); the last token of row 0 is
    # padding
    "logprobs": np.log(np.array([[0.6, 0.22, 0.9], [0.1, 0.6, 0.3]], np.float32)),
    "old_logprobs": np.log(np.array([[0.4, 0.2, 0.1], [0.2, 0.4, 0.3]], np.float32)),
    "ref_logprobs": np.log(np.array([[0.3, 0.22, 0.1], [0.2, 0.6, 0.6]], np.float32)),
    "advantages": np.array([2.0, -1.0], np.float32),
    "mask": np.array([[True, True, False], [True, True, True]]),
}
