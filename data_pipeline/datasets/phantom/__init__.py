"""Phantoms: retinas drawn by program, with known findings, masks, boxes and labels.

A phantom is a test object in the physicist's sense: something of known content to hold before the instrument.
These are no simulation of disease, of its prevalence or of any patient, and nothing measured on them has a
clinical meaning. They exist so that the whole pipeline (records, traces, training, rewards, evaluation) runs
and is tested on any machine without data that has to be applied for.

`render` is a pure function of its arguments. Three independent random streams belong to each (seed, index):
which case it is, the eye with everything that is a nuisance, and the lesions. Two renders that differ only in
the label therefore show the same eye.

Neighbours: rules (what each label shows), cfp and oct (the painters), boxes, sheet (the contact sheet).
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.datasets.phantom.boxes import find_boxes
from data_pipeline.datasets.phantom.cfp import draw_fundus
from data_pipeline.datasets.phantom.oct import draw_scan
from data_pipeline.datasets.phantom.rules import LABELS, MIX, RULES, Rule, draw_case, draw_counts
from fundus_jax.records import Box, ConfigError

__all__ = ["LABELS", "MIX", "RULES", "SIZES", "Phantom", "Rule", "encode", "render"]

SIZES = (56, 1024)  # smallest and largest image side


@dataclass(frozen=True)
class Phantom:
    """One drawn retina. What `anatomy` measures are fractions of the image side, from the top left corner."""

    image: NDArray[np.uint8]  # [S, S, 3]
    masks: dict[str, NDArray[np.bool_]]  # finding -> [S, S], only findings that are there
    anatomy: dict[str, float]
    modality: str
    label: str
    eye: str  # "OD", "OS", or "" for a B-scan
    findings: tuple[str, ...]  # canonical names, sorted: the keys of `masks`
    boxes: tuple[Box, ...]  # at most four a finding, the largest first
    counts: dict[str, int]  # how many were drawn in all; rules.Dose says what is counted


def render(
    seed: int, index: int, *, size: int = 112, modality: str | None = None, label: str | None = None
) -> Phantom:
    """Draw phantom number `index` of the series `seed`, the same bytes every time.

    Args:
        seed: series, >= 0.
        index: number within the series, >= 0.
        size: image side in pixels, within `SIZES`.
        modality: CFP, UWF or OCT; None draws it by `MIX`.
        label: a label of the modality; None draws it uniformly.

    Raises:
        ConfigError: an argument is out of bounds, or no such label exists for the modality.
    """
    if seed < 0 or index < 0:
        raise ConfigError(f"phantom seed and index must be >= 0, not {seed} and {index}")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ConfigError(f"phantom size {size} is out of bounds: use {SIZES[0]} to {SIZES[1]} pixels")
    case, nuisance, chance = (np.random.default_rng([seed, index, stream]) for stream in range(3))
    modality, label = draw_case(case, modality, label)
    counts = draw_counts(chance, modality, label)
    if modality == "OCT":
        image, masks, anatomy = draw_scan(nuisance, chance, size=size, counts=counts)
        eye = ""
    else:
        image, masks, side, anatomy = draw_fundus(
            nuisance,
            chance,
            size=size,
            modality=modality,
            counts=counts,
            everywhere=RULES[modality][label].everywhere,
        )
        eye = "OD" if side > 0 else "OS"
    masks = {name: mask for name, mask in sorted(masks.items()) if mask.any()}
    findings = tuple(masks)
    boxes = tuple(box for name in findings for box in find_boxes(name, masks[name]))
    return Phantom(image, masks, anatomy, modality, label, eye, findings, boxes, counts)


def encode(phantom: Phantom) -> bytes:
    """The image as PNG (lossless, fast compression)."""
    buffer = io.BytesIO()
    Image.fromarray(phantom.image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
