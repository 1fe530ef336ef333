"""The eye behind a fundus phantom (CFP, UWF): where everything lies, and its colours, whatever the label.

Everything here is drawn from a random stream of its own, so the eye of (seed, index) is the same under every
label: two renders that differ only in the label are twins, and no nuisance can leak the answer. Positions are
made for a right eye (disc on the right), then mirrored for a left one, tilted and shifted.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.datasets.phantom.canvas import Points

# Corners of the colour space the retina's hue is mixed from (red, green, blue at full illumination).
_HUES = {
    "CFP": ((0.86, 0.45, 0.21), (0.80, 0.34, 0.19), (0.88, 0.48, 0.36), (0.66, 0.34, 0.16)),
    "UWF": ((0.58, 0.51, 0.15), (0.60, 0.44, 0.14), (0.50, 0.48, 0.20), (0.64, 0.47, 0.22)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Eye:
    """Geometry in unit coordinates (image spans [-1, 1]) and colours. Points are canonical until `place`d."""

    modality: str
    side: int  # +1: disc on the image's right, a right eye (OD); -1: a left eye (OS)
    turn: tuple[float, float]  # cosine and sine of the camera's tilt
    shift: tuple[float, float]
    field: tuple[
        float, float, float, float
    ]  # centre x, y and half-axes of the visible field, image coordinates
    disc: tuple[float, float]
    disc_radius: tuple[float, float]  # across, down
    fovea: tuple[float, float]
    arcade: float  # height of the temporal vessel arcades above the line from disc to fovea
    cup: float  # in [0, 1]: where the cup ratio lies within the range of its label
    crescent: float  # width of the peripapillary atrophy in disc radii; 0 for most eyes, whatever the label
    hue: tuple[float, ...]
    exposure: float
    light: tuple[float, float, float]  # centre of the illumination, and how fast it falls off
    noise: tuple[float, ...]  # texture offsets and strengths, all in [0, 1)

    def place(self, points: Points) -> Points:
        """Canonical points [..., 2] to image coordinates: mirror, tilt, shift."""
        x, y = points[..., 0] * self.side, points[..., 1]
        c, s = self.turn
        placed = np.empty_like(points)
        placed[..., 0] = c * x - s * y + self.shift[0]
        placed[..., 1] = s * x + c * y + self.shift[1]
        return placed

    def spot(self, point: tuple[float, float]) -> tuple[float, float]:
        """`place` for a single point."""
        x, y = point[0] * self.side, point[1]
        c, s = self.turn
        return c * x - s * y + self.shift[0], s * x + c * y + self.shift[1]

    def inside(self, x: float, y: float, share: float) -> bool:
        """Whether an image point lies within `share` of the field's half-axes."""
        cx, cy, rx, ry = self.field
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < share * share


def draw_eye(rng: np.random.Generator, modality: str) -> Eye:
    """Draw one eye. `modality` is CFP (45 degrees) or UWF (a wide ellipse, everything central smaller)."""
    wide = modality == "UWF"
    u = rng.random(24).tolist()

    def between(k: int, low: float, high: float) -> float:
        return low + (high - low) * u[k]

    tilt = between(1, -0.14, 0.14)
    radius = between(2, 0.105, 0.125) if wide else between(2, 0.155, 0.19)
    distance = between(3, 0.36, 0.42) if wide else between(3, 0.70, 0.80)
    disc_x = between(4, 0.16, 0.24) if wide else between(4, 0.42, 0.52)
    drop = between(5, 0.01, 0.05) if wide else between(5, 0.02, 0.09)
    field = (
        between(6, -0.01, 0.01),
        between(7, -0.02, 0.02),
        between(8, 0.95, 0.985),
        between(9, 0.76, 0.86),
    )
    if not wide:
        field = (*field[:2], field[2], field[2])
    first, second = _HUES[modality][int(u[10] * 4)], _HUES[modality][int(u[11] * 4)]
    return Eye(
        modality=modality,
        side=1 if u[0] < 0.5 else -1,
        turn=(float(np.cos(tilt)), float(np.sin(tilt))),
        shift=(between(12, -0.04, 0.04), between(13, -0.06, 0.06)),
        field=field,
        disc=(disc_x, -drop / 2),
        disc_radius=(radius, radius * between(14, 1.02, 1.14)),
        fovea=(disc_x - distance, drop / 2),
        arcade=(between(15, 0.30, 0.38) if wide else between(15, 0.50, 0.62)),
        cup=u[16],
        crescent=between(17, 0.16, 0.38) if u[18] < 0.25 else 0.0,
        hue=tuple(a + (b - a) * u[19] for a, b in zip(first, second, strict=True)),
        exposure=between(20, 0.86, 1.12),
        light=(between(21, -0.3, 0.3), between(22, -0.3, 0.3), between(23, 0.18, 0.42)),
        noise=tuple(rng.random(16).tolist()),
    )
