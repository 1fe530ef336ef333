"""The image path against transformers' PIL back end, bit for bit; the window order against its own."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fundus_jax.models.qwen2_5_vl.images import ImageConfig, image_patches, smart_resize, window_layout
from fundus_jax.records import ConfigError, DataError

CONFIG = ImageConfig(min_pixels=56 * 56, max_pixels=28 * 28 * 40)
KINDS = (
    *("RGB", "L", "LA", "RGBA", "CMYK", "I;16", "P", "1", "I", "F", "YCbCr", "PA"),
    *("P transparent", "RGB transparent", "L transparent", "JPEG", "JPEG turned", "PNG 16"),
)


def pixels(width: int, height: int, bands: int, seed: int) -> np.ndarray:
    """Random bytes over a gradient, so that resizing has both edges and areas to work on."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, bands))
    slope = np.linspace(0, 255, width)[None, :, None]
    return ((noise + slope) / 2).astype(np.uint8)


def reopened(image: Image.Image, name: str, **options: object) -> Image.Image:
    """`image` written to a file's bytes and opened again, so not decoded yet."""
    data = io.BytesIO()
    image.save(data, name, **options)
    return Image.open(io.BytesIO(data.getvalue()))


def make(kind: str, width: int, height: int, seed: int) -> Image.Image:
    """An image of one of KINDS."""
    rgb = Image.fromarray(pixels(width, height, 3, seed))
    grey = pixels(width, height, 1, seed)[..., 0]
    if kind == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257 - grey)
    if kind == "PNG 16":
        return reopened(Image.fromarray(grey.astype(np.uint16) * 200), "PNG")
    if kind in ("LA", "RGBA"):
        return Image.fromarray(pixels(width, height, len(kind), seed))
    if kind == "P transparent":
        return reopened(rgb.quantize(32), "PNG", transparency=bytes(range(0, 256, 8)))
    if kind in ("RGB transparent", "L transparent"):
        image = rgb if kind[0] == "R" else Image.fromarray(grey)
        return reopened(image, "PNG", transparency=image.getpixel((0, 0)))
    if kind == "JPEG":
        return reopened(rgb, "JPEG", quality=90)
    if kind == "JPEG turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return reopened(rgb, "JPEG", exif=exif)
    return rgb.quantize(16) if kind == "P" else rgb.convert(kind)


def test_equal_to_transformers_bit_for_bit() -> None:
    from transformers import Qwen2VLImageProcessorPil

    reference = Qwen2VLImageProcessorPil(min_pixels=CONFIG.min_pixels, max_pixels=CONFIG.max_pixels)
    draw = random.Random(0)
    for case in range(126):
        kind = KINDS[case % len(KINDS)]
        image = make(kind, draw.randint(8, 420), draw.randint(8, 420), case)
        expected = reference(images=[image.copy() if case % 2 else image], return_tensors="np")
        patches, grid = image_patches(image, CONFIG)
        assert grid == tuple(expected["image_grid_thw"][0]), (case, kind)
        assert patches.dtype == expected["pixel_values"].dtype == np.float32
        assert np.array_equal(patches, expected["pixel_values"]), (case, kind, image.size)


def test_other_settings_equal_transformers_too() -> None:
    from transformers import Qwen2VLImageProcessorPil

    raw = {
        **{
            "patch_size": 16,
            "merge_size": 3,
            "temporal_patch_size": 1,
            "resample": 2,
            "rescale_factor": 1 / 127.5,
        },
        **{
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "min_pixels": 9_000,
            "max_pixels": 40_000,
        },
    }
    image = make("RGB", 150, 90, 0)
    expected = Qwen2VLImageProcessorPil(**raw)(images=[image], return_tensors="np")
    config = ImageConfig.from_hf(raw, window_size=96)
    assert np.array_equal(image_patches(image, config)[0], expected["pixel_values"])


def test_an_exif_orientation_is_left_to_ingestion() -> None:
    turned = make("JPEG turned", 112, 56, 0)
    assert image_patches(turned, CONFIG)[1] == (1, 4, 8)
    assert image_patches(ImageOps.exif_transpose(turned), CONFIG)[1] == (1, 8, 4)


