"""The print of a picture, by which its copies are known again: resized, recompressed, cropped, flipped,
rotated, brighter or darker.

All fundus photographs are bright discs on black; as small thumbnails two eyes correlate to 0.995, and the
usual perceptual hashes collide. So a picture is reduced to where the light is and to its local contrast,
SIFT keypoints are taken of that and of its mirror image, and two pictures are the same if one similarity
or affine map carries keypoints onto keypoints and the local contrast, laid over each other by it,
correlates. The thresholds were chosen on one half of the pictures and measured on the other (docs/log.md,
2026-11-28). Neighbours: `candidates` finds which pairs are worth comparing, `decontaminate` runs both over
data sets.

SIFT: Lowe 2004, doi:10.1023/B:VISI.0000029664.99615.94, as scikit-image computes it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.feature import SIFT
from skimage.filters import gaussian
from skimage.transform import warp

VERSION = 1  # of what a print holds; another one makes all prints again
SIDE = 320  # longest side at which keypoints are looked for, in pixels
POINTS = 200  # keypoints kept, the largest first: they survive reduction best
GREY = 112  # side of the thumbnail in which two pictures are laid over each other
PLAIN, MIRRORED = 0, 1

ALIKE = 0.8  # cosine of two descriptors from which they may show the same spot
FEWEST = 4  # spots that one map must explain
TRIES = 3  # maps that are tried for each side
ROUGH, FINE = 0.04, 0.015  # how far a spot may lie from where a map puts it, in longest sides
LARGEST = 4.0  # a map that enlarges more than this is none
# Spots that a map must explain -> correlation of local contrast that makes two pictures one eye.
# Different eyes reached 0.31 among photographs and, among drawn OCT scans, 0.68 with 9 spots and 0.64 with
# 12; other photographs of one eye 0.58 to 0.93 with 32 spots and more, copies 0.71 with 13 but for one of
# 820. Above SAME_PICTURE it is one photograph.
SAME_EYE = {10: 0.68, 20: 0.45}
SAME_PICTURE = 0.95
SMALLEST = 0.1  # share of the coarser picture over which the other must lie

# What is compared: `count` keypoints of the picture and of its mirror image, `points` (x, y, size in
# units of the longest side; angle in radians), their descriptors, the thumbnail, and the picture's sides
# in those units.
PRINT = np.dtype(
    [
        ("count", "u2", 2),
        ("points", "f4", (2, POINTS, 4)),
        ("descriptors", "u1", (2, POINTS, 128)),
        ("grey", "u1", (GREY, GREY)),
        ("sides", "f4", 2),
    ]
)

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Match:
    """How alike two pictures are: keypoints that one map explains, correlation of what lies over each other
    then, and the share of the smaller picture that does."""

    points: int
    correlation: float
    overlap: float
    mirrored: bool


NO_MATCH = Match(0, 0.0, 0.0, False)


def fingerprint(image: Image.Image) -> NDArray[np.void]:
    """The print of an RGB picture: one record () of `PRINT`.

    A picture without any structure has a print without keypoints, which is like no other.
    """
    image = _lit(image)
    record = np.zeros((), PRINT)
    longest = max(image.size)
    record["sides"] = np.divide(image.size, longest)
    record["grey"] = _green(image, (GREY, GREY))
    shape = [max(16, round(SIDE * side / longest)) for side in image.size]
    flat = _contrast(_green(image, (shape[0], shape[1])).astype(np.float32))
    for side, picture in ((PLAIN, flat), (MIRRORED, flat[:, ::-1])):
        points, descriptors = _keypoints(picture)
        record["count"][side] = len(points)
        record["points"][side, : len(points)] = points
        record["descriptors"][side, : len(points)] = descriptors
    return record


def inside(grey: Floats) -> NDArray[np.bool_]:
    """Where the picture is lit, and not the black around the retina: relative, as brightness may differ."""
    low, high = np.percentile(grey, (0.5, 95))
    return grey > low + 0.1 * max(high - low, 1e-3)


def _lit(image: Image.Image) -> Image.Image:
    """The picture without its black margins."""
    scale = max(image.size) / 256
    small = image.convert("L").resize(
        [max(1, round(side / scale)) for side in image.size], Image.Resampling.BOX
    )
    lit = inside(np.asarray(small, np.float32))
    rows, columns = (np.flatnonzero(lit.mean(axis=axis) > 0.02) for axis in (1, 0))
    if min(len(rows), len(columns)) < 32:  # nothing that could be a retina
        return image
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    box = (int(left * scale), int(top * scale), int(right * scale), int(bottom * scale))
    return image.crop((*box[:2], min(image.width, box[2]), min(image.height, box[3])))


def _green(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The green channel, in which vessels show best, at (width, height) `size`."""
    reduced = image.width > size[0]
    green = image.getchannel("G") if image.mode == "RGB" else image.convert("L")
    return np.asarray(green.resize(size, Image.Resampling.BOX if reduced else Image.Resampling.BICUBIC))


