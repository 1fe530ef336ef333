"""Which parameters are trained: a mark on each one that is not.

A frozen parameter gets no gradient and no optimizer state, needs no float32 master, and is in no bundle of a
run. Models name the parts that can be frozen (`PARTS`: name -> path in the module tree); `lora` freezes
everything but its adapters. Neighbour: `training.Skeleton` divides a model's parameters by the mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fundus_jax.records import ConfigError

MARK = "frozen"


def freeze(model: Any, names: Sequence[str]) -> None:
    """Mark the parameters of the named parts of `model` as frozen, in place.

    A part does not contain the parts inside it: "vision" is the tower without its merger, "projector".
    Raises ConfigError for a part that the model does not have, and where no parameter would be left to train.
    """
    params = list(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    parts = [_part(path, model.PARTS) for path, _ in params]
    unknown = sorted(set(names) - set(parts))
    if unknown:
        raise ConfigError(
            f"freeze names {', '.join(unknown)}; this model has {', '.join(sorted(set(parts)))} "
            "(a tied head is the embedding)"
        )
    chosen = [part in names for part in parts]
    if all(chosen):
        raise ConfigError(f"freeze names every part ({', '.join(names)}): nothing is left to train")
    for (_, param), freezing in zip(params, chosen, strict=True):
        if freezing:
            param.set_metadata(MARK, True)


def freeze_all(model: nnx.Module) -> None:
    """Mark every parameter that `model` has now as frozen, in place."""
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        param.set_metadata(MARK, True)


def is_frozen(param: nnx.Variable) -> bool:
    """Whether a parameter carries the mark."""
    return bool(param.get_metadata().get(MARK, False))


def narrow(model: nnx.Module, dtype: str) -> None:
    """Cast the frozen parameters of `model` to `dtype`, in place and one by one: the old ones are let go."""
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if is_frozen(param):
            param.set_value(param.get_value().astype(jnp.dtype(dtype)))


def _part(path: tuple[Any, ...], parts: dict[str, tuple[str, ...]]) -> str:
    """The innermost part that holds the parameter at `path`."""
    holding = [name for name, prefix in parts.items() if path[: len(prefix)] == prefix]
    return max(holding, key=lambda name: len(parts[name]))
