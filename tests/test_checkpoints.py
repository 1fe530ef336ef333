"""Checkpoints give back the same bits or say why not: damage, foreign runs, full disks, donation."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fundus_jax import files, hosts
from fundus_jax.bundle import Bundle
from fundus_jax.checkpoints import Checkpoints, SaveError
from fundus_jax.records import ConfigError, DataError


def make_state(seed: int = 0) -> dict[str, Any]:
    """A small state with the dtypes that occur, and the values that a fill value could swallow."""
    rng = np.random.default_rng(seed)
    weights = {
        "text.layers": {"q_proj": jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)},
        "embed": jnp.asarray(rng.normal(size=(16, 4)), jnp.bfloat16),
        "zeros": jnp.zeros((4, 4)),
        "minus_zeros": jnp.full((4, 4), -0.0),
        "nans": jnp.asarray(np.array([0x7FC00001, 0xFFC12345, 0x7F800000], np.uint32).view(np.float32)),
    }
    moments = (
        {"count": jnp.int32(7)},
        [jnp.asarray(rng.integers(-9, 9, 5), jnp.int8)],
        jnp.array([True, False]),
    )
    return {"params": weights, "opt": moments, "key": jax.random.key_data(jax.random.key(seed))}


def abstract(state: Any) -> Any:
    """Shapes and dtypes only."""
    return jax.eval_shape(lambda: state)


def bits(state: Any) -> list[tuple[str, str, bytes]]:
    """Everything about the leaves that may not change."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), str(x.dtype), np.asarray(x).tobytes()) for path, x in leaves]


def saved(directory: Path, *steps: int, **options: Any) -> Checkpoints:
    """Checkpoints with finished bundles at `steps`, each with a state of its own."""
    checkpoints = Checkpoints(directory, config_hash="abc", **options)
    for step in steps:
        checkpoints.save(step, make_state(step), data_state={"next": step}, counters={"seen": step})
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("data_state", [b"\x00\xff{", {"last_seen": {"0": 41}, "name": "\u0153il"}])
def test_round_trip_is_bitwise(tmp_path: Path, data_state: bytes | dict) -> None:
    state = make_state()
    checkpoints = Checkpoints(tmp_path, config_hash="abc")
    checkpoints.save(
        12, state, data_state=data_state, counters={"tokens": 2**60, "loss": 0.1, "stage": "sft"}
    )
    checkpoints.wait()
    bundle = Checkpoints(tmp_path, config_hash="abc").restore(12, abstract(state))
    assert isinstance(bundle, Bundle)
    assert bits(bundle.state) == bits(state)
    assert jax.tree.structure(bundle.state) == jax.tree.structure(state)
    assert bundle.data_state == data_state
    assert bundle.counters == {"tokens": 2**60, "loss": 0.1, "stage": "sft"}


def test_nothing_saved_is_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", config_hash="abc")
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    assert not (tmp_path / "none").exists(), "a program that only reads makes no folder"
    with pytest.raises(DataError, match="not a finished bundle"):
        checkpoints.restore(3, abstract(make_state()))


def test_partial_restore_reads_the_weights_alone(tmp_path: Path) -> None:
    wanted = abstract({"params": make_state(1)["params"]})
    checkpoints = saved(tmp_path, 1)
    assert bits(checkpoints.restore(1, wanted, partial=True).state) == bits(
        {"params": make_state(1)["params"]}
    )
    with pytest.raises(ConfigError, match="in it but not asked for"):
        checkpoints.restore(1, wanted)


