"""Retinal vessels of a fundus phantom: four arcades, each an artery and a vein, with two orders of branches.

All curves of one order are computed as one array, and each is drawn as one tapering polygon; a vessel tree
then costs less than a millisecond.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from data_pipeline.datasets.phantom.anatomy import Eye
from data_pipeline.datasets.phantom.canvas import Array, Pen, Points, normals

_TRUNKS = 8  # rows: superior temporal vein, artery, inferior temporal vein, artery, then the nasal four
_SHOOTS = (5, 5, 5, 5, 3, 3, 3, 3)  # branches of each trunk
_PARENT = np.repeat(np.arange(_TRUNKS), _SHOOTS)  # trunk of each branch
_ORDER = np.concatenate([np.arange(s) for s in _SHOOTS])  # number of each branch on its trunk
_IS_VEIN = np.arange(_TRUNKS) % 2 == 0
_DEPTH = np.where(_IS_VEIN, 255, 165)  # grey level drawn: how much light the vessel takes
_WIDTH = np.where(_IS_VEIN, 0.043, 0.033)
_DRAWN = np.argsort(_IS_VEIN, kind="stable")  # arteries first: at crossings the vein stays whole
_KNOTS = {"trunk": 22, "branch": 10, "twig": 7}  # points of a curve


@functools.cache
def _line(count: int) -> Points:
    return np.linspace(0, 1, count)


@functools.cache
def _bernstein(count: int) -> Points:
    t = _line(count)
    return np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)


def draw_vessels(rng: np.random.Generator, eye: Eye, size: int) -> Array:
    """Coverage [S, S] of the vessels, 0 to 1; veins are near 1, arteries and twigs weaker."""
    pen = Pen(size)
    scale = 0.82 if eye.modality == "UWF" else 1.0
    trunks = _trunks(rng, eye)
    many = len(_PARENT)
    at = 0.12 + 0.8 * (_ORDER + rng.random(many)) / np.asarray(_SHOOTS)[_PARENT]
    branches = _shoots(
        rng, eye, trunks, _PARENT, at, 0.62 if eye.modality == "CFP" else 0.4, _KNOTS["branch"]
    )
    twigs = _shoots(
        rng, eye, branches, np.arange(many), rng.uniform(0.2, 0.6, many), 0.42 * scale, _KNOTS["twig"]
    )

    def taper(start: Points, share: float, count: int) -> Points:
        return start[:, None] * (1 - (1 - share) * _line(count))

    def levels(share: float) -> list[int]:
        return (_DEPTH[_PARENT] * share).astype(int).tolist()

    thin = np.full(many, 0.017 * scale)
    pen.ribbons(eye.place(twigs), taper(thin, 0.75, _KNOTS["twig"]), levels(0.55))
    pen.ribbons(
        eye.place(branches), taper(0.58 * scale * _WIDTH[_PARENT], 0.5, _KNOTS["branch"]), levels(0.85)
    )
    wide = taper(scale * _WIDTH, 0.5, _KNOTS["trunk"])
    pen.ribbons(eye.place(trunks)[_DRAWN], wide[_DRAWN], _DEPTH[_DRAWN].tolist())
    return pen.coverage()


def _trunks(rng: np.random.Generator, eye: Eye) -> Points:
    """The eight trunks [8, K, 2], veins in even rows, from the disc outwards in canonical coordinates."""
    wide = eye.modality == "UWF"
    (dx, dy), fx, a = eye.disc, eye.fovea[0], eye.arcade
    end = (-0.98 if wide else -1.05) - dx
    rise = 1.9 if wide else 0.75  # where the temporal arcades leave the field, in arcade heights
    reach = (1.05 if wide else 1.15) - dx
    rows = []
    for up in (-a, a):
        rows += [[(0, 0), (-0.06, up), (fx - dx + 0.1, 1.62 * up), (end, rise * up)]] * 2
    for up in (-a, a):
        rows += [[(0, 0), (0.10, 0.45 * up), (0.35 * reach, 0.75 * up), (reach, 1.15 * up)]] * 2
    control = np.asarray(rows, dtype=np.float64) + np.asarray([dx + 0.012, dy])
    loose = np.asarray([0.012, 0.09, 0.12, 0.22]) * (0.6 if wide else 1.0)
    control += rng.uniform(-1, 1, control.shape) * loose[None, :, None]
    curves = _bernstein(_KNOTS["trunk"]) @ control
    return curves + _wobble(rng, curves, 0.010 if wide else 0.014)


def _wobble(rng: np.random.Generator, curves: Points, size: float) -> Points:
    """A tortuous sideways offset [M, K, 2] that grows from nothing at the start of each curve."""
    t = _line(curves.shape[1])
    phase, pace = rng.random((2, len(curves), 1))
    wave = size * np.sin(2 * np.pi * (phase + (1.6 + 1.8 * pace) * t)) * np.minimum(1, 4 * t)
    return wave[..., None] * normals(curves)


def _shoots(
    rng: np.random.Generator,
    eye: Eye,
    parents: Points,
    row: NDArray[np.int64],
    at: Points,
    length: float,
    count: int,
) -> Points:
    """Curves [N, count, 2] that leave `parents` [M, K, 2] at `row` and fraction `at` [N], on both sides."""
    n, last = len(row), parents.shape[1] - 1
    knot = np.minimum((at * last).astype(np.int64), last - 1)
    origin = parents[row, knot]
    ahead = parents[row, knot + 1] - origin
    chance = rng.random((3, n))
    hand = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    lean = np.arctan2(ahead[:, 1], ahead[:, 0]) + hand * (0.45 + 0.5 * chance[0])
    way = np.stack([np.cos(lean), np.sin(lean)], axis=1)
    across = way[:, ::-1] * np.asarray([-1.0, 1.0])
    # Branches that point at the fovea end before it: the centre of the macula has no vessels.
    gap = np.asarray(eye.fovea) - origin
    free = np.sqrt(gap[:, 0] ** 2 + gap[:, 1] ** 2)
    facing = gap[:, 0] * way[:, 0] + gap[:, 1] * way[:, 1]
    long = length * (0.5 + 0.5 * chance[1])
    long = np.where(facing > 0.5 * free, np.minimum(long, 0.78 * free), long)
    bend = -hand * (0.6 * chance[2] - 0.1) * long
    t = _line(count)
    curves = (
        origin[:, None]
        + (long[:, None] * t)[..., None] * way[:, None]
        + (bend[:, None] * t * t)[..., None] * across[:, None]
    )
    return curves + _wobble(rng, curves, 0.008)
