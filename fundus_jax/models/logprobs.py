"""Log-probabilities of given tokens without ever building [B, T, V]: the vocabulary axis lives one chunk of
rows at a time.

On a mesh every device works through the rows it has, with the part of the vocabulary it has. The head's model
width is gathered once, before the first chunk, and its gradient scattered once, after the last: both are
written out (`jax.shard_map`), since a compiler that decides for itself gathers or reduces in every chunk.
Softmax in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fundus_jax import sharding

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
    B rows), in the backward pass too.
    """
    shape, width = targets.shape, hidden.shape[-1]
    lead = shape[0] if len(shape) > 1 else 1
    rows, wanted = hidden.reshape(lead, -1, width), targets.reshape(lead, -1)
    work = functools.partial(_in_chunks, banned=banned, temperature=temperature, chunk=chunk)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        logprobs, entropy = work(rows, head, wanted, vocab_axis=None, width_axis=None)
    else:
        batch = sharding.fit(sharding.spec(("batch",)), (lead,), mesh)
        table = sharding.fit(sharding.spec(("vocab", "embed")), head.shape, mesh)
        logprobs, entropy = jax.shard_map(
            functools.partial(work, vocab_axis=table[0], width_axis=table[1]),
            mesh=mesh,
            in_specs=(batch, table, batch),
            out_specs=(batch, batch),
            check_vma=batch[0] is not None,  # else the rows are everywhere, which a gather does not show
        )(rows, head, wanted)
    return logprobs.reshape(shape), entropy.reshape(shape)


def _in_chunks(
    rows: Array,
    head: Array,
    wanted: Array,
    *,
    banned: tuple[int, ...],
    temperature: float,
    chunk: int,
    vocab_axis: Any,
    width_axis: Any,
) -> tuple[Array, Array]:
    """Rows [B,N,D] and wanted [B,N] of one device, with its part of the head [V',D']: the mesh axes say over
    what V and D are spread (None: not at all)."""
    if width_axis is not None:
        head = jax.lax.all_gather(head, width_axis, axis=1, tiled=True)
    share = head.shape[0]
    start = 0 if vocab_axis is None else share * jax.lax.axis_index(vocab_axis)
    parts = 1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)
    impossible = jax.lax.dynamic_slice_in_dim(jnp.asarray(banned_mask(share * parts, banned)), start, share)

    def over_vocabulary(reduce: Any, x: Array) -> Array:
        return x if vocab_axis is None else reduce(x, vocab_axis)

    @jax.checkpoint
    def one(rows: Array, wanted: Array) -> tuple[Array, Array]:
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        logits = jnp.einsum("bnd,vd->bnv", rows, head, preferred_element_type=wide) / temperature
        logits = jnp.where(impossible, jnp.finfo(wide).min, logits)
        peak = over_vocabulary(jax.lax.pmax, jax.lax.stop_gradient(logits).max(axis=-1))
        logits = logits - peak[..., None]
        weights = jnp.exp(logits)
        total = over_vocabulary(jax.lax.psum, weights.sum(axis=-1))
        place = wanted - start
        inside = (place >= 0) & (place < share)
        own = jnp.take_along_axis(logits, jnp.clip(place, 0, share - 1)[..., None], axis=-1)[..., 0]
        chosen = over_vocabulary(jax.lax.psum, jnp.where(inside, own, 0))
        # banned ids have no weight; their logit would be infinite beside a large peak
        mean = over_vocabulary(jax.lax.psum, jnp.where(weights > 0, weights * logits, 0).sum(axis=-1)) / total
        return chosen - jnp.log(total), jnp.log(total) - mean

    lead, count, width = rows.shape
    most = max(1, chunk // lead)
    size = -(-count // -(-count // most))  # chunks of nearly equal size, so that little is padding
    padding = -count % size
    rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0))).reshape(lead, -1, size, width).swapaxes(0, 1)
    wanted = jnp.pad(wanted, ((0, 0), (0, padding))).reshape(lead, -1, size).swapaxes(0, 1)
    if rows.shape[0] == 1:
        logprobs, entropy = one(rows[0], wanted[0])
    else:
        stacked = jax.lax.map(lambda inputs: one(*inputs), (rows, wanted))
        logprobs, entropy = (x.swapaxes(0, 1).reshape(lead, -1) for x in stacked)
    return logprobs[:, :count], entropy[:, :count]