@settings(max_examples=400)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.integers(1, 10**6),
    span=st.integers(0, 10**7),
)
def test_smart_resize_equals_transformers(height: int, width: int, low: int, span: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    arguments = (height, width, 28, low, low + span)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(DataError, match=f"{width}x{height}"):
            smart_resize(*arguments)
    else:
        assert smart_resize(*arguments) == reference(*arguments)


def test_bad_images_are_data_errors() -> None:
    with pytest.raises(DataError, match="0x5"):
        image_patches(Image.new("RGB", (0, 5)), CONFIG)
    whole = io.BytesIO()
    make("RGB", 200, 200, 0).save(whole, "JPEG")
    with pytest.raises(DataError, match="can not be read as RGB"):
        image_patches(Image.open(io.BytesIO(whole.getvalue()[:2000])), CONFIG)


even = st.integers(1, 20).map(lambda n: 2 * n)


@given(grid=st.tuples(st.just(1), even, even))
def test_window_order_equals_transformers(grid: tuple[int, int, int]) -> None:
    torch = pytest.importorskip("torch", reason="the reference runs in torch")
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    thw = torch.tensor([grid])
    window_index, bounds = get_vision_window_index(thw, 2, 112, 14)
    layout = window_layout(grid)
    assert np.argsort(layout.raster_to_slot).tolist() == window_index.tolist()
    per_window = layout.filled.reshape(-1, 64).sum(1)
    assert per_window.tolist() == np.diff(bounds.numpy()).tolist()
    # What a window fills comes first, so that the empty slots are its tail.
    assert (np.diff(layout.filled.reshape(-1, 64).astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(layout.hw[layout.patch_slot], get_vision_position_ids(thw, 2).numpy())


@given(
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    patch=st.sampled_from([7, 14, 16]),
    merge=st.integers(1, 3),
    side=st.integers(1, 5),
)
def test_layout_is_a_permutation_into_windows(
    blocks: tuple[int, int], patch: int, merge: int, side: int
) -> None:
    tall, wide = blocks[0] * merge, blocks[1] * merge
    window, area = side * merge * patch, merge**2
    layout = window_layout((1, tall, wide), patch_size=patch, merge_size=merge, window_size=window)
    slots = ImageConfig(patch_size=patch, merge_size=merge, window_size=window).window_slots
    assert layout.slots % slots == 0
    assert len(set(layout.patch_slot.tolist())) == tall * wide == layout.filled.sum()
    # The patches of a window of slots lie in one window of the picture, and no two of them share one.
    owner = layout.patch_slot // slots
    rows, columns = (layout.hw[layout.patch_slot] // (side * merge)).T
    assert len({*zip(owner, rows, columns, strict=True)}) == len({*owner.tolist()}) == layout.slots // slots
    # A merged slot holds one merge block, and raster_to_slot finds it.
    corner = layout.hw[layout.raster_to_slot * area]
    expected = np.stack(np.divmod(np.arange(blocks[0] * blocks[1]), blocks[1]), axis=-1) * merge
    np.testing.assert_array_equal(corner, expected)
    assert (layout.hw[~layout.filled] == 0).all()


def test_layouts_are_shared_and_read_only() -> None:
    layout = window_layout((1, 8, 8))
    assert window_layout((1, 8, 8)) is layout
    assert layout.slots == 64
    with pytest.raises(ValueError, match="read-only"):
        layout.hw[0] = 1


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 4, 0)])
def test_odd_grids_are_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="grid"):
        window_layout(grid)


def test_settings_are_read_in_both_forms() -> None:
    old = ImageConfig.from_hf({"min_pixels": 3136, "max_pixels": 50176})
    new = ImageConfig.from_hf({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, window_size=112)
    assert old == new == ImageConfig(min_pixels=3136, max_pixels=50176)
    assert ImageConfig.from_hf({}) == ImageConfig()
    assert ImageConfig.from_hf(old.to_hf()) == old


@pytest.mark.parametrize(
    ("raw", "window", "message"),
    [
        ({"do_resize": False}, 112, "switches off do_resize"),
        ({"min_pixels": 0}, 112, "1 <= min_pixels"),
        ({"min_pixels": 10**8}, 112, "1 <= min_pixels <= max_pixels"),
        ({"merge_size": 0}, 112, "at least 1"),
        ({}, 100, "window_size 100"),
    ],
)
def test_bad_settings_are_config_errors(raw: dict[str, object], window: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageConfig.from_hf(raw, window_size=window)


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    import json

    from transformers import Qwen2VLImageProcessorPil

    config = ImageConfig(min_pixels=3136, max_pixels=30000, patch_size=14, resample=2)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    reference = Qwen2VLImageProcessorPil.from_pretrained(tmp_path, local_files_only=True)
    image = make("RGBA", 300, 200, 1)
    expected = reference(images=[image], return_tensors="np")["pixel_values"]
    assert np.array_equal(image_patches(image, config)[0], expected)
