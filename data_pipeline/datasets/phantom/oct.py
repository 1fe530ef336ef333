"""OCT phantoms: one B-scan through the fovea, as grey levels in three equal channels.

The retina is a stack of surfaces, each a curve over the columns; a pixel's reflectivity is a sum of soft
steps from surface to surface. Fluid and deposits move the surfaces: a detachment lifts everything above it,
drusen lift the outer layers only (the inner limiting membrane stays smooth), cysts thicken the retina that
holds them.

Lengths are fractions of the image height (y, downwards) and half the image width (x, from -1 to 1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.datasets.phantom.canvas import Array, Mask, grid, slab, stamp, to_bytes

# Depth of each surface below the inner limiting membrane as a share of the retina: in the periphery and at
# the fovea. Between them: nerve fibres, ganglion cells, inner nuclei, outer plexus, outer nuclei (to the
# photoreceptors).
_SHARES = ((0.15, 0.0), (0.42, 0.04), (0.55, 0.08), (0.64, 0.14), (0.88, 0.82))
_LEVELS = (0.66, 0.44, 0.30, 0.45, 0.24, 0.40)  # reflectivity between the surfaces, top to bottom
_VITREOUS = 0.045
_FLUID = 0.07


@dataclass(frozen=True, slots=True)
class Dome:
    """A bump of a surface: centre and half-width in x, height in y."""

    centre: float
    width: float
    height: float

    def curve(self, x: Array) -> Array:
        """Height [1, S] over the columns x [1, S]: a parabola."""
        u = (x - np.float32(self.centre)) * np.float32(1 / self.width)
        return np.float32(self.height) * np.maximum(1 - u * u, 0)


@dataclass(frozen=True, slots=True)
class Surfaces:
    """Curves [1, S] in y, from top to bottom, and what lifted them."""

    inner: Array  # inner limiting membrane
    sensory: Array  # lower end of the neurosensory retina: the photoreceptors' tips
    pigment: Array  # retinal pigment epithelium
    bruch: Array  # Bruch's membrane, where the pigment epithelium lies in a healthy eye
    sclera: Array
    pit: Array  # 1 at the fovea, 0 in the periphery
    bumps: Array  # what drusen add, which the inner surfaces do not follow


def draw_scan(
    nuisance: np.random.Generator, chance: np.random.Generator, *, size: int, counts: dict[str, int]
) -> tuple[NDArray[np.uint8], dict[str, Mask], dict[str, float]]:
    """Paint one B-scan.

    Args:
        nuisance: stream of the healthy eye and the camera; independent of the label.
        chance: stream of the lesions.
        size: image side S in pixels.
        counts: how many of each finding, from `rules.draw_counts`.

    Returns:
        image uint8 [S, S, 3], masks [S, S] of the findings, and the anatomy (fractions of the image side).
    """
    u = nuisance.random(32).tolist()
    x = grid(size)[0]
    y = (grid(size)[1] + 1) * np.float32(0.5)
    fovea = -0.18 + 0.36 * u[0]
    domes = _domes(chance, counts, fovea)
    surfaces = _surfaces(u, x, fovea, domes, "intraretinal fluid" in counts)
    scan = _layers(u, x, y, surfaces, size)
    masks = _spaces(scan, y, surfaces, domes)
    if "intraretinal fluid" in counts:
        masks["intraretinal fluid"] = _cysts(
            chance, scan, surfaces, domes, counts["intraretinal fluid"], fovea
        )
    scan = _camera(u, x, y, scan, surfaces, size)
    column = int((fovea + 1) / 2 * size)
    anatomy = {
        "fovea_x": (fovea + 1) / 2,
        "fovea_y": float(surfaces.inner[0, column]),
        "retina_thickness": float(surfaces.bruch[0, 0] - surfaces.inner[0, 0]),
    }
    return to_bytes(np.broadcast_to(scan, (3, size, size))), masks, anatomy


def _domes(rng: np.random.Generator, counts: dict[str, int], fovea: float) -> dict[str, list[Dome]]:
    """Where the retina or its pigment epithelium is lifted."""
    domes: dict[str, list[Dome]] = {}
    if "pigment epithelial detachment" in counts:
        place = fovea + rng.uniform(-0.3, 0.3)
        domes["pigment epithelial detachment"] = [
            Dome(place, rng.uniform(0.28, 0.46), rng.uniform(0.085, 0.14))
        ]
    if "subretinal fluid" in counts:
        place, width, height = (
            fovea + rng.uniform(-0.2, 0.2),
            rng.uniform(0.28, 0.5),
            rng.uniform(0.06, 0.105),
        )
        if "pigment epithelial detachment" in domes:  # the fluid drapes over one flank of the detachment
            below = domes["pigment epithelial detachment"][0]
            place = below.centre + (1 if rng.random() < 0.5 else -1) * rng.uniform(0.5, 0.9) * below.width
        domes["subretinal fluid"] = [Dome(place, width, height)]
    if "drusen" in counts:
        many = counts["drusen"]
        slots = rng.permutation(11)[:many]
        domes["drusen"] = [
            Dome(
                fovea + (k - 5 + rng.uniform(-0.2, 0.2)) * 0.135,
                rng.uniform(0.09, 0.15),
                rng.uniform(0.030, 0.052),
            )
            for k in slots.tolist()
        ]
    return domes


def _surfaces(
    u: list[float], x: Array, fovea: float, domes: dict[str, list[Dome]], swollen: bool
) -> Surfaces:
    """All surfaces of one eye; `u` are its nuisance numbers in [0, 1)."""
    tilt, bow = np.float32(-0.06 + 0.12 * u[1]), np.float32(-0.07 + 0.10 * u[2])
    bruch = np.float32(0.60 + 0.12 * u[3]) + tilt * x + bow * (x - np.float32(fovea)) ** 2
    thick = np.float32(0.25 + 0.06 * u[4])
    v = (x - np.float32(fovea)) * np.float32(1 / (0.20 + 0.10 * u[5]))
    pit = 1 / (1 + v * v) ** 2

    def lift(name: str) -> Array:
        total = np.zeros_like(x)
        for dome in domes.get(name, []):
            np.maximum(total, dome.curve(x), out=total)
        return total

    detached = lift("pigment epithelial detachment")
    bumps = lift("drusen")
    # Fluid stands to a level of its own: over a detachment it fills what the detachment leaves free.
    sensory = np.maximum(detached, lift("subretinal fluid") + np.float32(0.35) * detached)
    depth = np.float32(0.62 - 0.10 * u[6])
    if swollen:
        depth = depth * np.float32(0.25)  # oedema flattens the pit
    inner = bruch - thick * (1 - depth * pit) - np.float32(0.75) * sensory
    if swollen:
        w = (x - np.float32(fovea)) * np.float32(1 / 0.55)
        inner = inner - np.float32(0.055) / (1 + w * w) ** 2
    choroid = np.float32(0.10 + 0.09 * u[7]) * (1 + np.float32(0.15) * np.float32(2 * u[8] - 1) * x)
    flat = pit * np.float32(0.4) if swollen else pit
    return Surfaces(inner, bruch - sensory, bruch - detached - bumps, bruch, bruch + choroid, flat, bumps)


def _step(y: Array, curve: Array, sharp: Array | float) -> Array:
    """0 above the curve, 1 below it, over 1/sharp of the image height."""
    return np.clip((y - curve) * np.float32(sharp) + np.float32(0.5), 0, 1)


def _ridge(y: Array, curve: Array, width: float) -> Array:
    """A bright line along the curve: 1 on it, 0 at `width` and farther."""
    return np.maximum(1 - np.abs(y - curve) * np.float32(1 / width), 0)


def _layers(u: list[float], x: Array, y: Array, s: Surfaces, size: int) -> Array:
    """Reflectivity [S, S] of the healthy tissues along the given surfaces."""
    sharp = min(size / 2.0, 90.0)
    scan = np.full((size, size), _VITREOUS, dtype=np.float32)
    depth = s.sensory - s.inner
    nasal = 1 + np.float32(0.5 * (1 if u[9] < 0.5 else -1)) * x  # nerve fibres are thicker towards the disc
    curves = [s.inner]
    for k, (far, near) in enumerate(_SHARES):
        share = np.float32(far) + np.float32(near - far) * s.pit
        curves.append(s.inner + depth * share * (nasal if k == 0 else 1))
    # The outermost surfaces ride over drusen; at the outer nuclei half of the bump is taken up.
    curves[-1] = curves[-1] - s.bumps
    curves[-2] = curves[-2] - np.float32(0.25) * s.bumps
    before = _VITREOUS
    for curve, level in zip(curves, _LEVELS, strict=True):
        scan += np.float32(level - before) * _step(y, curve, sharp)
        before = level
    scan += np.float32(0.10) * _ridge(y, s.inner + np.float32(0.006), 0.016)
    tips = s.sensory - s.bumps
    scan += np.float32(0.42) * _ridge(y, tips - np.float32(0.030), 0.013)  # ellipsoid zone
    # Below the pigment epithelium: choroid with its vessels, then sclera, fading with depth.
    below = _step(y, s.pigment, sharp)
    texture = slab("choroid", size, u[10], u[11], int(4 * u[12]))
    fade = 1 / (1 + np.maximum(y - s.bruch, 0) * np.float32(4.0 + 4.0 * u[13]))
    under = (np.float32(0.46) + np.float32(0.09) * texture) * fade
    under -= under * np.float32(0.65) * _step(y, s.sclera, 12.0)
    scan += below * (under - scan)
    scan += np.float32(0.25) * _ridge(y, s.bruch + np.float32(0.012), 0.022) * below  # choriocapillaris
    lit = _ridge(y, s.pigment, 0.022)
    scan += lit * (np.float32(0.92) - scan)
    return scan


def _spaces(scan: Array, y: Array, s: Surfaces, domes: dict[str, list[Dome]]) -> dict[str, Mask]:
    """Paint what lies below lifted surfaces in place; the masks of what was painted."""
    size = scan.shape[0]
    masks = {}
    half = np.float32(0.010)  # half the thickness of the lines that bound a space
    if "subretinal fluid" in domes:
        cover = _step(y, s.sensory, size) * (1 - _step(y, s.pigment - half, size))
        cover *= s.pigment - s.sensory > np.float32(0.02)
        scan += cover * (np.float32(_FLUID) - scan)
        masks["subretinal fluid"] = cover >= 0.5
    for name, level in (("pigment epithelial detachment", 0.20), ("drusen", 0.42)):
        if name in domes:
            cover = _step(y, s.pigment + half, size) * (1 - _step(y, s.bruch, size))
            cover *= s.bruch - s.pigment > np.float32(0.012)
            scan += cover * (np.float32(level) - scan)
            line = _ridge(y, s.bruch, 0.012) * (s.bruch - s.pigment > np.float32(0.03))
            scan += np.float32(0.22) * line
            masks[name] = cover >= 0.5
    return masks


def _cysts(
    rng: np.random.Generator, scan: Array, s: Surfaces, domes: dict[str, list[Dome]], count: int, fovea: float
) -> Mask:
    """Dark round cysts in the inner and outer nuclear layers, painted in place; their mask."""
    size = scan.shape[0]
    middle = (
        fovea
        if "pigment epithelial detachment" not in domes
        else domes["pigment epithelial detachment"][0].centre
    )
    spread = 0.12 + 0.05 * count
    across = middle + spread * ((np.arange(count) + rng.random(count)) / count * 2 - 1)
    across = np.clip(across, -0.92, 0.92)
    column = ((across + 1) / 2 * size).astype(int)
    top, bottom = s.inner[0, column].astype(float), s.sensory[0, column].astype(float)
    tall = np.minimum(rng.uniform(0.025, 0.058, count), 0.30 * (bottom - top))
    share = rng.uniform(0.36, 0.62, count)
    down = np.clip(top + share * (bottom - top), top + tall + 0.02, bottom - tall - 0.045)
    wide = np.minimum(tall * rng.uniform(0.65, 1.2, count), 0.42 * spread / count + 0.012)
    cover = np.zeros_like(scan)
    radii = 2 * np.stack([wide, tall], 1)
    centres = np.stack([across, 2 * down - 1], 1)
    stamp(
        cover,
        centres,
        radii,
        rng.uniform(-0.3, 0.3, count),
        soft=1.3,
        lobes=rng.uniform(-0.05, 0.05, (count, 4)),
    )
    scan += cover * (np.float32(_FLUID) - scan)
    return cover >= 0.5


def _camera(u: list[float], x: Array, y: Array, scan: Array, s: Surfaces, size: int) -> Array:
    """Shadows of the retinal vessels, speckle, exposure: the picture [S, S] that comes out."""
    shade = np.zeros_like(x)
    for k in range(int(u[14] * 5)):
        v = (x - np.float32(-0.95 + 1.9 * u[15 + k])) * np.float32(1 / (0.012 + 0.014 * u[20 + k]))
        shade = np.maximum(shade, np.float32(0.25 + 0.3 * u[25]) / (1 + v * v) ** 2)
    scan = scan * (1 - shade * _step(y, s.inner + np.float32(0.03), 40.0))
    if u[26] < 0.3:  # the posterior hyaloid, a faint line in the vitreous
        hyaloid = s.bruch - np.float32(0.36 + 0.08 * u[27]) - np.float32(0.05) * x * x
        scan += np.float32(0.12) * _ridge(y, hyaloid, 0.012)
    speckle = slab("speckle", size, u[28], u[29], int(4 * u[12]))
    grain = slab("grain", size, u[29], u[28])
    scan = scan * (1 + np.float32(0.26 + 0.15 * u[30]) * speckle) + np.float32(0.018) * grain
    return scan * np.float32(0.85 + 0.3 * u[31])
