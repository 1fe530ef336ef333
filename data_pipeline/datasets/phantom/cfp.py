"""Fundus phantoms: colour photographs (CFP, 45 degrees) and ultra-widefield pictures (UWF).

The order of painting is that of the eye: lit retina with its pigment, macula, optic disc with cup, vessels,
lesions, then the camera (field stop, noise).
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.datasets.phantom import canvas, lesions
from data_pipeline.datasets.phantom.anatomy import Eye, draw_eye
from data_pipeline.datasets.phantom.canvas import Array, Mask
from data_pipeline.datasets.phantom.rules import CUP_LARGE, CUP_USUAL
from data_pipeline.datasets.phantom.vessels import draw_vessels

_VESSEL = {"CFP": (0.34, 0.62, 0.52), "UWF": (0.46, 0.60, 0.40)}
_RIM = {"CFP": (1.02, 0.66, 0.40), "UWF": (0.92, 0.66, 0.26)}
_CUP = {"CFP": (1.04, 0.95, 0.76), "UWF": (1.02, 1.00, 0.62)}
_PALE = {"CFP": (0.98, 0.72, 0.46), "UWF": (0.80, 0.72, 0.30)}  # bare sclera and choroid of the crescent
_MACULA = {"CFP": (0.20, 0.34, 0.36), "UWF": (0.30, 0.34, 0.26)}
MASK_LEVEL = {
    "cotton-wool spot": 0.4,
    "vitreous haemorrhage": 0.35,
}  # soft lesions count from a lower coverage


def draw_fundus(
    nuisance: np.random.Generator,
    chance: np.random.Generator,
    *,
    size: int,
    modality: str,
    counts: dict[str, int],
    everywhere: tuple[str, ...],
) -> tuple[NDArray[np.uint8], dict[str, Mask], int, dict[str, float]]:
    """Paint one fundus picture.

    Args:
        nuisance: stream of the eye, its vessels and the camera; independent of the label.
        chance: stream of the lesions.
        size: image side S in pixels.
        modality: CFP or UWF.
        counts: how many of each finding, from `rules.draw_counts`.
        everywhere: findings to be spread over all four quadrants; haemorrhages can be.

    Returns:
        image uint8 [S, S, 3], masks [S, S] of the findings, the side of the disc (+1 right, -1 left), and the
        anatomy (positions and radii as fractions of the image side).
    """
    eye = draw_eye(nuisance, modality)
    low, high = CUP_LARGE if "large cup" in counts else CUP_USUAL
    ratio = low + (high - low) * eye.cup
    picture, light = _retina(eye, size)
    disc, cup = _disc(picture, eye, ratio, light)
    vessels = draw_vessels(nuisance, eye, size)
    # Vessels are faded over the disc, so that the cup stays to be seen below them.
    canvas.absorb(picture, vessels * (1 - np.float32(0.6) * disc), _VESSEL[modality])
    if modality == "UWF" and eye.noise[11] < 0.5:
        lashes = _lashes(eye, size)
        canvas.absorb(picture, lashes, (0.6, 0.6, 0.5))
        vessels = np.maximum(vessels, lashes)  # small lesions keep clear of them too
    scene = lesions.Scene(eye, chance, picture, vessels, light)
    scene.taken.append((*eye.spot(eye.disc), eye.disc_radius[1] + 0.03))
    covers = {}
    for name, paint in lesions.PAINTERS.items():
        if name in counts:
            extra = {"everywhere": True} if name in everywhere else {}
            covers[name] = paint(scene, counts[name], **extra)
    if "large cup" in counts:
        covers["large cup"] = cup
    masks = {name: cover >= MASK_LEVEL.get(name, 0.5) for name, cover in covers.items()}
    _camera(picture, eye)
    return canvas.to_bytes(picture), masks, eye.side, _anatomy(eye, ratio)


def _anatomy(eye: Eye, ratio: float) -> dict[str, float]:
    (disc_x, disc_y), (fovea_x, fovea_y) = eye.spot(eye.disc), eye.spot(eye.fovea)
    return {
        "disc_x": (disc_x + 1) / 2,
        "disc_y": (disc_y + 1) / 2,
        "disc_radius": eye.disc_radius[1] / 2,
        "cup_ratio": ratio,
        "fovea_x": (fovea_x + 1) / 2,
        "fovea_y": (fovea_y + 1) / 2,
        "crescent": eye.crescent,
    }


def _retina(eye: Eye, size: int) -> tuple[Array, Array]:
    """The lit retina without disc and vessels: picture [3, S, S], and the light [S, S] that falls on it."""
    x, y = canvas.grid(size)
    n = eye.noise
    lx, ly, fall = eye.light
    light = 1 - np.float32(fall) * ((x - np.float32(lx)) ** 2 + (y - np.float32(ly)) ** 2) * np.float32(0.55)
    light *= np.float32(eye.exposure)
    flips = int(n[9] * 4)
    tone = 1 + np.float32(0.02 + 0.035 * n[2]) * canvas.slab("blotch", size, n[0], n[1], flips)
    picture = canvas.triple(eye.hue) * (light * tone)
    mesh = canvas.slab("mesh", size, n[3], n[4], flips)
    canvas.absorb(
        picture, np.float32(-0.16 * n[5]) * mesh, (0.5, 1.0, 1.0)
    )  # paler stroma between choroidal vessels
    for point, width, share in (
        (eye.fovea, 0.55 * eye.arcade, _MACULA[eye.modality]),
        (eye.fovea, 0.16 * eye.arcade, (0.16, 0.24, 0.2)),
        (eye.disc, 3.0 * eye.disc_radius[0], (-0.06, -0.13, -0.16)),  # nerve fibres brighten around the disc
    ):
        rows, cols, dx, dy = canvas.window(size, eye.spot(point), 2.4 * width)
        bump = canvas.bell((dx * dx + dy * dy) * np.float32(1 / width**2))
        bump = np.maximum(bump - np.float32(0.025), 0)
        canvas.absorb(picture[:, rows, cols], bump, share)
    return picture, light


def _ellipse(dx: Array, dy: Array, eye: Eye, radius: tuple[float, float], centre: float = 0.0) -> Array:
    """Elliptical distance in the disc's axes, 1 at the rim; `centre` shifts towards the fovea, in radii."""
    c, s = eye.turn
    u = (np.float32(c) * dx + np.float32(s) * dy) * np.float32(
        -eye.side / radius[0]
    )  # grows towards the fovea
    v = (np.float32(c) * dy - np.float32(s) * dx) * np.float32(1 / radius[1])
    u = u - np.float32(centre)
    return np.sqrt(u * u + v * v)


