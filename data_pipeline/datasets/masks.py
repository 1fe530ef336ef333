"""From a publisher's lesion masks to findings and boxes.

A mask of forty exudates would give forty boxes, which nobody can say in a sentence; boxes that lie close to
each other are therefore joined until few are left. Neighbour: `base.annotated`, which reads a sample's masks.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label, regionprops
from skimage.morphology import dilation, footprint_rectangle

from data_pipeline import images
from data_pipeline.datasets.cut import Cut
from fundus_jax.records import GRID, Box, DataError

MOST = 6  # boxes of one finding
_SIDE = 500  # masks are reduced to this many cells on the longer side before components are counted
_NEAR = 0.02  # components this close (share of the longer side) belong together from the start


def read(path: Path) -> NDArray[np.bool_]:
    """A mask file as [H, W], True on the lesion.

    Publishers write indices {0, 1} of a palette, grey levels 0 to 255 with soft edges (the lesion is >= 128),
    or colours on black (any channel >= 128). Alpha is not looked at: in IDRiD_81_EX.tif it is 255 everywhere.
    """
    image = images.load(path)
    if image.mode in ("P", "1"):
        return np.asarray(image) > 0
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise DataError(
            f"{path.name}: a mask of colour mode {image.mode}; 8-bit grey, palette or colour is read"
        )
    values = np.asarray(image)
    if values.ndim == 3:
        values = values[..., : 1 if image.mode == "LA" else 3].max(axis=-1)
    return values > 0 if values.max() <= 1 else values >= 128


def holds(path: Path, value: int) -> bool:
    """Whether a mask file has pixels of exactly this value."""
    return bool((np.asarray(images.load(path)) == value).any())


def union(paths: Sequence[Path | Cut], image: Path | bytes) -> NDArray[np.bool_]:
    """All masks of one finding laid over each other, [H, W]; DataError if not of the image's size, or if
    the image is turned by EXIF: nobody knows whether its masks were drawn before or after the turn."""
    if images.turned(image):
        raise DataError(
            "its EXIF data turn the image, but not its masks; turn all of them and remove the tag"
        )
    size = images.size(image)
    whole = np.zeros(size[::-1], bool)
    for path in paths:
        mask = path.pixels() if isinstance(path, Cut) else read(path)
        if mask.shape != whole.shape:
            raise DataError(
                f"{path.name}: {mask.shape[1]} x {mask.shape[0]} pixels, but its image has "
                f"{size[0]} x {size[1]}; resize images and masks together"
            )
        whole |= mask
    return whole


def boxes(finding: str, mask: NDArray[np.bool_]) -> list[Box]:
    """At most `MOST` boxes on the 0-999 grid that together cover the mask [H, W], the largest first."""
    if not mask.any():
        return []
    cell = -(-max(mask.shape) // _SIDE)
    small = _pooled(mask, cell)
    near = 1 + 2 * int(_NEAR * max(small.shape) / 2)
    groups = np.asarray(label(dilation(small, footprint_rectangle((near, near))), connectivity=2))
    spans = [region.bbox for region in regionprops(groups * small)]  # tight around the lesion itself
    while len(spans) > MOST:
        spans = _joined(spans)
    found = [_box(finding, [edge * cell for edge in span], mask.shape) for span in spans]
    return sorted(found, key=lambda b: (-(b.x2 - b.x1) * (b.y2 - b.y1), b.y1, b.x1))


def _pooled(mask: NDArray[np.bool_], cell: int) -> NDArray[np.bool_]:
    """Whether any pixel is set in each cell of `cell` x `cell` pixels."""
    height, width = (-(-n // cell) * cell for n in mask.shape)
    whole = np.zeros((height, width), bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    return np.logical_or.reduce(whole.reshape(height // cell, cell, width // cell, cell), axis=(1, 3))


def _joined(spans: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Join the two spans (top, left, bottom, right) that add least to the sum of (height + width) squared.

    Area would join dots far apart on one line, the plain sum would grow one box from neighbour to neighbour.
    """
    s = np.array(spans)
    low = np.minimum(s[:, None, :2], s[None, :, :2])
    high = np.maximum(s[:, None, 2:], s[None, :, 2:])
    square = (s[:, 2:] - s[:, :2]).sum(axis=1) ** 2
    added = (high - low).sum(axis=2) ** 2 - square[:, None] - square[None]
    np.fill_diagonal(added, np.iinfo(added.dtype).max)
    i, j = divmod(int(added.argmin()), len(spans))
    rest = [span for k, span in enumerate(spans) if k not in (i, j)]
    return [*rest, (*low[i, j].tolist(), *high[i, j].tolist())]


def _box(finding: str, span: Sequence[int], shape: tuple[int, ...]) -> Box:
    top, left, bottom, right = span
    height, width = shape
    x1, y1 = left * (GRID - 1) // width, top * (GRID - 1) // height
    x2 = min(GRID - 1, -(-right * (GRID - 1) // width))  # rounded up, so that the box still covers the pixel
    y2 = min(GRID - 1, -(-bottom * (GRID - 1) // height))
    return Box(finding=finding, x1=x1, y1=y1, x2=x2, y2=y2)
