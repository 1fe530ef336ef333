"""The lesions of a fundus phantom: where they go and how they are painted.

One function a finding. Each paints into the picture and returns the coverage that it drew, from which the
mask is taken. Sizes follow what a small network could still see at 112 pixels (half the image side is 1):
nothing is thinner than one final pixel. Blood absorbs light (the picture is multiplied), deposits reflect it
(the picture is mixed with their colour).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.datasets.phantom.anatomy import Eye
from data_pipeline.datasets.phantom.canvas import Array, Pen, absorb, blend, slab, stamp
from data_pipeline.datasets.phantom.rules import QUADRANTS

_BLOOD = {"CFP": (0.46, 0.78, 0.72), "UWF": (0.56, 0.80, 0.62)}
_DOT = {"CFP": (0.40, 0.72, 0.66), "UWF": (0.50, 0.74, 0.55)}
_FRESH = {"CFP": (0.15, 0.82, 0.72), "UWF": (0.22, 0.80, 0.58)}  # new vessels: redder than the old ones
_EXUDATE = {"CFP": (1.02, 0.94, 0.50), "UWF": (1.0, 1.0, 0.48)}
_WOOL = {"CFP": (0.99, 0.93, 0.84), "UWF": (0.86, 0.92, 0.62)}
_DRUSE = {"CFP": (0.99, 0.82, 0.46), "UWF": (0.88, 0.86, 0.40)}
_TRIES = 24


@dataclass(slots=True)
class Scene:
    """The picture being painted, and what limits where a lesion may go."""

    eye: Eye
    rng: np.random.Generator
    picture: Array  # planar [3, S, S]
    vessels: Array  # coverage [S, S]
    light: Array  # illumination [S, S] times exposure: colours of deposits are scaled by it
    taken: list[tuple[float, float, float]] = field(
        default_factory=list
    )  # x, y, radius of what is there already

    @property
    def size(self) -> int:
        return self.vessels.shape[0]

    @property
    def scale(self) -> float:
        """Lesions of a wide field are drawn a little smaller, but never below the visible."""
        return 0.9 if self.eye.modality == "UWF" else 1.0

    def empty(self) -> Array:
        return np.zeros((self.size, self.size), dtype=np.float32)

    def place(
        self, count: int, radius: float, draw: Callable, *, vessels: bool = False
    ) -> list[tuple[float, float]]:
        """`count` free places for lesions of `radius`; `draw(n)` proposes image points [n, 2].

        A place is free inside the field, off the disc, off earlier lesions and, unless `vessels`, off
        vessels. When nothing is free after a few tries the demands are dropped, the field's edge last:
        lesions are never left out.
        """
        found = []
        offers = draw(count * _TRIES).reshape(count, _TRIES, 2).tolist()
        for proposals in offers:
            best, least = proposals[0], 9
            for x, y in proposals:
                worst = self._obstacles(x, y, radius, vessels)
                if worst < least:
                    best, least = (x, y), worst
                if worst == 0:
                    break
            found.append((best[0], best[1]))
            self.taken.append((best[0], best[1], radius))
        return found

    def _obstacles(self, x: float, y: float, radius: float, vessels: bool) -> int:
        """0 for a free place; the worse the higher."""
        if not self.eye.inside(x, y, 0.96 - radius):
            return 8
        for a, b, r in self.taken:
            dx, dy, near = x - a, y - b, radius + r + 0.015
            if dx * dx + dy * dy < near * near:
                return 2
        if vessels:
            return 0
        row, col = int((y + 1) / 2 * self.size), int((x + 1) / 2 * self.size)
        return int(self.vessels[row, col] > 0.25)

    def everywhere(self, n: int) -> Array:
        """Proposals over the field, a little denser at the posterior pole."""
        cx, cy, rx, ry = self.eye.field
        angle, share = self.rng.random((2, n))
        share = 0.88 * share**0.6
        return np.stack(
            [cx + rx * share * np.cos(2 * np.pi * angle), cy + ry * share * np.sin(2 * np.pi * angle)], 1
        )

    def around(self, centre: tuple[float, float], low: float, high: float) -> Callable:
        """Proposals in a ring around an image point."""

        def draw(n: int) -> Array:
            angle = 2 * np.pi * self.rng.random(n)
            reach = np.sqrt(low * low + (high * high - low * low) * self.rng.random(n))
            return np.stack([centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)], axis=1)

        return draw

    def quadrant(self, k: int) -> Callable:
        """Proposals in quadrant k of the image (bit 0: right half, bit 1: lower half)."""
        signs = np.asarray([1 if k & 1 else -1, 1 if k & 2 else -1])

        def draw(n: int) -> Array:
            return np.abs(self.everywhere(n)) * signs + 0.02 * signs

        return draw


def _spread(scene: Scene, n: int, size: float = 0.12) -> Array:
    """Random outlines for `stamp`."""
    return scene.rng.uniform(-size, size, (n, 4))


def microaneurysm(scene: Scene, count: int) -> Array:
    """Small round red dots; the smallest lesion there is."""
    places = scene.place(count, 0.035, scene.everywhere)
    radius = scene.rng.uniform(0.023, 0.031, count)
    cover = scene.empty()
    stamp(cover, np.asarray(places), np.stack([radius, radius], 1), np.zeros(count), soft=1.0)
    absorb(scene.picture, cover, _DOT[scene.eye.modality])
    return cover


def haemorrhage(scene: Scene, count: int, *, everywhere: bool = False) -> Array:
    """Blots and flames; with `everywhere` (severe NPDR) a quarter of them in each quadrant of the image."""
    if everywhere:
        each = count // QUADRANTS
        places = [
            p for k in range(QUADRANTS) for p in scene.place(each, 0.055, scene.quadrant(k), vessels=True)
        ]
    else:
        places = scene.place(count, 0.06, scene.everywhere, vessels=True)
    n, rng = len(places), scene.rng
    centres = np.asarray(places)
    flame = rng.random(n) < 0.4
    blot = rng.uniform(0.038, 0.066, n) * scene.scale
    long = rng.uniform(0.065, 0.10, n) * scene.scale
    radii = np.where(
        flame[:, None], np.stack([long, 0.3 * long], 1), np.stack([blot, blot * rng.uniform(0.7, 1, n)], 1)
    )
    # Flames lie in the nerve fibre layer, so they point away from the disc.
    from_disc = centres - np.asarray(scene.eye.spot(scene.eye.disc))
    angles = np.arctan2(from_disc[:, 1], from_disc[:, 0]) + rng.uniform(-0.35, 0.35, n)
    cover = scene.empty()
    stamp(cover, centres, np.maximum(radii, 0.022), angles, soft=1.3, lobes=_spread(scene, n, 0.09))
    absorb(scene.picture, cover, _BLOOD[scene.eye.modality])
    return cover


def hard_exudate(scene: Scene, clusters: int) -> Array:
    """Sharp yellow flecks in clusters or rings around the macula."""
    rng, fovea = scene.rng, scene.eye.spot(scene.eye.fovea)
    cover = scene.empty()
    for _ in range(clusters):
        reach = float(rng.uniform(0.10, 0.17)) * scene.scale
        (centre,) = scene.place(1, reach * 0.8, scene.around(fovea, 0.12, 0.42 * scene.scale), vessels=True)
        n = int(rng.integers(10, 20))
        ring = rng.random() < 0.5
        angle = 2 * np.pi * ((np.arange(n) + rng.random(n)) / n if ring else rng.random(n))
        far = reach * (rng.uniform(0.8, 1.1, n) if ring else np.sqrt(rng.random(n)))
        centres = np.stack([centre[0] + far * np.cos(angle), centre[1] + far * np.sin(angle)], 1)
        radius = rng.uniform(0.018, 0.034, n)
        radii = np.stack([radius, radius * rng.uniform(0.8, 1.0, n)], 1)
        stamp(cover, centres, radii, angle, soft=0.9, lobes=_spread(scene, n))
    blend(
        scene.picture, 0.92 * cover, np.asarray(_EXUDATE[scene.eye.modality]).reshape(3, 1, 1) * scene.light
    )
    return cover


def cotton_wool_spot(scene: Scene, count: int) -> Array:
    """Fluffy white patches with soft edges, near the arcades."""
    rng = scene.rng
    disc = scene.eye.spot(scene.eye.disc)
    places = scene.place(count, 0.09, scene.around(disc, 0.26, 0.85 * scene.scale), vessels=True)
    long = rng.uniform(0.065, 0.095, count) * scene.scale
    radii = np.stack([long, long * rng.uniform(0.6, 0.85, count)], 1)
    cover = scene.empty()
    soft = max(2.0, 0.05 * scene.size / 2)
    stamp(
        cover,
        np.asarray(places),
        radii,
        rng.uniform(0, np.pi, count),
        soft=soft,
        lobes=_spread(scene, count, 0.09),
    )
    blend(scene.picture, 0.88 * cover, np.asarray(_WOOL[scene.eye.modality]).reshape(3, 1, 1) * scene.light)
    return cover


def drusen(scene: Scene, count: int) -> Array:
    """Soft yellow mounds, larger and paler than exudates, scattered over the macula."""
    fovea = scene.eye.spot(scene.eye.fovea)
    wide = scene.eye.modality == "UWF"
    draw = scene.around(fovea, 0.03, 0.26 if wide else 0.40)
    places = scene.place(count, 0.03 if wide else 0.035, draw, vessels=True)
    radius = scene.rng.uniform(0.030, 0.048 if wide else 0.060, count)
    radii = np.stack([radius, radius * scene.rng.uniform(0.8, 1.0, count)], 1)
    cover = scene.empty()
    angles = scene.rng.uniform(0, np.pi, count)
    soft = max(1.6, 0.02 * scene.size / 2)
    stamp(cover, np.asarray(places), radii, angles, soft=soft, lobes=_spread(scene, count, 0.08))
    blend(scene.picture, 0.74 * cover, np.asarray(_DRUSE[scene.eye.modality]).reshape(3, 1, 1) * scene.light)
    return cover


def neovascularisation(scene: Scene, tufts: int) -> Array:
    """Lacy fans of fresh vessels, on the disc or elsewhere in the retina."""
    rng, pen = scene.rng, Pen(scene.size)
    disc = scene.eye.spot(scene.eye.disc)
    width = max(1.5, 0.018 * scene.size / 2)
    on_disc = rng.random() < 0.45
    for k in range(tufts):
        reach = float(rng.uniform(0.18, 0.24)) * (0.85 if scene.eye.modality == "UWF" else 1.0)
        if k == 0 and on_disc:
            centre = disc
            scene.taken.append((*disc, reach))
        else:
            (centre,) = scene.place(1, reach * 0.8, scene.around(disc, 0.3, 0.95 * scene.scale), vessels=True)
        for loop in _fan(rng, centre, reach):
            pen.line(loop, width)
    cover = pen.coverage()
    absorb(scene.picture, cover, _FRESH[scene.eye.modality])
    return cover


def _fan(rng: np.random.Generator, centre: tuple[float, float], reach: float) -> list[Array]:
    """Polylines [17, 2]: stems that curl back into loops out of one root, a tangle about 2 `reach` wide."""
    n = 7
    heading = 2 * np.pi * rng.random()
    root = np.asarray(centre) - 0.5 * reach * np.asarray([np.cos(heading), np.sin(heading)])
    t = np.linspace(0, 1, 17)
    away = heading + np.linspace(-1.7, 1.7, n) + rng.uniform(-0.25, 0.25, n)
    long = reach * rng.uniform(0.7, 1.25, n) * (1 - 0.15 * np.abs(np.linspace(-1.7, 1.7, n)))
    stem = np.minimum(1, 2.8 * t) * long[:, None]
    curl = 2 * np.pi * np.maximum(0, t - 0.2) / 0.8 * rng.choice([-1.0, 1.0], n)[:, None]
    wide = reach * rng.uniform(0.18, 0.36, n)[:, None]
    wave = 0.12 * reach * np.sin(2 * np.pi * (rng.random((n, 1)) + rng.uniform(1, 2.2, (n, 1)) * t)) * t
    along, across = stem - wide * (1 - np.cos(curl)), wide * np.sin(curl) + wave
    c, s = np.cos(away)[:, None], np.sin(away)[:, None]
    return list(root + np.stack([c * along - s * across, s * along + c * across], axis=-1))


def vitreous_haemorrhage(scene: Scene, _: int) -> Array:
    """A large, diffuse, dark red veil in the lower half, thick in the middle and cloudy at the rim."""
    rng, eye = scene.rng, scene.eye
    x, y = (
        float(rng.uniform(-0.45, 0.45)),
        float(rng.uniform(0.22, 0.5)) * (0.8 if eye.modality == "UWF" else 1),
    )
    n = 5
    centres = np.asarray([x, y]) + rng.uniform(-1, 1, (n, 2)) * np.asarray([0.24, 0.10])
    radii = np.stack([rng.uniform(0.20, 0.32, n), rng.uniform(0.13, 0.2, n)], 1)
    cover = scene.empty()
    stamp(
        cover, centres, radii, rng.uniform(-0.4, 0.4, n), soft=0.16 * scene.size / 2, lobes=_spread(scene, n)
    )
    cover *= np.clip(0.92 + 0.12 * slab("blotch", scene.size, *rng.random(2).tolist()), 0.62, 1)
    scene.taken += [(float(a), float(b), float(r)) for (a, b), (r, _) in zip(centres, radii, strict=True)]
    absorb(scene.picture, cover, (0.60, 0.90, 0.82))
    return cover


# In painting order: the veil claims its place first and is painted first, so that lesions keep clear of it.
PAINTERS: dict[str, Callable[[Scene, int], Array]] = {
    "vitreous haemorrhage": vitreous_haemorrhage,
    "neovascularisation": neovascularisation,
    "hard exudate": hard_exudate,
    "cotton-wool spot": cotton_wool_spot,
    "haemorrhage": haemorrhage,
    "microaneurysm": microaneurysm,
    "drusen": drusen,
}