def _disc(picture: Array, eye: Eye, ratio: float, light: Array) -> tuple[Array, Array]:
    """Paint crescent, disc and cup in place; returns the coverage [S, S] of the disc and of the cup."""
    size = light.shape[0]
    rx, ry = eye.disc_radius
    rows, cols, dx, dy = canvas.window(size, eye.spot(eye.disc), 2.0 * ry)
    patch, lit = picture[:, rows, cols], light[rows, cols] * np.float32(0.5) + np.float32(0.5 * eye.exposure)
    edge = np.float32(rx * size / 2)

    def inside(distance: Array, soft: float) -> Array:
        return np.clip((1 - distance) * (edge / np.float32(soft)) + np.float32(0.5), 0, 1)

    if eye.crescent:
        wide = 1 + eye.crescent
        ring = inside(_ellipse(dx, dy, eye, (rx * wide, ry * (1 + 0.6 * eye.crescent)), 0.2), 1.5)
        canvas.blend(patch, np.float32(0.55) * ring, canvas.triple(_PALE[eye.modality]) * lit)
    distance = _ellipse(dx, dy, eye, (rx, ry))
    whole = inside(distance, max(1.4, 0.02 * size / 2))
    rim = canvas.triple(_RIM[eye.modality]) * (lit * (np.float32(1.04) - np.float32(0.1) * distance))
    canvas.blend(patch, np.float32(0.94) * whole, rim)
    # The wall of the cup is steep: its edge is one pixel wide, and is the only cue of glaucoma.
    hollow = inside(_ellipse(dx, dy, eye, (ratio * rx, ratio * ry), 0.05), 1.0 / ratio)
    canvas.blend(patch, np.float32(0.92) * hollow, canvas.triple(_CUP[eye.modality]) * lit)
    covers = []
    for part in (whole, hollow):
        cover = np.zeros_like(light)
        cover[rows, cols] = part
        covers.append(cover)
    return covers[0], covers[1]


def _lashes(eye: Eye, size: int) -> Array:
    """Coverage [S, S] of the shadows of eyelashes at the lower edge of a wide field."""
    cx, cy, rx, ry = eye.field
    pen = canvas.Pen(size)
    many = 5 + int(7 * eye.noise[12])
    k = np.arange(many)
    foot = (k - (many - 1) / 2) * (0.10 + 0.04 * eye.noise[13]) + 0.05 * np.sin(17.0 * (k + eye.noise[14]))
    rise = 0.10 + 0.16 * np.abs(np.sin(29.0 * (k + eye.noise[15])))
    t = np.linspace(0, 1, 6)
    edge = cy + ry * np.sqrt(np.maximum(0, 1 - (foot / rx) ** 2)) + 0.03
    x = cx + foot[:, None] + 0.25 * foot[:, None] * t + 0.06 * np.sin(7.0 * k)[:, None] * t * t
    y = edge[:, None] - rise[:, None] * t
    pen.ribbons(np.stack([x, y], axis=-1), np.tile(0.035 - 0.02 * t, (many, 1)), [255] * many)
    return pen.coverage()


def _camera(picture: Array, eye: Eye) -> None:
    """Field stop, darker rim and sensor noise, in place."""
    size = picture.shape[-1]
    x, y = canvas.grid(size)
    n = eye.noise
    cx, cy, rx, ry = (np.float32(v) for v in eye.field)
    u, v = (x - cx) / rx, (y - cy) / ry
    reach = u * u + v * v  # squared: 1 at the stop
    stop = np.clip((1 - reach) * np.float32(ry * size / 4), 0, 1)
    stop *= 1 - np.float32(0.22 + 0.2 * n[6]) * reach * reach * reach
    grain = canvas.slab("grain", size, n[7], n[8], int(n[9] * 4))
    stop *= 1 + np.float32(0.012 + 0.022 * n[10]) * grain
    picture *= stop
    picture += canvas.triple((0.012, 0.010, 0.009))
