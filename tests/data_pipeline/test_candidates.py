"""The table finds the copy of a picture among many, mirrored or not, however they are cut into shards."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline import candidates, near

MANY = 400


@pytest.fixture(scope="module")
def prints() -> np.ndarray:
    """Made-up keypoints; picture 7 is a copy of 399, picture 8 mirrors 300, picture 9 has none."""
    rng = np.random.default_rng(0)
    made = np.zeros(MANY, near.PRINT)
    made["count"] = 60
    made["descriptors"] = rng.gamma(0.4, 40, made["descriptors"].shape).clip(0, 255)
    noise = rng.normal(0, 12, made["descriptors"].shape[2:])
    made["descriptors"][7, :, :20] = (made["descriptors"][399, :, :20] + noise[:20]).clip(0, 255)
    made["descriptors"][8, ::-1, 10:30] = (made["descriptors"][300, :, 10:30] + noise[:20]).clip(0, 255)
    made["count"][9] = 0
    return made


@pytest.mark.parametrize("size", [MANY, 130])
def test_copies_are_candidates(prints: np.ndarray, size: int, tmp_path: Path) -> None:
    shards = [prints[start : start + size] for start in range(0, MANY, size)]
    table = candidates.build(shards, tmp_path)
    assert len(table.pictures) == 60 * (MANY - 1)
    found: list[np.ndarray] = []
    for number, shard in enumerate(shards):
        found.append(candidates.search(table, shard, number * size))
    pairs = np.concatenate(found)
    assert {(7, 399), (399, 7), (8, 300), (300, 8)} <= set(map(tuple, pairs.tolist()))
    assert 9 not in pairs
    assert not np.any(pairs[:, 0] == pairs[:, 1])
    assert np.bincount(pairs[:, 0]).max() <= candidates.MOST


def test_a_table_that_is_there_is_read(prints: np.ndarray, tmp_path: Path) -> None:
    candidates.build([prints], tmp_path)
    made = (tmp_path / "descriptors.npy").stat().st_mtime_ns
    again = candidates.build([prints], tmp_path)
    assert (tmp_path / "descriptors.npy").stat().st_mtime_ns == made
    assert np.all(np.diff(again.starts) >= 0)
    assert again.starts[-1] == len(again.pictures)
    (tmp_path / "starts.npy").unlink()  # as if killed before the end
    candidates.build([prints], tmp_path)
    assert (tmp_path / "starts.npy").is_file()
