"""Log-probabilities of given tokens without ever building [B, T, V]: the
vocabulary axis lives one chunk of rows at a time.

The head is passed in once and stays outside the chunk loop, so that a
sharded head is gathered once. Softmax in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fundus_jax.sharding import constrain, parts

Array = jax.Array


def banned_mask(vocab: int, banned: tuple[int, ...]) -> np.ndarray:
    """[V] bool, True at ids that sampler and trainer alike treat as impossible."""
    mask = np.zeros(vocab, bool)
    mask[list(banned)] = True
    return mask


def scaled_logits(logits: Array, banned: tuple[int, ...], temperature: float) -> Array:
    """logits [..., V] / temperature, with banned ids at the lowest finite value
    (so that no gradient is NaN)."""
    low = jnp.finfo(logits.dtype).min
    return jnp.where(banned_mask(logits.shape[-1], banned), low, logits / temperature)


def token_logprobs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    banned: tuple[int, ...] = (),
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Array, Array]:
    """log p(target) and entropy (nats), both [B, ...] float32, from hidden [B, ..., D], head [V, D].

    targets: [B, ...] token ids. `banned` ids have probability zero, as in the sampler: its log-probs and
    these agree. On a device at most `chunk` rows x V logits exist at a time (but at least one of each of its
    B rows), in the backward pass too. Chunks are cut from the axes after the first, so that on a mesh every
    device works through the rows it has.
    """
    shape, width = targets.shape, hidden.shape[-1]
    lead = shape[0] if len(shape) > 1 else 1
    rows, wanted = hidden.reshape(lead, -1, width), targets.reshape(lead, -1)
    count = rows.shape[1]
    most = max(1, chunk * parts("batch", lead) // lead)
    size = -(-count // -(-count // most))  # chunks of nearly equal size, so that little is padding
    padding = -count % size
    rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0))).reshape(lead, -1, size, width).swapaxes(0, 1)
    wanted = jnp.pad(wanted, ((0, 0), (0, padding))).reshape(lead, -1, size).swapaxes(0, 1)
    rows, head = constrain(rows, None, "batch", None, None), constrain(head, "vocab", None)

    @jax.checkpoint
    def one(rows: Array, wanted: Array) -> tuple[Array, Array]:
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        logits = jnp.einsum("bnd,vd->bnv", rows, head, preferred_element_type=wide)
        logits = constrain(logits, "batch", None, "vocab")
        logs = jax.nn.log_softmax(scaled_logits(logits, banned, temperature), axis=-1)
        chosen = jnp.take_along_axis(logs, wanted[..., None], axis=-1)[..., 0]
        probabilities = jnp.exp(logs)
        return chosen, -jnp.sum(jnp.where(probabilities > 0, probabilities * logs, 0.0), axis=-1)

    if rows.shape[0] == 1:
        logprobs, entropy = one(rows[0], wanted[0])
    else:
        stacked = jax.lax.map(lambda inputs: one(*inputs), (rows, wanted))
        logprobs, entropy = (x.swapaxes(0, 1).reshape(lead, -1)[:, :count] for x in stacked)
    return logprobs.reshape(shape), entropy.reshape(shape)
