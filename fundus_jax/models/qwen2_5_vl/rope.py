"""M-RoPE position ids of Qwen2.5-VL, in numpy, at data time: three ids (time, height, width) for each token.

Text counts up by one on all three axes. An image of h x w merged tokens that starts at position p gets (p, p
+ row, p + column), and the text after it goes on at p + max(h, w). Qwen2.5-VL technical report, section
2.1.2; equal to `Qwen2_5_VLModel.get_rope_index(..., mm_token_type_ids=...)` of transformers for still images.
The ids travel in `Batch.positions`, so that training, prefill and decode can not disagree; the angles are
made from them in `rotary`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np

from fundus_jax.records import DataError

Grid = tuple[int, int, int]


@lru_cache(maxsize=1024)
def _image_offsets(height: int, width: int) -> np.ndarray:
    """[3, height*width] ids of an image's merged tokens in raster order, relative to its start: (0, row,
    column).
    """
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int32), width)
    offsets = np.stack([np.zeros_like(rows), rows, columns]).astype(np.int32)
    offsets.flags.writeable = False
    return offsets


def _row_ids(is_image: np.ndarray, grids: Sequence[Grid], merge_size: int, row: int) -> np.ndarray:
    """[3, n] ids of the n real tokens of one row, in their order."""
    edges = np.flatnonzero(np.diff(is_image, prepend=False, append=False))
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    if len(starts) != len(grids):
        raise DataError(f"row {row}: {len(starts)} runs of image tokens but {len(grids)} image grids")
    ids = np.empty((3, len(is_image)), np.int32)
    position = done = 0
    for start, end, (frames, height, width) in zip(starts, ends, grids, strict=True):
        height, width = height // merge_size, width // merge_size
        if frames != 1 or end - start != height * width:
            raise DataError(
                f"row {row}: a run of {end - start} image tokens for a merged grid of "
                f"{frames}x{height}x{width}; an image has one frame and exactly one token per merged patch"
            )
        ids[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        ids[:, start:end] = position + _image_offsets(height, width)
        position += max(height, width)
        done = end
    ids[:, done:] = np.arange(position, position + len(is_image) - done)
    return ids


def mrope_ids(
    tokens: np.ndarray,
    mask: np.ndarray,
    grids: Sequence[Grid] | Sequence[Sequence[Grid]],
    *,
    image_token_id: int,
    merge_size: int = 2,
) -> np.ndarray:
    """Position ids of one row or of a padded batch.

    Args:
        tokens: [T] or [B,T] token ids, image pads expanded to one per merged patch.
        mask: same shape, True at real tokens. Any padding side gives equal ids at the real tokens.
        grids: the (frames = 1, height, width) in patches of each image: a list for [T], a list per row for
            [B,T].
        image_token_id: the id that stands for a merged patch.
        merge_size: patches per merged token along one side (`vision_config.spatial_merge_size`).

    Returns:
        [3,T] or [B,3,T] int32. Padded positions hold 0 on all axes (as in transformers); attention never
        reads them.

    Raises:
        DataError: image tokens and grids do not match; the message names the row.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    rows = cast(Sequence[Sequence[Grid]], [grids] if tokens.ndim == 1 else grids)
    lines, real = np.atleast_2d(tokens), np.atleast_2d(mask)
    if tokens.shape != mask.shape or len(rows) != len(lines):
        raise DataError(
            f"tokens {tokens.shape}, mask {mask.shape} and {len(rows)} rows of grids do not fit together"
        )
    ids = np.zeros((len(lines), 3, lines.shape[1]), np.int32)
    for row, (line, kept) in enumerate(zip(lines, real, strict=True)):
        ids[row][:, kept] = _row_ids(line[kept] == image_token_id, rows[row], merge_size, row)
    return ids[0] if tokens.ndim == 1 else ids
