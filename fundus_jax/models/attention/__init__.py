"""Attention, by what a query may see; the arithmetic behind it is chosen by name.

Every pass over whole rows is one of three structures, given as such and not as an array of N x S, so that a
flash kernel can skip what nobody sees:

* `causal`: earlier tokens of the same conversation in the row (training, prefill);
* `continuation`: the prompt, and the earlier tokens of the same response (scoring G responses of a prompt);
* `within`: everything of the same image (full layers of a vision tower).

Windows of a vision tower and single decoding steps are small enough for `attend` on any machine. Neighbours:
`xla` (plain, everywhere; the reference of the others), `splash` (TPU), `cudnn` (GPU).
"""

from __future__ import annotations

from typing import Protocol

import jax

from fundus_jax.models.attention.cudnn import Cudnn
from fundus_jax.models.attention.splash import Splash
from fundus_jax.models.attention.xla import Prefix, Xla, attend
from fundus_jax.records import ConfigError

Array = jax.Array


class Backend(Protocol):
    """Scaled softmax attention in three structures; H is a multiple of K, head h reads keys of h // (H / K).

    Results have the query's shape and dtype. What padding sees is finite and meaningless. Under a mesh
    (`jax.set_mesh`) rows and heads stay on their devices.
    """

    def causal(self, query: Array, keys: Array, values: Array, segments: Array | None) -> Array:
        """query [B,T,H,C], keys and values [B,T,K,C]; segments [B,T] int32, equal within a conversation, or
        None where every row holds one, right-padded."""
        ...

    def continuation(self, query: Array, keys: Array, values: Array, prefix: Prefix) -> Array:
        """query [B,G,N,H,C], keys and values [B,G,N,K,C] of G responses to the prompt of `prefix`."""
        ...

    def within(self, query: Array, keys: Array, values: Array, segments: Array) -> Array:
        """query [B,P,H,C], keys and values [B,P,K,C]; segments [B,P] int32, equal within an image."""
        ...


BACKENDS: dict[str, Backend] = {
    "xla": Xla(),
    "splash": Splash(),
    "cudnn": Cudnn(),
    "splash_interpret": Splash(interpret=True),  # on any machine, slowly: for tests of the numbers
}
_PLATFORMS = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def backend(name: str) -> Backend:
    """The back end of that name. Raises ConfigError if there is none."""
    if name not in BACKENDS:
        raise ConfigError(f"attention back end {name!r} is unknown; there are: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backend_for(platform: str) -> str:
    """The best back end's name for the `platform` of a mesh's devices; plain XLA where there is no other."""
    return _PLATFORMS.get(platform, "xla")


__all__ = ["BACKENDS", "Backend", "Prefix", "attend", "backend", "backend_for"]
