"""Pictures of every reader: sizes without pixels, and files that are cut off, empty or no images."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from fundus_jax import data
from fundus_jax.evaluation.benchmarks import PhantomBenchmark
from fundus_jax.evaluation.describe import Reports
from fundus_jax.evaluation.items import Benchmark, Selection
from fundus_jax.records import DataError
from tests.evaluation.readers import ANY, CUT, READERS, encode, funbench, sideways
from tests.evaluation.samples import example, stage


def same_sizes(benchmark: Benchmark, decodes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sizes of a benchmark's pictures, which are those of `load_image`, and for which none is decoded."""
    keys = [item.images[0] for item in benchmark.items]
    decodes.clear()
    sizes = [benchmark.image_size(key) for key in keys]
    assert decodes == []
    assert sizes == [benchmark.load_image(key).size for key in keys]
    assert len(decodes) == len(keys)
    return [tuple(size) for size in sizes]


@pytest.mark.parametrize("name", READERS)
def test_sizes_are_known_without_pixels(tmp_path: Path, decodes: list[tuple[int, int]], name: str) -> None:
    benchmark = READERS[name](tmp_path, [encode(), encode("PNG", (30, 20)), sideways()])
    assert same_sizes(benchmark, decodes) == [(64, 48), (30, 20), (48, 64)]


def test_sizes_of_prepared_photographs(tmp_path: Path, decodes: list[tuple[int, int]]) -> None:
    """Cut to the diameter; turned only, and then upright; left alone. With a side all have that."""
    files, cuts = (
        [encode(), sideways(), sideways()],
        [CUT, {"rotate": True, "crop": None}, {"rotate": False, "crop": None}],
    )
    sized = same_sizes(funbench(tmp_path / "a", files, cuts=cuts), decodes)
    assert sized == [(40, 40), (64, 48), (48, 64)]
    assert same_sizes(funbench(tmp_path / "b", [sideways()], cuts=[CUT]), decodes) == [(40, 40)]
    square = Selection(side=28)
    assert same_sizes(funbench(tmp_path / "c", files, square, cuts), decodes) == [(28, 28)] * 3
    with pytest.raises(DataError, match="30 x 20 pixels, but preprocess_info.json cuts 64 x 48"):
        funbench(tmp_path / "d", [encode(size=(30, 20))], Selection(), [CUT])


def test_sizes_of_examples(tmp_path: Path, decodes: list[tuple[int, int]]) -> None:
    source = stage(tmp_path / "examples", [example(0), example(1)])
    for benchmark in (PhantomBenchmark(source), Reports(source)):
        assert same_sizes(benchmark, decodes) == [(56, 56)] * 2


@pytest.mark.parametrize("file", [b"", b"GIF89a, but not quite" * 9], ids=["empty", "no image"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_image_is_named_or_left_out(tmp_path: Path, name: str, file: bytes) -> None:
    files = [encode(), encode(), file]
    with pytest.raises(DataError, match=r"1 of 3 images can not be read: .*2.*: (not a|the image is not)"):
        READERS[name](tmp_path / "refused", files, Selection())
    partial = READERS[name](tmp_path / "partial", files, ANY)
    assert len(partial.items) == 2
    assert len(partial.missing) == 1
    assert partial.missing[0] not in {key for item in partial.items for key in item.images}
    assert any("1 of 3 images can not be read" in reason for reason in partial.partial)


@pytest.mark.parametrize("side", [0, 28])
@pytest.mark.parametrize("name", READERS)
def test_a_picture_that_is_cut_off_is_named(tmp_path: Path, name: str, side: int) -> None:
    """Its head is whole, so it is noticed when it is shown (test_predict.py, test_served.py go on there)."""
    whole = encode()
    files = [whole, whole, whole[: len(whole) // 2]]
    benchmark = READERS[name](tmp_path, files, Selection(allow_partial=True, side=side))
    assert len(benchmark.items) == 3
    key = benchmark.items[2].images[0]
    assert benchmark.image_size(key) == ((side, side) if side and name == "funbench" else (64, 48))
    with pytest.raises(DataError, match=r"2.*: its pixels can not be read: .*truncated"):
        benchmark.load_image(key)


@pytest.mark.parametrize("kind", data.FORMATS)
def test_however_a_file_is_cut_it_is_whole_or_an_error(tmp_path: Path, kind: str) -> None:
    whole = encode(kind)
    pixels = np.asarray(data.decoded(data.open_image(whole, "x"), "x"))
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        with contextlib.suppress(DataError):
            image = data.decoded(data.open_image(whole[:length], "x"), "x")
            assert np.array_equal(np.asarray(image), pixels), "what was missing stood behind the pixels"
