"""Copies of a picture as they turn up in other data sets, for the tests of decontamination."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipeline.datasets import phantom

T = Image.Transpose


def retina(index: int, modality: str | None = None, label: str | None = None) -> Image.Image:
    """A drawn picture of 448 pixels."""
    drawn = phantom.render(11, index, size=448, modality=modality, label=label)
    return Image.open(io.BytesIO(phantom.encode(drawn))).convert("RGB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Compressed and read again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """With these shares of its sides cut off."""
    width, height = image.size
    return image.crop(
        (int(width * left), int(height * top), int(width * (1 - right)), int(height * (1 - bottom)))
    )


def lit(image: Image.Image, gamma: float, contrast: float, brightness: float) -> Image.Image:
    """With other light; values of 0 to 1, cut off at either end."""
    values = (np.asarray(image) / 255) ** gamma
    values = np.clip((values - 0.5) * contrast + 0.5 + brightness, 0, 1)
    return Image.fromarray((255 * values).astype(np.uint8))


def scaled(image: Image.Image, x: float, y: float) -> Image.Image:
    """Reduced or enlarged."""
    return image.resize((int(image.width * x), int(image.height * y)), Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "smaller": lambda one: scaled(one, 0.25, 0.25),
    "larger": lambda one: scaled(one, 2, 2),
    "square": lambda one: scaled(one, 0.7, 0.55),
    "jpeg": lambda one: jpeg(one, 30),
    "cropped": lambda one: cropped(one, 0.2, 0.15, 0.18, 0.2),
    "mirrored": lambda one: one.transpose(T.FLIP_LEFT_RIGHT),
    "upside down": lambda one: one.transpose(T.FLIP_TOP_BOTTOM),
    "dark": lambda one: lit(one, 1.6, 0.7, -0.1),
    "bright": lambda one: lit(one, 0.6, 1.4, 0.1),
    "all": lambda one: jpeg(
        scaled(
            lit(cropped(one.transpose(T.FLIP_LEFT_RIGHT), 0.1, 0.15, 0.15, 0.05), 1.3, 0.8, 0.05), 0.5, 0.5
        ),
        50,
    ),
}


def changed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One to five changes at random, up to a fifth cut off each side, a quarter of the size, quality 30."""
    flips = [T.FLIP_LEFT_RIGHT, T.FLIP_TOP_BOTTOM, T.ROTATE_180]
    light = np.exp(rng.uniform(-0.5, 0.5)), rng.uniform(0.6, 1.4), rng.uniform(-0.12, 0.12)
    scale = np.exp(rng.uniform(np.log(0.25), np.log(2)))
    sides, flip, quality = rng.uniform(0, 0.2, 4), flips[rng.integers(3)], int(rng.integers(30, 96))
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda one: cropped(one, *sides),
        lambda one: one.transpose(flip),
        lambda one: lit(one, *light),
        lambda one: scaled(one, scale, scale),
        lambda one: jpeg(one, quality),
    ]
    chosen = rng.random(len(steps)) < rng.choice([0.2, 0.4, 1.0])
    chosen[rng.integers(len(steps))] = True
    for step in (step for step, taken in zip(steps, chosen, strict=True) if taken):
        image = step(image)
    return image
