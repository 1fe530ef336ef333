"""What one checkpoint holds: the arrays of a state by name, and the JSON part beside them.

A state is any pytree. On disk it is a flat table from dotted path to array, so that no class of optax or flax
is part of the format, and so that a program that expects other arrays is told which ones.
Neighbour: `checkpoints.py` writes, seals and restores bundles.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fundus_jax.records import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """What `Checkpoints.restore` gives back; `data_state` has the type it was saved with."""

    step: int
    state: Any
    data_state: bytes | dict[str, Any]
    counters: dict[str, Any]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by dotted path, in the tree's order.

    Raises:
        DataError: for a leaf that Orbax would not give back as it is.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        if name in leaves or not name:
            raise DataError(f"state: no leaf or two leaves are called {name!r}; give each a name of its own")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            kind = type(leaf).__name__
            raise DataError(f"state {name} is a {kind}, not a JAX array; plain numbers are counters")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise DataError(f"state {name} is a typed key; store jax.random.key_data of it")
        if leaf.size == 0:
            raise DataError(f"state {name} has shape {leaf.shape}: Orbax stores no empty array; leave it out")
        leaves[name] = leaf
    return leaves


def to_text(
    step: int, config_hash: str, arrays: dict[str, Any], data_state: bytes | dict[str, Any], counters: dict
) -> str:
    """The JSON part of a bundle.

    Raises:
        DataError: JSON would not give `data_state` or `counters` back as they are.
    """
    is_bytes = isinstance(data_state, bytes)
    content = {
        "step": step,
        "config_hash": config_hash,
        "arrays": _table(arrays),
        "data_state": {"base64": base64.b64encode(data_state).decode()} if is_bytes else {"json": data_state},
        "counters": counters,
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"step {step}: counters or data_state is not plain JSON: {error}") from error
    if json.loads(text) != content:
        raise DataError(
            f"step {step}: counters or data_state would change in JSON: "
            "use lists instead of tuples, and text for keys"
        )
    return text


def under(text: str, config_hash: str) -> str:
    """The content of `to_text` as a run of another config would have written it."""
    return json.dumps(json.loads(text) | {"config_hash": config_hash}, indent=1, allow_nan=False)


def from_text(text: str, where: Path, *, step: int, config_hash: str) -> dict[str, Any]:
    """The content of `to_text`, with `data_state` as it was given.

    Raises:
        DataError: it belongs to another step.
        ConfigError: it was saved under another config.
    """
    content = json.loads(text)
    if content["step"] != step:
        raise DataError(f"{where} holds step {content['step']}, expected {step}; give it its name back")
    if content["config_hash"] != config_hash:
        raise ConfigError(
            f"{where} was saved under config hash {content['config_hash']}, this run has {config_hash}: "
            "go on with the config of that run (config.json in its workdir), or choose another workdir"
        )
    stored = content["data_state"]
    content["data_state"] = base64.b64decode(stored["base64"]) if "base64" in stored else stored["json"]
    return content


def require_arrays(where: Path, saved: dict[str, Any], wanted: dict[str, Any], *, partial: bool) -> None:
    """Check that the saved arrays are the wanted ones in name, dtype and shape.

    Args:
        where: for the message.
        saved: "arrays" of `from_text`.
        wanted: leaves by name.
        partial: more may be saved than is wanted.

    Raises:
        ConfigError: naming the first ten differences.
    """
    asked = _table(wanted)
    wrong = [f"{name} is not in it" for name in asked.keys() - saved.keys()]
    wrong += [f"{name} is in it but not asked for" for name in saved.keys() - asked.keys() if not partial]
    for name in asked.keys() & saved.keys():
        if asked[name] != saved[name]:
            wrong.append(f"{name} is {saved[name]}, asked for {asked[name]}")
    if wrong:
        listed = "; ".join(sorted(wrong)[:10])
        raise ConfigError(
            f"{where} holds other arrays than this program's, {len(wrong)} differ: {listed}. "
            "Use the version of the program that saved it"
        )


def restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
    """How Orbax places a leaf: by its own sharding, else on one device; with several processes on all."""
    sharding: Sharding | None = getattr(leaf, "sharding", None)
    if sharding is None and jax.process_count() == 1:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    elif sharding is None:
        sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _table(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [leaf.dtype.name, list(leaf.shape)] for name, leaf in arrays.items()}
