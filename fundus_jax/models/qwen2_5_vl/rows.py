"""From tokenised conversations and their images to the arrays of a `Batch`: expand the image pads, join what
shares a row, then pad the rows.

Between `processor` (text and tokenizer) and `images`, `rope` (one image, one conversation). Expanding needs
only the images' sizes, so that filters, buckets and packing cost no pixel work; `collate` reads the pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.images import ImageConfig, WindowLayout, image_patches, window_layout
from fundus_jax.models.qwen2_5_vl.rope import Grid, mrope_ids
from fundus_jax.records import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation, each image pad expanded to one token per merged patch; or several, joined.

    Attributes:
        tokens: [T] int32.
        segments: [T] int32, number of the token's conversation, from 1.
        positions: [3,T] int32, M-RoPE ids, which start anew with each conversation.
        is_image: [T] bool, True at image tokens.
        loss: [T] bool, True where the token is to be learned.
        images, layouts: of its images, in order.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    is_image: np.ndarray
    loss: np.ndarray
    images: Sequence[Image.Image]
    layouts: Sequence[WindowLayout]

    @property
    def slots(self) -> int:
        """Patch slots the row needs."""
        return sum(layout.slots for layout in self.layouts)


def expand(
    ids: np.ndarray,
    loss: np.ndarray,
    images: Sequence[Image.Image],
    config: ImageConfig,
    image_token_id: int,
    number: int,
) -> Row:
    """Repeat each image pad of `ids` [n] once per merged token of its image; `loss` [n] follows.

    Raises DataError naming row `number`: empty, pads and images differ in number, a pad is to be learned, or
    an image has a shape that can not be used.
    """
    pads = ids == image_token_id
    if not len(ids):
        raise DataError(f"row {number} is empty")
    if pads.sum() != len(images):
        raise DataError(f"row {number}: {pads.sum()} image pads for {len(images)} images")
    if (pads & loss).any():
        raise DataError(
            f"row {number}: an image stands in an assistant turn; only other turns may show images"
        )
    try:
        grids: list[Grid] = [config.grid(image) for image in images]
    except DataError as error:
        raise DataError(f"row {number}: {error}") from error
    layouts = [
        window_layout(
            grid, patch_size=config.patch_size, merge_size=config.merge_size, window_size=config.window_size
        )
        for grid in grids
    ]
    counts = np.ones(len(ids), np.int64)
    counts[pads] = [len(layout.raster_to_slot) for layout in layouts]
    tokens, is_image, loss = (np.repeat(values, counts) for values in (ids, pads, loss))
    positions = mrope_ids(
        tokens,
        np.ones(len(tokens), bool),
        grids,
        image_token_id=image_token_id,
        merge_size=config.merge_size,
    )
    return Row(
        tokens=tokens,
        segments=np.ones(len(tokens), np.int32),
        positions=positions,
        is_image=is_image,
        loss=loss,
        images=images,
        layouts=layouts,
    )


def join(rows: Sequence[Row]) -> Row:
    """Conversations one after the other as one row: their tokens, positions and images as they were, their
    segments numbered on."""
    return Row(
        tokens=np.concatenate([row.tokens for row in rows]),
        segments=np.concatenate([np.full(len(row.tokens), n, np.int32) for n, row in enumerate(rows, 1)]),
        positions=np.concatenate([row.positions for row in rows], axis=1),
        is_image=np.concatenate([row.is_image for row in rows]),
        loss=np.concatenate([row.loss for row in rows]),
        images=[image for row in rows for image in row.images],
        layouts=[layout for row in rows for layout in row.layouts],
    )


def collate(
    rows: Sequence[Row],
    config: ImageConfig,
    *,
    pad_id: int,
    length: int | None,
    patches: int | None,
    packed: bool = False,
) -> tuple[Batch, np.ndarray]:
    """Pad `rows` to `length` tokens and `patches` slots (None: the largest row) and read the pixels.

    packed: whether rows may be joined ones. Returns the batch and its loss mask [B,T] bool. Raises DataError
    naming a row that does not fit or an image that can not be read, ConfigError if `patches` is not a whole
    number of windows.
    """
    if patches is not None and patches % config.window_slots:
        raise ConfigError(f"patches={patches} must be a multiple of a window's {config.window_slots} slots")
    slots = _fit([row.slots for row in rows], patches, "patch slots", "patches")
    shape = (len(rows), _fit([len(row.tokens) for row in rows], length, "tokens", "length"))
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    positions = np.zeros((shape[0], 3, shape[1]), np.int32)
    loss, image_index = np.zeros(shape, bool), np.full(shape, -1, np.int32)
    values = np.zeros((len(rows), slots, config.patch_features), np.float32)
    patch_hw = np.zeros((len(rows), slots, 2), np.int32)
    patch_image = np.full((len(rows), slots), -1, np.int32)
    for number, row in enumerate(rows):
        real = slice(len(row.tokens))
        tokens[number, real], segments[number, real], loss[number, real] = row.tokens, row.segments, row.loss
        positions[number, :, real] = row.positions
        image_index[number, real][row.is_image] = _place(
            row, number, config, values[number], patch_hw[number], patch_image[number]
        )
    batch = Batch(
        tokens=tokens,
        mask=segments > 0,
        segments=segments,
        positions=positions,
        image_index=image_index,
        patches=values,
        patch_hw=patch_hw,
        patch_image=patch_image,
        packed=packed,
    )
    return batch, loss


def _place(
    row: Row,
    number: int,
    config: ImageConfig,
    values: np.ndarray,
    patch_hw: np.ndarray,
    patch_image: np.ndarray,
) -> np.ndarray:
    """Fill the slots of one row, image after image, in place; return the merged slot of each image token."""
    start, merged = 0, [np.zeros(0, np.int32)]
    for image, layout in enumerate(row.layouts):
        try:
            patches, _ = image_patches(row.images[image], config)
        except DataError as error:
            raise DataError(f"row {number}, image {image}: {error}") from error
        values[start + layout.patch_slot] = patches
        own = slice(start, start + layout.slots)
        patch_hw[own] = layout.hw
        patch_image[own] = np.where(layout.filled, image, -1)
        merged.append(start // config.merge_size**2 + layout.raster_to_slot)
        start += layout.slots
    return np.concatenate(merged)


def _fit(sizes: list[int], bound: int | None, unit: str, argument: str) -> int:
    """The padded size: `bound`, or the largest. Raises DataError naming the first row that does not fit."""
    if bound is None:
        return max(sizes)
    for number, size in enumerate(sizes):
        if size > bound:
            raise DataError(
                f"row {number} has {size} {unit}, more than {argument}={bound}: "
                f"leave it out or raise {argument}; rows are never truncated"
            )
    return bound
