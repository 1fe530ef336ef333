"""Images to patches for Qwen2.5-VL: RGB, smart resize, normalise, cut; and the window order of a batch.

Our own path, because transformers' needs torchvision for its default and its two back ends differ in pixels.
This one equals the PIL back end (`Qwen2VLImageProcessorPil`) bit for bit. It does not look at an EXIF
orientation, as that one does not either: turning photographs upright belongs to ingestion, once. `rows` puts
the patches into a batch.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fundus_jax.records import ConfigError, DataError

MAX_ASPECT_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Sized(Protocol):
    """What is asked of an image before its pixels are: PIL's have it, and `data.Size`."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How an image becomes patches: preprocessor_config.json, and the window size, which config.json holds.

    Attributes:
        min_pixels, max_pixels: bounds on height * width after the resize.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames in a patch; a still image is repeated.
        merge_size: patches per merged token along one side.
        window_size: side of an attention window in pixels.
        mean, std: of red, green, blue on the 0-1 scale.
        rescale_factor: brings bytes to the 0-1 scale.
        resample: PIL's number of the resize filter (3 = bicubic).
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"need 1 <= min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if min(self.patch_size, self.temporal_patch_size, self.merge_size) < 1:
            raise ConfigError("patch_size, temporal_patch_size and merge_size must be at least 1")
        if self.window_size < self.factor or self.window_size % self.factor:
            raise ConfigError(
                f"window_size {self.window_size} is not a multiple of patch_size * merge_size = {self.factor}"
            )

    @property
    def factor(self) -> int:
        """Both sides of a resized image are multiples of this: one merged token's side in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_features(self) -> int:
        """F, numbers in one flattened patch (1176 for Qwen2.5-VL)."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def window_slots(self) -> int:
        """W, patch slots of one attention window (64 for Qwen2.5-VL)."""
        return (self.window_size // self.patch_size) ** 2

    def grid(self, image: Sized) -> tuple[int, int, int]:
        """(frames = 1, height, width) in patches that `image` will have. Reads its size only, no pixels."""
        height, width = smart_resize(image.height, image.width, self.factor, self.min_pixels, self.max_pixels)
        return 1, height // self.patch_size, width // self.patch_size

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, window_size: int = 112) -> "ImageConfig":
        """Parse a preprocessor_config.json in any of its forms.

        Sizes are min_pixels/max_pixels or size.{shortest_edge,longest_edge}. Raises ConfigError where a step
        is switched off (do_resize, do_rescale, ...): this path always takes them all.
        """
        off = [name for name in _STEPS if raw.get(name) is False]
        if off:
            raise ConfigError(
                f"preprocessor_config.json switches off {', '.join(off)}; this image path always does it"
            )
        size = raw.get("size") or {}
        named = {
            "min_pixels": _first(raw.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
            "max_pixels": _first(raw.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
            "mean": _triple(raw.get("image_mean")),
            "std": _triple(raw.get("image_std")),
            **{name: raw.get(name) for name in _SAME_NAME},
        }
        return cls(
            window_size=window_size, **{name: value for name, value in named.items() if value is not None}
        )

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of this configuration, in the hub's keys, which all versions read."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            **{name: getattr(self, name) for name in _SAME_NAME},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **dict.fromkeys(_STEPS, True),
        }


_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
_SAME_NAME = ("patch_size", "temporal_patch_size", "merge_size", "rescale_factor", "resample")


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _triple(value: Any) -> tuple[float, float, float] | None:
    """Three floats from a list of three or one number for all channels; None stays None."""
    if value is None:
        return None
    red, green, blue = value if isinstance(value, list | tuple) else (value,) * 3
    return float(red), float(green), float(blue)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) to resize to: multiples of `factor`, the area within the bounds, the shape nearly kept.

    The nearest multiples, unless their area is outside the bounds; then both sides are scaled by one ratio
    and rounded inwards. (A very long strip may still exceed max_pixels: no side becomes shorter than
    `factor`.) Raises DataError for an empty image or a ratio of sides above 200.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            f"image of {width}x{height} pixels: sides must be >= 1 and their ratio <= {MAX_ASPECT_RATIO}"
        )
    tall, wide = (round(side / factor) * factor for side in (height, width))
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, on white where it is transparent. Raises DataError if PIL can not read it."""
    try:
        image.load()  # a file that was only opened is decoded here, where its errors are expected
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            overlay = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", overlay.size, (255, 255, 255, 255)), overlay)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files and odd modes
        raise DataError(
            f"image of mode {image.mode}, {image.size} pixels can not be read as RGB: {error}"
        ) from error


def resized(image: Image.Image, config: ImageConfig) -> Image.Image:
    """The RGB picture that the patches of `image` are cut from. Resizing it once more changes nothing. Raises
    DataError for an image that can not be used."""
    _, tall, wide = config.grid(image)
    size = wide * config.patch_size, tall * config.patch_size
    return to_rgb(image).resize(size, Image.Resampling(config.resample))


@lru_cache(maxsize=16)
def _byte_table(config: ImageConfig) -> np.ndarray:
    """[3, 256] float32: the normalised value of each byte in each channel.

    A pixel has only 256 values, so a table look-up replaces the arithmetic and is exact. The steps and types
    are transformers': the product in float64, then float32 throughout.
    """
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = (np.asarray(values, np.float32)[:, None] for values in (config.mean, config.std))
    return (scaled - mean) / std


def image_patches(image: Image.Image, config: ImageConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches of one image and its grid: ([h*w, F] float32, (frames = 1, h, w)).

    Patches come in transformers' order: merge blocks in raster order, the patches of a block in raster order.
    The numbers of a patch are ordered channel, frame, row, column. Raises DataError for an image that can not
    be used.
    """
    frames, tall, wide = grid = config.grid(image)
    size, merge = config.patch_size, config.merge_size
    rgb = resized(image, config)
    blocks = np.asarray(rgb).reshape(tall // merge, merge, size, wide // merge, merge, size, 3)
    cut = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(tall * wide, 3, size**2)
    entries = (
        cut + np.arange(0, 3 * 256, 256, dtype=np.uint16)[:, None]
    )  # of the table, channel after channel
    patches = np.empty((tall * wide, 3, config.temporal_patch_size, size**2), np.float32)
    patches[:] = _byte_table(config).reshape(-1)[entries][:, :, None]  # the same picture in every frame
    return patches.reshape(tall * wide, config.patch_features), grid


@dataclass(frozen=True, kw_only=True)
class WindowLayout:
    """Where the patches of one image go in window order. S slots, S a multiple of W; arrays are read-only.

    Attributes:
        slots: S, windows of the image times W.
        patch_slot: [h*w] int32, slot of each patch in the order of `image_patches`.
        raster_to_slot: [h*w/merge^2] int32, merged slot of each merged token in raster order.
        hw: [S,2] int32, row and column of each slot's patch in the image's grid, 0 where empty.
        filled: [S] bool.
    """

    slots: int
    patch_slot: np.ndarray
    raster_to_slot: np.ndarray
    hw: np.ndarray
    filled: np.ndarray


@lru_cache(maxsize=1024)
def window_layout(
    grid: tuple[int, int, int], *, patch_size: int = 14, merge_size: int = 2, window_size: int = 112
) -> WindowLayout:
    """The window order of an image of `grid` patches, cached: equal grids share one layout.

    Windows are taken in raster order, merge blocks in raster order inside a window, as in transformers'
    window index. Each window owns W slots: those that a window at the right or lower border does not need
    stay empty, after the ones it fills. Raises DataError for a grid that is not made of whole merge blocks.
    """
    frames, tall, wide = grid
    if frames != 1 or min(tall, wide) < 1 or tall % merge_size or wide % merge_size:
        raise DataError(
            f"grid {grid} must have one frame and sides that are positive multiples of {merge_size}"
        )
    side = window_size // (patch_size * merge_size)  # merge blocks along a window
    area = merge_size**2
    rows, columns = np.divmod(np.arange(tall * wide // area), wide // merge_size)
    windows_across = -(-wide // merge_size // side)
    window = rows // side * windows_across + columns // side
    window_width = np.minimum(side, wide // merge_size - columns // side * side)
    raster_to_slot = window * side**2 + rows % side * window_width + columns % side
    patch_slot = (raster_to_slot[:, None] * area + np.arange(area)).reshape(-1)
    down, right = np.divmod(np.arange(area), merge_size)
    hw = np.stack([rows[:, None] * merge_size + down, columns[:, None] * merge_size + right], axis=-1)

    slots = int(window[-1] + 1) * side**2 * area
    slot_hw, filled = np.zeros((slots, 2), np.int32), np.zeros(slots, bool)
    slot_hw[patch_slot], filled[patch_slot] = hw.reshape(-1, 2), True
    arrays = {
        "patch_slot": patch_slot.astype(np.int32),
        "raster_to_slot": raster_to_slot.astype(np.int32),
        "hw": slot_hw,
        "filled": filled,
    }
    for array in arrays.values():
        array.flags.writeable = False
    return WindowLayout(slots=slots, **arrays)
