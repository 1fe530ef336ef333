"""Listings that stay in their folder, writes that appear whole."""

import pytest

from data_pipeline import files
from fundus_jax.records import ConfigError, DataError


def test_listing_is_sorted_and_blind_to_case_and_hidden_files(tmp_path):
    for name in ("b.JPG", "a.jpg", ".c.jpg", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "e.jpg").mkdir()
    assert [path.name for path in files.listing(tmp_path, [".jpg"])] == ["a.jpg", "b.JPG"]


def test_listing_refuses_what_leads_out(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (inside / "a.jpg").write_bytes(b"x")
    (inside / "b.jpg").symlink_to(inside / "a.jpg")
    assert len(files.listing(inside, [".jpg"])) == 2
    (inside / "c.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match="c.jpg: a link that leaves"):
        files.listing(inside, [".jpg"])


def test_listing_is_bounded_and_names_missing_folders(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="more than 4 entries"):
        files.listing(tmp_path, [".jpg"], most=4)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        files.listing(tmp_path / "nowhere", [".jpg"])


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_digest_does_not_depend_on_order_and_refuses_what_is_not_json():
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1})
    assert files.digest("1") != files.digest(1)
    with pytest.raises(ValueError, match="JSON"):
        files.digest(float("nan"))
    with pytest.raises(TypeError):
        files.digest({1, 2})


def test_little_room(tmp_path):
    files.require_free(tmp_path, 1)
    with pytest.raises(ConfigError, match="make room"):
        files.require_free(tmp_path, 1 << 60)