def _contrast(grey: Floats, sigma: float = SIDE / 40, mask: NDArray[np.bool_] | None = None) -> Floats:
    """Grey values [H, W] less their surroundings' mean, over their deviation; 0 where it is dark."""
    lit = (inside(grey) if mask is None else mask).astype(np.float32)
    weight = np.maximum(gaussian(lit, sigma), 1e-3)
    rest = (grey - gaussian(grey * lit, sigma) / weight) * lit
    spread = np.sqrt(gaussian(rest * rest, sigma) / weight)
    floor = 0.3 * np.sqrt((rest * rest).sum() / max(lit.sum(), 1)) + 1e-4
    return rest / (spread + floor)


def _keypoints(flat: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """The largest keypoints [n, 4] of a picture of local contrast, away from its dark parts; descriptors."""
    sift = SIFT(upsampling=1, c_dog=0.01)
    try:
        sift.detect_and_extract(np.clip(flat / 8 + 0.5, 0, 1).astype(np.float32))
    except RuntimeError:  # scikit-image's way to say that there is no keypoint
        return np.zeros((0, 4), np.float32), np.zeros((0, 128), np.uint8)
    places, sizes, angles, descriptors = map(
        np.asarray, (sift.positions, sift.sigmas, sift.orientations, sift.descriptors)
    )
    rows, columns = places.round().astype(int).T
    free = np.flatnonzero(gaussian((flat != 0).astype(np.float32), SIDE / 40)[rows, columns] > 0.8)
    chosen = free[np.argsort(-sizes[free], kind="stable")][:POINTS]
    longest = max(flat.shape)
    points = np.c_[(places[chosen, ::-1] + 0.5) / longest, sizes[chosen] / longest, angles[chosen]]
    return points.astype(np.float32), descriptors[chosen]


def kind(match: Match) -> str:
    """What a match means: "same picture", "same eye" (on another photograph, or on a copy that was changed so
    much that this can not be told), or "" for two eyes."""
    if not any(match.points >= spots and match.correlation >= least for spots, least in SAME_EYE.items()):
        return ""
    return "same picture" if match.correlation >= SAME_PICTURE else "same eye"


def compare(one: NDArray[np.void], other: NDArray[np.void]) -> Match:
    """Lay one picture over the other, as it is and mirrored, and say how alike they are."""
    best = NO_MATCH
    for side in (PLAIN, MIRRORED):
        for points, affine in _maps(one, other, side):
            correlation, overlap = _correlation(one, other, side, affine)
            if correlation > best.correlation:
                best = Match(points, correlation, overlap, side == MIRRORED)
    return best


def _maps(one: NDArray[np.void], other: NDArray[np.void], side: int) -> list[tuple[int, Floats]]:
    """The likeliest affine maps [3, 2] from `one` to the `side` of `other`, with the keypoints they explain.

    A single pair of keypoints says by position, size and angle how all of one picture would lie in the
    other; the pair that most others agree with wins, and its map is fitted to them.
    """
    a, b = _paired(one, other, side)
    if len(a) < FEWEST:
        return []
    scale, turn = b[:, 2] / a[:, 2], b[:, 3] - a[:, 3]
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    away = a[None, :, :2] - a[:, None, :2]  # [M, M, 2] from the pair that tells to the pair that is told
    x = cos[:, None] * away[..., 0] - sin[:, None] * away[..., 1] + b[:, None, 0]
    y = sin[:, None] * away[..., 0] + cos[:, None] * away[..., 1] + b[:, None, 1]
    agree = np.hypot(x - b[:, 0], y - b[:, 1]) < ROUGH  # [M, M]
    found: list[tuple[int, Floats]] = []
    for first in np.argsort(-agree.sum(axis=1), kind="stable")[:TRIES]:
        fitted = _fitted(a[:, :2], b[:, :2], agree[first])
        if fitted and not any(np.allclose(fitted[1], known, atol=0.01) for _, known in found):
            found.append(fitted)
    return found


def _paired(one: NDArray[np.void], other: NDArray[np.void], side: int) -> tuple[Floats, Floats]:
    """Keypoints [M, 4] of either picture that are each other's nearest."""
    n, m = int(one["count"][PLAIN]), int(other["count"][side])
    if min(n, m) == 0:
        return np.zeros((0, 4)), np.zeros((0, 4))
    near = unit(one["descriptors"][PLAIN, :n]) @ unit(other["descriptors"][side, :m]).T
    there = near.argmax(axis=1)
    here = np.flatnonzero((near.argmax(axis=0)[there] == np.arange(n)) & (near.max(axis=1) > ALIKE))
    return one["points"][PLAIN][here], other["points"][side][there[here]]


def unit(descriptors: NDArray[np.uint8]) -> Floats:
    """Descriptors [n, 128] as vectors of length one."""
    vectors = descriptors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _fitted(a: Floats, b: Floats, chosen: NDArray[np.bool_]) -> tuple[int, Floats] | None:
    """The affine map of the `chosen` pairs [M] by least squares, fitted again to those that it explains."""
    affine = np.zeros((3, 2))
    for bound in (ROUGH, FINE, FINE):
        spots = len(np.unique(a[chosen].round(3), axis=0))  # one spot may have several angles
        if spots < FEWEST:
            return None
        extended = np.c_[a, np.ones(len(a))]
        affine = np.linalg.lstsq(extended[chosen], b[chosen], rcond=None)[0]
        chosen = np.linalg.norm(extended @ affine - b, axis=1) < bound
    spots = len(np.unique(a[chosen].round(3), axis=0))
    stretch = np.linalg.svd(affine[:2], compute_uv=False)
    sound = stretch[1] > 1 / LARGEST and stretch[0] < min(LARGEST, 2 * stretch[1])
    if (
        spots < FEWEST or not sound or np.linalg.det(affine[:2]) < 0
    ):  # a mirror image is laid on by its own side
        return None
    return spots, affine


def _correlation(
    one: NDArray[np.void], other: NDArray[np.void], side: int, affine: Floats
) -> tuple[float, float]:
    """Correlation of local contrast where the pictures lie over each other, and how much of them does."""
    a = one["grey"].astype(np.float32)
    b = (other["grey"][:, ::-1] if side == MIRRORED else other["grey"]).astype(np.float32)
    units = [_units(record["sides"]) for record in (one, other)]
    pixels = np.linalg.inv(units[1]) @ np.c_[affine, [0, 0, 1]].T @ units[0]  # on columns (x, y, 1)
    scale = np.sqrt(abs(np.linalg.det(pixels[:2, :2])))
    if scale < 1:  # the coarser picture gives the grid
        a, b, pixels, scale = b, a, np.linalg.inv(pixels), 1 / scale
    laid = warp(gaussian(b, 0.5 * scale), pixels, output_shape=a.shape, order=1, cval=-1, preserve_range=True)
    a = gaussian(a, 0.5)
    both = (laid >= 0) & inside(a)
    if both.mean() < SMALLEST:
        return 0.0, float(both.mean())
    both &= laid > np.percentile(laid[both], 0.5)
    sigma = GREY / 28 * np.sqrt(both.mean())
    core = both & (gaussian(both.astype(np.float32), 1.5) > 0.9)
    if core.sum() < 64:
        return 0.0, float(both.mean())
    x, y = (_contrast(picture, sigma, both)[core] for picture in (a, laid))
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0, float(both.mean())


def _units(sides: Floats) -> Floats:
    """The map [3, 3] from a thumbnail's pixel indices (x, y, 1) to units of the picture's longest side."""
    x, y = sides / GREY
    return np.array([[x, 0, x / 2], [0, y, y / 2], [0, 0, 1]])