def test_another_state_is_refused_with_every_difference(tmp_path: Path) -> None:
    wanted = abstract(make_state(1))
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    wanted["params"]["zeros"] = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    wanted["params"]["new"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(ConfigError, match="3 differ") as caught:
        saved(tmp_path, 1).restore(1, wanted)
    for text in ("params.embed is ['bfloat16'", "params.zeros is", "params.new is not in it"):
        assert text in str(caught.value)


def test_other_config_hash_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(ConfigError, match="config hash abc, this run has xyz"):
        Checkpoints(tmp_path, config_hash="xyz").restore(1, abstract(make_state()))


def test_flip_of_one_bit_is_found_in_every_file(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    rng = np.random.default_rng(0)
    folder = tmp_path / "2"
    names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kinds = {path.name for path in names}
    assert {"manifest.json", "bundle.json", "_METADATA", "_sharding", "manifest.ocdbt", "process_0"} <= kinds
    for path in names:
        good = path.read_bytes()
        for position in {0, len(good) - 1, *rng.integers(0, len(good), 4).tolist()}:
            bad = bytearray(good)
            bad[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            with pytest.raises(DataError, match="step 1 is intact: move .*/2 away"):
                checkpoints.restore(2, abstract(make_state()))
        path.write_bytes(good)
    assert bits(checkpoints.restore(2, abstract(make_state())).state) == bits(make_state(2))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edited_manifest(path: Path) -> None:
    manifest = path.parents[1] / "manifest.json"
    text = manifest.read_text()
    assert text.count('"final": false') == 1
    manifest.write_text(text.replace('"final": false', '"final": true'))


def _renamed_step(path: Path) -> None:
    shutil.rmtree(path.parents[1])
    shutil.copytree(path.parents[2] / "1", path.parents[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "_METADATA has .* bytes, expected"),
        (Path.unlink, r"missing files \['state/_METADATA'\]"),
        (lambda path: (path.parent / "more").touch(), r"do not belong there \['state/more'\]"),
        (
            lambda path: (path.parent / "link").symlink_to("/dev/null"),
            r"do not belong there \['state/link'\]",
        ),
        (_renamed_step, "holds step 1, expected 2"),
        (_edited_manifest, "manifest.json is damaged: its text does not agree"),
        (lambda path: (path.parents[1] / "manifest.json").write_text(""), "manifest.json is damaged"),
        (lambda path: (path.parents[1] / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
    ],
)
def test_other_damage_is_found(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "2" / "state" / "_METADATA")
    assert checkpoints.latest() == 2, "a damaged bundle is not passed over in silence"
    with pytest.raises(DataError, match=message):
        checkpoints.restore(2, abstract(make_state()))


def test_with_every_step_damaged_the_message_says_so(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for step in "12":
        _truncate(tmp_path / step / "bundle.json")
    with pytest.raises(DataError, match="no earlier step is intact"):
        checkpoints.restore(2, abstract(make_state()))


def test_keep_newest_and_all_final(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, config_hash="abc", keep=2)
    for step in range(1, 7):
        checkpoints.save(step, make_state(step), data_state={}, counters={}, final=step in (2, 5))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert bits(checkpoints.restore(2, abstract(make_state())).state) == bits(make_state(2))


def test_unfinished_bundles_are_ignored_then_removed_by_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "7" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path, config_hash="abc")
    assert checkpoints.steps() == [1]
    with pytest.raises(DataError, match="not a finished bundle"):
        checkpoints.restore(2, abstract(make_state()))
    assert (tmp_path / "7").exists(), "reading deletes nothing"
    with caplog.at_level(logging.WARNING):
        checkpoints.save(2, make_state(5), data_state={}, counters={})
        checkpoints.wait()
    assert caplog.text.count("its save was never finished") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "notes"]
    assert bits(checkpoints.restore(2, abstract(make_state())).state) == bits(make_state(5))


def test_folders_of_others_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "thesis.tex").touch()
    with pytest.raises(SaveError, match="thesis.tex"):
        Checkpoints(tmp_path, config_hash="abc").save(1, make_state(), data_state={}, counters={})
    assert (tmp_path / "2024" / "thesis.tex").exists()


def test_donated_buffers_do_not_reach_the_bundle(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    state = step({str(i): jnp.full((1_000_000,), i, jnp.float32) for i in range(8)})
    expected = bits(state)
    like = abstract(state)
    checkpoints = Checkpoints(tmp_path, config_hash="abc")
    checkpoints.save(1, state, data_state={}, counters={})
    for _ in range(3):  # overwrites the buffers while they are being written
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored = checkpoints.restore(1, like).state
    assert bits(restored) == expected
    jax.block_until_ready(step(restored))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored)), (
        "a resumed run must be able to donate"
    )


def test_save_returns_before_the_bundle_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, write = threading.Event(), files.write_manifest

    def slow(*arguments: Any) -> None:
        assert release.wait(60)
        write(*arguments)

    monkeypatch.setattr(files, "write_manifest", slow)
    checkpoints = Checkpoints(tmp_path, config_hash="abc")
    checkpoints.save(1, make_state(), data_state={}, counters={})
    assert checkpoints.latest() is None
    release.set()
    checkpoints.wait()
    assert checkpoints.latest() == 1


def test_the_files_of_a_bundle_are_hashed_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first four wait for each other: a run that is to stop has seconds, and one core hashes 2 GB in
    one."""
    monkeypatch.setattr(files, "THREADS", 4)
    together, begun, digest = threading.Barrier(4), iter(range(1000)), files._digest

    def slow(path: Path, *, sync: bool = False) -> tuple[str, int]:
        if next(begun) < 4:
            together.wait(timeout=60)
        return digest(path, sync=sync)

    monkeypatch.setattr(files, "_digest", slow)
    checkpoints = saved(tmp_path, 1)
    assert next(begun) > 4
    assert files.is_intact(tmp_path / "1")
    assert checkpoints.latest() == 1


def test_failure_in_the_background_is_raised_by_the_next_save_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", full)
        checkpoints.save(2, make_state(2), data_state={}, counters={})
        checkpoints._thread.join()
    with pytest.raises(
        SaveError, match="step 2 was not saved .*No space left on device.*newest finished step, 1"
    ):
        checkpoints.save(3, make_state(3), data_state={}, counters={})
    assert not (tmp_path / "2").exists(), "a full disk gets its space back"
    checkpoints.save(3, make_state(3), data_state={}, counters={})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_nothing_is_sealed_that_another_process_could_not_make_sure_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk says at fsync that it is full: the first process must not hash what happens to lie there."""
    checkpoints = saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "to_first", lambda own: [own, None])
        checkpoints.save(2, make_state(2), data_state={}, counters={})
        checkpoints._thread.join()
    with pytest.raises(SaveError, match=r"processes \[1\] could not make sure of what they wrote"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert not (tmp_path / "2").exists()


def test_disk_that_takes_no_more_bytes(tmp_path: Path) -> None:
    """A real failed write below Orbax, by a limit on the size of files."""
    checkpoints = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"w": jnp.asarray(np.random.default_rng(0).normal(size=500_000), jnp.float32)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(SaveError, match="step 2 was not saved"):  # noqa: PT012 - either may raise
            checkpoints.save(2, noise, data_state={}, counters={})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.latest() == 1
    assert bits(checkpoints.restore(1, abstract(make_state())).state) == bits(make_state(1))
    checkpoints.save(2, noise, data_state={}, counters={})
    checkpoints.wait()
    assert bits(checkpoints.restore(2, abstract(noise)).state) == bits(noise)


def test_too_little_free_space_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)
    size = 4_000_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.19 * size)))
    with pytest.raises(SaveError, match="4.8 MB are free, 1.2 x its size is 4.8 MB"):
        checkpoints.save(2, {"w": jnp.ones(size // 4)}, data_state={}, counters={})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.21 * size)))
    checkpoints.save(2, {"w": jnp.ones(size // 4)}, data_state={}, counters={})
    checkpoints.wait()
    assert checkpoints.latest() == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 1}, ConfigError, "already saved"),
        ({"step": -1}, ConfigError, "whole number from 0"),
        ({"counters": {"mean": np.float32(1)}}, DataError, "not plain JSON"),
        ({"counters": {"loss": float("nan")}}, DataError, "not plain JSON"),
        ({"data_state": {"at": (1, 2)}}, DataError, "would change in JSON"),
        ({"data_state": {1: 2}}, DataError, "would change in JSON"),
        ({"state": lambda: {"n": 3}}, DataError, "n is a int"),
        ({"state": lambda: {"w": np.ones(3)}}, DataError, "w is a ndarray"),
        ({"state": lambda: {"w": jnp.zeros((0, 3))}}, DataError, "no empty array"),
        ({"state": lambda: {"key": jax.random.key(0)}}, DataError, "key_data"),
        (
            {"state": lambda: {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}},
            DataError,
            "leaves are called 'a.b'",
        ),
    ],
)
def test_what_can_not_be_stored_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    checkpoints = saved(tmp_path, 1)
    call = {"step": 2, "state": lambda: {"w": jnp.ones(2)}, "data_state": {}, "counters": {}, **change}
    with pytest.raises(error, match=message):
        checkpoints.save(call.pop("step"), call.pop("state")(), **call)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(("directory", "keep"), [("gs://bucket/run", 2), ("run", 0)])
def test_bad_arguments_are_refused(directory: str, keep: int) -> None:
    with pytest.raises(ConfigError):
        Checkpoints(directory, config_hash="abc", keep=keep)


def test_manifest_text_is_json_that_people_can_read(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["facts"] == {"final": False, "step": 1}
    assert manifest["files"]["bundle.json"]["size"] == (tmp_path / "1" / "bundle.json").stat().st_size
