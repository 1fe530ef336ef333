"""Few boxes around the scattered pixels of one finding's mask.

A finding such as forty haemorrhages would give forty boxes, which nobody can say in a sentence. The points
are instead cut, like a kd-tree, where a straight cut saves the most area, until four boxes are reached or a
cut no longer pays. Every mask pixel stays inside one of the boxes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fundus_jax.records import Box

MOST = 4  # boxes of one finding
GRID = 999  # records.Box counts from 0 to 999 across the image
_CELLS = 16  # the mask is first summed up in this many cells a side, so that cutting is cheap
_SAVING = 0.3  # a cut must save this share of the area now covered

Rectangles = NDArray[np.int64]  # [N, 4]: left, top, right, bottom in pixels, right and bottom exclusive


@dataclass(frozen=True, slots=True)
class _Group:
    """Some rectangles, the box around them, and what the best straight cut through them would save."""

    extent: tuple[int, int, int, int]
    area: int
    saving: int
    parts: tuple[Rectangles, Rectangles] | None


def find_boxes(finding: str, mask: NDArray[np.bool_]) -> tuple[Box, ...]:
    """At most `MOST` boxes that cover the whole mask [S, S], the largest first; () for an empty mask."""
    cells = _cells(mask)
    groups = [_group(cells, cut=True)] if len(cells) else []
    while 0 < len(groups) < MOST:
        best = max(groups, key=lambda group: group.saving)
        if best.parts is None or best.saving < _SAVING * sum(group.area for group in groups):
            break
        groups.remove(best)
        groups += [_group(part, cut=len(groups) + 2 < MOST) for part in best.parts]
    boxes = [_box(finding, group, mask.shape[0]) for group in groups]
    return tuple(sorted(boxes, key=lambda box: (box.x2 - box.x1) * (box.y2 - box.y1), reverse=True))


def _cells(mask: NDArray[np.bool_]) -> Rectangles:
    """Tight rectangles around the mask's pixels, one for each occupied cell of a coarse grid."""
    size = mask.shape[0]
    rows, cols = np.divmod(np.flatnonzero(mask), size)
    cell = rows * _CELLS // size * _CELLS + cols * _CELLS // size
    order = np.argsort(cell, kind="stable")
    rows, cols, cell = rows[order], cols[order], cell[order]
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    found = np.empty((len(starts), 4), dtype=np.int64)
    if len(starts):
        for k, line in enumerate((cols, rows)):
            found[:, k] = np.minimum.reduceat(line, starts)
            found[:, k + 2] = np.maximum.reduceat(line, starts) + 1
    return found


def _group(rectangles: Rectangles, *, cut: bool) -> _Group:
    """Measure the rectangles; with `cut`, find the cut across or down that leaves the smallest two boxes."""
    if not cut or len(rectangles) == 1:
        low, high = rectangles[:, :2].min(axis=0).tolist(), rectangles[:, 2:].max(axis=0).tolist()
        return _Group((*low, *high), (high[0] - low[0]) * (high[1] - low[1]), -1, None)
    best: tuple[int, tuple[Rectangles, Rectangles] | None] = (-1, None)
    for axis in (0, 1):
        line = rectangles[np.argsort(rectangles[:, axis] + rectangles[:, axis + 2], kind="stable")]
        low, high, areas = _running(line)
        if axis == 0:
            extent = (*low[-1].tolist(), *high[-1].tolist())
            whole = int(areas[-1])
        left_over = areas[:-1] + _running(line[::-1])[2][-2::-1]
        k = int(left_over.argmin())
        if whole - int(left_over[k]) > best[0]:
            best = (whole - int(left_over[k]), (line[: k + 1], line[k + 1 :]))
    return _Group(extent, whole, *best)


def _running(line: Rectangles) -> tuple[Rectangles, Rectangles, NDArray[np.int64]]:
    """Corners [N, 2] and area [N] of the box around the first 1, 2, ... rectangles."""
    low = np.minimum.accumulate(line[:, :2])
    high = np.maximum.accumulate(line[:, 2:])
    return low, high, (high[:, 0] - low[:, 0]) * (high[:, 1] - low[:, 1])


def _box(finding: str, group: _Group, size: int) -> Box:
    left, top, right, bottom = group.extent
    return Box(
        finding=finding,
        x1=left * GRID // size,
        y1=top * GRID // size,
        x2=-(-right * GRID // size),  # rounded up, so that the box still covers the pixel
        y2=-(-bottom * GRID // size),
    )
