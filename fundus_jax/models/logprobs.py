"""Log-probabilities of given tokens without ever building [B, T, V]: the vocabulary axis lives one chunk of rows at a time.

The head is passed in once and stays outside the chunk loop, so that a sharded head is gathered once. Softmax in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def banned_mask(vocab: int, banned: tuple[int, ...]) -> np.ndarray:
    """[V] bool, True at ids that sampler and trainer alike treat as impossible."""
    mask = np.zeros(vocab, bool)
    mask[list(banned)] = True
    return mask


def scaled_logits(logits: Array, banned: tuple[int, ...], temperature: float) -> Array:
    """logits [..., V] / temperature, with banned ids at the lowest finite value (so that no gradient is NaN)."""
    low = jnp.finfo(logits.dtype).min
    return jnp.where(banned_mask(logits.shape[-1], banned), low, logits / temperature)


def token_logprobs(
    hidden: Array, head: Array, targets: Array, *, banned: tuple[int, ...] = (), temperature: float = 1.0, chunk: int = 1024
) -> tuple[Array, Array]:
    """log p(target) and entropy (nats), both [...] float32, from hidden [..., D], head [V, D], targets [...].

    `banned` ids have probability zero, as in the sampler: its log-probs and these agree. At most `chunk` rows x V logits exist
    at a time, in the backward pass too.
    """
    shape, width = targets.shape, hidden.shape[-1]
    rows = hidden.reshape(-1, width)
    wanted = targets.reshape(-1)
    size = min(chunk, rows.shape[0])
    padding = -rows.shape[0] % size
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, size, width)
    wanted = jnp.pad(wanted, (0, padding)).reshape(-1, size)

    @jax.checkpoint
    def one(rows: Array, wanted: Array) -> tuple[Array, Array]:
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        logits = jnp.einsum("nd,vd->nv", rows, head, preferred_element_type=wide)
        logs = jax.nn.log_softmax(scaled_logits(logits, banned, temperature), axis=-1)
        chosen = jnp.take_along_axis(logs, wanted[:, None], axis=-1)[:, 0]
        probabilities = jnp.exp(logs)
        return chosen, -jnp.sum(jnp.where(probabilities > 0, probabilities * logs, 0.0), axis=-1)

    if rows.shape[0] == 1:
        logprobs, entropy = one(rows[0], wanted[0])
    else:
        logprobs, entropy = jax.lax.map(lambda inputs: one(*inputs), (rows, wanted))
    count = wanted.size - padding
    return logprobs.reshape(-1)[:count].reshape(shape), entropy.reshape(-1)[:count].reshape(shape)
