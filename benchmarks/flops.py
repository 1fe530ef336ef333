"""FLOPs that the model itself asks for, vision tower and language model apart.

Matrix products alone, a multiplication and an addition each. A query counts the keys it sees: padding, empty
slots of a window and later tokens are not counted, nor is what is computed twice to save memory, by whatever
side. So a rate of them over a chip's peak is the share of it that serves the model (MFU).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig


class Flops(NamedTuple):
    """Of the vision tower with its merger, and of the decoder with its head."""

    vision: float
    text: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.vision + self.text


def forward(config: Qwen2_5_VLConfig, batch: Batch) -> Flops:
    """Of a forward pass, with logits for every token but the first of a conversation."""
    return Flops(_vision(config.vision, np.asarray(batch.patch_image)), _text(config, batch))


def step(config: Qwen2_5_VLConfig, batch: Batch) -> Flops:
    """Of a forward and a backward pass in which everything is trained: each product has two gradients, but
    pixels have none."""
    once, vision = forward(config, batch), config.vision
    real = (np.asarray(batch.patch_image) >= 0).sum()
    return Flops(3 * once.vision - 2.0 * real * vision.patch_features * vision.hidden_size, 3 * once.text)


def _vision(config: VisionConfig, image: np.ndarray) -> float:
    """image [B,P]: the number of each slot's image in its row, -1 where it is empty."""
    width, real = config.hidden_size, image >= 0
    windows = real.reshape(-1, config.window_slots).sum(axis=1)
    images = _counts(image, real)
    full = len(config.full_attention_layers)
    pairs = full * np.square(images).sum() + (config.depth - full) * np.square(windows).sum()
    block = 4 * width**2 + 3 * width * config.intermediate_size
    wide = width * config.spatial_merge_size**2
    merged = wide * (wide + config.out_hidden_size) / config.spatial_merge_size**2  # of a patch
    patch = config.patch_features * width + config.depth * block + merged
    return 2.0 * (real.sum() * patch + 2 * pairs * width)


def _text(config: Qwen2_5_VLConfig, batch: Batch) -> float:
    segments = np.asarray(batch.segments)
    lengths = _counts(segments, segments > 0)
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width * (width + keys) + 3 * width * config.intermediate_size
    pairs = (lengths * (lengths + 1) // 2).sum()
    layers = config.num_hidden_layers * (lengths.sum() * layer + 2 * pairs * width)
    return 2.0 * (layers + (lengths - 1).sum() * width * config.vocab_size)


def _counts(numbers: np.ndarray, real: np.ndarray) -> np.ndarray:
    """How often each number stands in each row [B, ...], where it is real."""
    rows = np.broadcast_to(np.arange(len(numbers))[:, None], numbers.shape)
    return np.unique(np.stack([rows[real], numbers[real]]), axis=1, return_counts=True)[1]
