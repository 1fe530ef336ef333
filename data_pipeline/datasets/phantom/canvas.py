"""Shared drawing tools of the phantom renderer: coordinates, cached noise, lesion stamps, blending.

The other modules of this package say *what* is drawn; this one knows how to put it on pixels fast enough for
hundreds of images a second on one core. Unit coordinates are used throughout: the image spans [-1, 1] in x
(to the right) and y (downwards), so a length of 1 is half the image side whatever the size.

Whole frames see only additions, multiplications, divisions, square roots and comparisons, which IEEE 754
fixes to the last bit. Sines and exponentials in single precision differ between instruction sets, and would
make the same phantom differ between machines; they appear only in the double-precision geometry of a few
points.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[Any]  # float32, but numpy's stubs lose sight of that in sums with Python numbers
Mask = NDArray[np.bool_]
Points = NDArray[Any]  # float64: geometry

OVERSAMPLE = 2  # polygons and lines are drawn at this multiple of the final size
_TEXTURE_SEED = 20250  # the textures are constants of the renderer, not of a phantom


@functools.lru_cache(maxsize=8)
def grid(size: int) -> tuple[Array, Array]:
    """Unit coordinates of the pixel centres: x [1, S] and y [S, 1]."""
    line = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)
    return line[None, :], line[:, None]


def _smooth_noise(rng: np.random.Generator, cells: tuple[int, int], size: int) -> NDArray[np.float64]:
    """Zero-mean, unit-variance noise [S, S] with about `cells` (rows, columns) features across the frame."""
    coarse = Image.fromarray(rng.standard_normal(cells).astype(np.float32))
    fine = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    return (fine - fine.mean()) / fine.std()


def _quantised(texture: NDArray[np.float64]) -> Array:
    """Round to multiples of 2^-10: the last bit of mean() and std() may differ between machines."""
    return (np.round(texture * 1024) / 1024).astype(np.float32)


@functools.lru_cache(maxsize=8)
def textures(size: int) -> dict[str, Array]:
    """Constant noise textures [T, T], T about 1.5 S, of which `slab` cuts a random S by S piece.

    grain: sensor noise. speckle: OCT speckle (>= -1). blotch: patches of pigment. mesh: ridges between
    choroidal vessels, in [0, 1]. choroid: flat, wide blobs of a B-scan's choroid.
    """
    side = size + size // 2
    scale = max(1.0, size / 168)  # noise of a larger picture keeps a similar grain relative to the retina

    def rng(k: int) -> np.random.Generator:
        return np.random.default_rng([_TEXTURE_SEED, k])

    fine = int(side / scale)
    grain = _smooth_noise(rng(0), (fine, fine), side)
    raw = [_smooth_noise(rng(k), (fine, fine), side) for k in (1, 2, 3)]
    power = (raw[0] ** 2 + raw[1] ** 2 + raw[2] ** 2) / 3  # few-look speckle: chi-square with three terms
    blotch = sum(_smooth_noise(rng(10 + n), (n, n), side) * (6 / n) for n in (6, 12, 30))
    ridges = np.abs(_smooth_noise(rng(20), (26, 20), side)) + 0.5 * np.abs(
        _smooth_noise(rng(21), (50, 40), side)
    )
    choroid = _smooth_noise(rng(30), (26, 15), side) + 0.6 * _smooth_noise(rng(31), (50, 30), side)
    made = {
        "grain": grain,
        "speckle": np.sqrt(power) / np.sqrt(power).mean() - 1,
        "blotch": blotch / np.std(blotch),
        "mesh": np.clip(1 - ridges, 0, 1),
        "choroid": choroid / np.std(choroid),
    }
    return {name: _quantised(np.asarray(value)) for name, value in made.items()}


def slab(name: str, size: int, u: float, v: float, flips: int = 0) -> Array:
    """A piece [S, S] of a texture: (u, v) in [0, 1) say where it is cut, the bits of `flips` mirror it."""
    texture = textures(size)[name]
    play = texture.shape[0] - size
    top, left = int(u * play), int(v * play)
    piece = texture[top : top + size, left : left + size]
    return piece[:: -1 if flips & 1 else 1, :: -1 if flips & 2 else 1]


def window(size: int, centre: Sequence[float], reach: float) -> tuple[slice, slice, Array, Array]:
    """Rows, columns and offsets (dx [1, w], dy [h, 1]) of the square patch within `reach` of `centre`."""
    x, y = grid(size)
    lows = [max(0, int((c - reach + 1) * size / 2)) for c in centre[:2]]
    highs = [min(size, int((c + reach + 1) * size / 2) + 2) for c in centre[:2]]
    cols, rows = slice(lows[0], highs[0]), slice(lows[1], highs[1])
    return rows, cols, x[:, cols] - np.float32(centre[0]), y[rows] - np.float32(centre[1])


def bell(squared: Array) -> Array:
    """A rational bump of the squared distance (in widths): 1 at the centre, 1/4 at one width, a soft tail."""
    squared = squared + np.float32(1)
    return np.float32(1) / (squared * squared)


def stamp(
    cover: Array,
    centres: Points,
    radii: Points,
    angles: Points,
    soft: float = 1.0,
    lobes: Points | None = None,
) -> None:
    """Draw N soft, optionally lobed ellipses into `cover` [S, S] (0 to 1, the maximum wins).

    Args:
        cover: coverage, changed in place.
        centres: [N, 2] in unit coordinates.
        radii: [N, 2] half-axes in unit coordinates.
        angles: [N] direction of the first half-axis, radians, clockwise on screen (y points down).
        soft: width of the edge in final pixels (1 is an anti-aliased edge, more is a blur).
        lobes: [N, 4] amplitudes of cos 2t, sin 2t, cos 3t, sin 3t in the outline, or None for plain ellipses.
    """
    size = cover.shape[0]
    half = size / 2
    reach = int(np.ceil(radii.max() * half * (1.0 if lobes is None else 1.4) + soft / 2 + 1))
    place = (centres + 1) * half - 0.5
    whole = np.rint(place).astype(np.int64)
    steps = np.arange(-reach, reach + 1, dtype=np.float32)
    rest = (place - whole).astype(np.float32)
    dx = steps[None, None, :] - rest[:, 0, None, None]
    dy = steps[None, :, None] - rest[:, 1, None, None]
    c, s = (f(angles).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    inverse = (1 / (radii * half)).astype(np.float32)
    u = (c * dx + s * dy) * inverse[:, 0, None, None]
    v = (c * dy - s * dx) * inverse[:, 1, None, None]
    distance = np.sqrt(u * u + v * v)
    edge = np.float32(1) if lobes is None else _outline(u, v, distance, lobes.astype(np.float32))
    gain = (radii.min(axis=1) * half / soft).astype(np.float32)[:, None, None]
    alpha = np.clip((edge - distance) * gain + np.float32(0.5), 0, 1)
    for patch, (col, row) in zip(alpha, whole.tolist(), strict=True):
        top, left = row - reach, col - reach
        y0, x0 = max(0, -top), max(0, -left)
        y1, x1 = min(2 * reach + 1, size - top), min(2 * reach + 1, size - left)
        if y1 > y0 and x1 > x0:
            target = cover[top + y0 : top + y1, left + x0 : left + x1]
            np.maximum(target, patch[y0:y1, x0:x1], out=target)


def _outline(u: Array, v: Array, distance: Array, lobes: Array) -> Array:
    """Radius of a lobed outline in the direction of (u, v); multiple angles by the addition theorems."""
    safe = distance + np.float32(1e-6)
    c, s = u / safe, v / safe
    cc, ss = c * c - s * s, 2 * c * s
    a = lobes[:, :, None, None]
    return 1 + a[:, 0] * cc + a[:, 1] * ss + a[:, 2] * (c * cc - s * ss) + a[:, 3] * (s * cc + c * ss)


def normals(curves: Points) -> Points:
    """Unit vectors across the curves [M, K, 2], by central differences."""
    along = np.empty_like(curves)
    along[:, 1:-1] = curves[:, 2:] - curves[:, :-2]
    along[:, 0] = curves[:, 1] - curves[:, 0]
    along[:, -1] = curves[:, -1] - curves[:, -2]
    along /= np.sqrt(along[..., :1] ** 2 + along[..., 1:] ** 2) + 1e-12
    across = along[..., ::-1].copy()
    across[..., 0] *= -1
    return across


class Pen:
    """Polygons and polylines in unit coordinates on an oversampled 8-bit canvas."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE))
        self.draw = ImageDraw.Draw(self.image)

    def pixels(self, points: Points) -> Points:
        """Unit coordinates [..., 2] to canvas pixels."""
        return (points + 1) * (self.size * OVERSAMPLE / 2) - 0.5

    def ribbons(self, curves: Points, widths: Points, levels: Sequence[int]) -> None:
        """Draw M tapering curves: points [M, K, 2] and full widths [M, K] in units, grey levels [M]."""
        # Pillow fills the outline's own pixels too, which widens a polygon by about one canvas pixel.
        thick = np.maximum(widths * (self.size * OVERSAMPLE / 2) - 1.0, 0.0)[..., None] / 2
        side = normals(curves) * thick
        middle = self.pixels(curves)
        count = curves.shape[1]
        ring = np.empty((len(curves), 2 * count, 2))
        ring[:, :count] = middle + side
        ring[:, count:] = (middle - side)[:, ::-1]
        for flat, level in zip(ring.reshape(len(ring), -1).tolist(), levels, strict=True):
            self.draw.polygon(flat, fill=level)

    def line(self, points: Points, width: float) -> None:
        """One polyline [K, 2] at full strength; `width` is in final pixels."""
        flat = self.pixels(points).reshape(-1).tolist()
        self.draw.line(flat, fill=255, width=max(1, round(width * OVERSAMPLE)))

    def coverage(self) -> Array:
        """What was drawn, averaged to the final size: [S, S] in 0 to 1."""
        return np.asarray(self.image.reduce(OVERSAMPLE), dtype=np.float32) * np.float32(1 / 255)


def triple(values: Sequence[float] | NDArray[np.floating]) -> Array:
    """Three numbers as [3, 1, 1], to broadcast over a planar picture [3, S, S]."""
    return np.asarray(values, dtype=np.float32).reshape(3, 1, 1)


def blend(picture: Array, alpha: Array, colour: Sequence[float] | Array) -> None:
    """Mix `colour` (three numbers, or [3, S, S]) into the picture [3, S, S] in place, by alpha [S, S]."""
    change = (colour if isinstance(colour, np.ndarray) and colour.ndim == 3 else triple(colour)) - picture
    change *= alpha
    picture += change


def absorb(picture: Array, alpha: Array, share: Sequence[float]) -> None:
    """Take `share` of each channel's light away in place, by alpha [S, S]; a share below 0 adds light."""
    picture *= 1 - alpha * triple(share)


def to_bytes(picture: Array) -> NDArray[np.uint8]:
    """Planar float [3, S, S] in 0 to 1 to an image uint8 [S, S, 3]."""
    scaled = np.clip(picture * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(1, 2, 0))
