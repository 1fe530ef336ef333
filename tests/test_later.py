"""Promised arrays: kept one after the other, on disk as Orbax has them, read in parts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fundus_jax import files, later
from fundus_jax.later import Later

VALUES = {
    "params.a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "params.b.weight": np.arange(6, dtype=jnp.bfloat16),
    "scale": np.asarray(3, np.float32),
}


def promised() -> dict[str, Later]:
    return {
        name: Later(
            value.shape,
            value.dtype,
            lambda i, piece, value=value: (value[i] if value.ndim == 3 else value)[piece].copy(),
            stacked=value.ndim == 3,
        )
        for name, value in VALUES.items()
    }


def test_orbax_restores_what_was_promised(tmp_path: Path) -> None:
    later.save_later(tmp_path / "state", promised())
    wanted = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in VALUES.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        found = orbax.restore(tmp_path / "state", args=ocp.args.PyTreeRestore(item=wanted))
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize("stacked", [False, True])
def test_few_arrays_are_there_at_a_time(tmp_path: Path, stacked: bool) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def make(i: int, piece: files.Piece) -> np.ndarray:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        value = np.full((512, 512), len(made), np.float32)[piece]
        made.append(weakref.ref(value))
        return value

    if stacked:
        promise = {"p": Later((9, 512, 512), np.dtype(np.float32), make, stacked=True)}
    else:
        promise = {f"p{i}": Later((512, 512), np.dtype(np.float32), make) for i in range(9)}
    later.save_later(tmp_path / "state", promise)
    assert len(alive) == 9
    assert max(alive) <= (later.AHEAD + 1 if stacked else 0)


def test_an_error_while_making_one_is_the_callers(tmp_path: Path) -> None:
    def fail(i: int, piece: files.Piece) -> np.ndarray:
        raise OSError("the shard is gone")

    with pytest.raises(OSError, match="the shard is gone"):
        later.save_later(tmp_path / "state", {"p": Later((2,), np.dtype(np.float32), fail)})


def test_a_layer_lies_in_chunks_of_its_own(tmp_path: Path) -> None:
    later.save_later(tmp_path / "state", promised())
    array = later.open_array(tmp_path / "state", "params.a")
    assert array.chunk_layout.read_chunk.shape == (1, 3, 4)
    np.testing.assert_array_equal(later.read(array), VALUES["params.a"])
    np.testing.assert_array_equal(later.read(array[1]), VALUES["params.a"][1])


def test_what_is_large_lies_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 20)
    later.save_later(tmp_path / "state", promised())
    for name, value in VALUES.items():
        array = later.open_array(tmp_path / "state", name)
        np.testing.assert_array_equal(later.read(array), value)
        if value.nbytes > 20:
            assert np.prod(array.chunk_layout.read_chunk.shape) * value.itemsize <= 20


@pytest.mark.parametrize("devices", [1, 2])  # two: as the bundles of sharded runs are, a chunk each
def test_what_is_compressed_is_read_as_a_whole(tmp_path: Path, devices: int) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    value = jax.device_put(jnp.arange(12.0).reshape(3, 4), place)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        orbax.save(tmp_path / "state", args=ocp.args.PyTreeSave({"p": value}))
    array = later.open_array(tmp_path / "state", "p")
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(later.read(array[1]), np.arange(4.0, 8.0))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((7, 2), [2, 2, 2, 1]),
        ((8, 2), [2, 2, 2, 2]),
        ((9, 3), [1] * 9),
        ((9, 1), [3, 3, 3]),
        ((3, 100), [1, 1, 1]),
        ((6,), [3, 3]),
        ((0, 4), []),
    ],
)
def test_pieces_are_rows_of_about_one_size(
    shape: tuple[int, ...], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", 16)
    found = files.pieces(shape, 4)
    assert [piece.stop - piece.start for (piece,) in found] == rows
    assert [index for (piece,) in found for index in range(shape[0])[piece]] == list(range(shape[0]))
    assert files.pieces((), 4) == [()]


def test_a_path_is_no_address(tmp_path: Path) -> None:
    """In one, %41 would be A, and what follows # or ? no part of the place."""
    for name in ("a%41b", "a#b", "a?b"):
        later.save_later(tmp_path / name, promised())
        for key, value in VALUES.items():
            assert np.array_equal(later.read(later.open_array(tmp_path / name, key)), value), name
