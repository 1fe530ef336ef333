"""Rotary angles of both towers: two axes (row, column) for patches, three
(time, row, column) for text positions.

Inverse frequencies are rounded to float32 step by step as the reference rounds them; at 10,000 positions
a last-bit difference would show in the logits. Position ids come from `rope.mrope_ids`, at data time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def inverse_frequencies(channels: int, theta: float) -> np.ndarray:
    """theta ** (-2i / channels) for i < channels / 2, as float32 [channels / 2]."""
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def _cos_sin(angles: Array) -> tuple[Array, Array]:
    """Angles [..., C/2] -> cos, sin [..., 1, C]: both halves of a head turn by
    the same angles; 1 is the head axis."""
    angles = jnp.concatenate([angles, angles], axis=-1)[..., None, :]
    return jnp.cos(angles), jnp.sin(angles)


def vision_rotary(patch_hw: Array, channels: int, theta: float, dtype: jnp.dtype) -> tuple[Array, Array]:
    """cos, sin [B, P, 1, C] from the row and column of every patch slot [B, P, 2].

    Half of the angles follow each axis.
    """
    frequencies = jnp.asarray(inverse_frequencies(channels // 2, theta), dtype)
    angles = patch_hw[..., None].astype(dtype) * frequencies
    return _cos_sin(angles.reshape(*angles.shape[:-2], channels // 2))


def text_rotary(
    positions: Array, channels: int, theta: float, section: tuple[int, ...], dtype: jnp.dtype
) -> tuple[Array, Array]:
    """M-RoPE cos, sin [B, T, 1, C] from positions [B, 3, T]: the frequencies
    are dealt to the axes in runs of `section`."""
    frequencies = jnp.asarray(inverse_frequencies(channels, theta), dtype)
    angles = positions[..., None].astype(dtype) * frequencies
    bounds = np.cumsum((0, *section))
    runs = [angles[:, i % 3, :, bounds[i] : bounds[i + 1]] for i in range(len(section))]
    return _cos_sin(jnp.concatenate(runs, axis=-1))
