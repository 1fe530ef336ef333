"""Our safetensors writer against the library's reader: values, dtypes, alignment, shards, rights."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from fundus_jax import files
from fundus_jax.files import Piece
from fundus_jax.models import weights

CONTENT = {
    "odd": np.arange(3, dtype=ml_dtypes.bfloat16),
    "wide": np.arange(10, dtype=np.float32).reshape(2, 5).T,  # not contiguous
    "half": np.arange(4, dtype=np.float16).reshape(2, 2),
    "scalar": np.asarray(7, np.float32),
    "lachs.ä": np.ones((1, 1), np.float32),
}
ANNOUNCED = {name: (value.dtype.name, value.shape) for name, value in CONTENT.items()}


def by_library(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as handle:
        assert handle.metadata() == {"format": "pt"}
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("piece", [1, 20, files.PIECE])  # a row, two rows of the widest, all
def test_the_library_reads_what_was_written(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", piece)
    path = tmp_path / weights.SINGLE
    weights.write_file(path, ANNOUNCED, lambda name, piece: CONTENT[name][piece])
    found = by_library(path)
    assert found.keys() == CONTENT.keys()
    for name, value in CONTENT.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    opened = weights.TensorFiles(tmp_path)
    assert all(entry.start % np.dtype(entry.dtype).itemsize == 0 for entry in opened.entries.values())
    for name, value in CONTENT.items():
        np.testing.assert_array_equal(opened.read(name), value)
        for index in files.pieces(value.shape, value.itemsize):
            np.testing.assert_array_equal(opened.map(name, index), value[index])
    np.testing.assert_array_equal(opened.read("wide", (slice(1, 4), slice(1, 2))), CONTENT["wide"][1:4, 1:2])


def test_shards_hold_at_most_what_they_may(tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(name: str, piece: Piece) -> np.ndarray:
        asked.append(name)
        return CONTENT[name][piece]

    weights.write_tensors(tmp_path, ANNOUNCED, fetch, max_shard=46)
    index = json.loads((tmp_path / weights.INDEX).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in CONTENT.values())
    assert index["weight_map"] == {
        name: f"model-0000{shard}-of-00002.safetensors"
        for name, shard in {"odd": 1, "wide": 1, "half": 2, "scalar": 2, "lachs.ä": 2}.items()
    }
    assert sorted(asked) == sorted(CONTENT)  # one piece each
    assert all(np.array_equal(weights.TensorFiles(tmp_path).read(name), CONTENT[name]) for name in CONTENT)


def test_a_tensor_that_is_not_the_one_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"odd is float32 \(3,\), announced as .*bfloat16"):
        weights.write_file(tmp_path / "x", ANNOUNCED, lambda name, piece: CONTENT[name].astype(np.float32))
