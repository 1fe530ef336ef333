"""Muon: momentum whose every matrix is replaced by the nearest orthogonal one; Adam for the rest.

A step then moves all directions of a weight matrix alike, however unequal the gradient's singular values are.
That is what lets the small vision tower learn lesions, whose pixels are dwarfed by the fundus's colour:
measured on phantoms, where Adam stayed at the prior. Which leaf is a matrix is read off its path, because
biases and norms of stacked layers are [L, D] and look like one.
Neighbour: `optim.py` chooses, clips and guards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fundus_jax.records import ConfigError

MOMENTUM = 0.95
STEPS = 4  # of Newton-Schulz
QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, then between 0.68 and 1.13: fast rather than exact
SCALE = 0.2  # gives an update the root mean square of Adam's, so that learning rates carry over

# Their rows are words or classes, of which a batch has few: Muon would move the absent ones as far.
TABLES = frozenset({"embed_tokens", "lm_head", "head"})
# The merger's wide square: orthogonalising it takes as long as all other matrices of the small policy
# together, and Adam teaches it as well (docs/log.md, 2026-11-23).
COSTLY = frozenset({"fc1"})


class MuonState(NamedTuple):
    """State of `muon`; both trees have the parameters' paths and shapes.

    Attributes:
        count: updates made; int32 scalar.
        mean: momentum of the matrices, mean gradient of the others.
        square: mean squared gradient of the others; `optax.MaskedNode` in the place of a matrix.
    """

    count: jax.Array
    mean: Any
    square: Any


def muon(
    schedule: Callable[[Any], jax.Array],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    adam_lr_ratio: float,
) -> optax.GradientTransformation:
    """Muon with Nesterov momentum for matrices, Adam at `adam_lr_ratio` times the rate for the rest.

    Matrices are leaves [out, in] or stacks [L, out, in]; see `is_matrix`. Weight decay is decoupled.

    Raises:
        ConfigError: in `init`, for a matrix of more than three dimensions.
    """

    def init(params: Any) -> MuonState:
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        square = [
            optax.MaskedNode() if is_matrix(path, leaf) else jnp.zeros_like(leaf) for path, leaf in leaves
        ]
        mean = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros((), jnp.int32), mean, tree.unflatten(square))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        if params is None:
            raise ConfigError("muon needs the parameters: call update(updates, state, params)")
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        columns = [tree.flatten_up_to(side) for side in (state.mean, state.square, params)]
        count, rate = state.count + 1, schedule(state.count)
        moves, means, squares = [], [], []
        for (path, grad), mean, square, param in zip(leaves, *columns, strict=True):
            grad = grad.astype(mean.dtype)
            if is_matrix(path, grad):
                step_size = rate
                mean = MOMENTUM * mean + grad
                larger_side = max(grad.shape[-2:])
                direction = orthogonalise(MOMENTUM * mean + grad) * (SCALE * math.sqrt(larger_side))
            else:
                step_size = rate * adam_lr_ratio
                mean = b1 * mean + (1 - b1) * grad
                square = b2 * square + (1 - b2) * grad**2
                direction = mean / (1 - b1**count) / (jnp.sqrt(square / (1 - b2**count)) + eps)
            if weight_decay and decays(path, param):
                direction += weight_decay * param
            moves.append((-step_size * direction).astype(mean.dtype))
            means.append(mean)
            squares.append(square)
        return tree.unflatten(moves), MuonState(count, tree.unflatten(means), tree.unflatten(squares))

    return optax.GradientTransformation(init, update)


def orthogonalise(matrix: jax.Array) -> jax.Array:
    """The matrices of [..., out, in] with their singular values brought near 1 (within 0.6 and 1.3).

    Newton-Schulz with a quintic. Singular values below some 1/200 of the Frobenius norm get part of the way.
    """
    a, b, c = QUINTIC
    x = matrix.astype(jnp.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix is then the smaller of the two
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True)), 1e-20)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).astype(matrix.dtype)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter gets Muon: a weight [out, in], or a stack, that is neither norm, table nor
    COSTLY."""
    if leaf.ndim < 2 or not decays(path, leaf) or (TABLES | COSTLY).intersection(_names(path)):
        return False
    if leaf.ndim > 3:
        raise ConfigError(
            f"{'.'.join(_names(path))} has shape {leaf.shape}; matrices are [out, in] or [L, out, in]"
        )
    return True


def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether weight decay pulls on a parameter: not on biases, norms and vectors (as in the HF trainer)."""
    names = _names(path)
    is_norm = any("norm" in name or name == "ln_q" for name in names)
    return leaf.ndim >= 2 and not is_norm and not names[-1].endswith("bias")


def _names(path: tuple[Any, ...]) -> list[str]:
    """The words of a path: ("text", "layers", "q_proj", "weight"); nnx's "value" at the end is left out."""
    names = [word for key in path for word in jax.tree_util.keystr((key,), simple=True).split(".")]
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names
