"""Writes that survive a crash, hashes, and listings: everything the pipeline asks of a file system.

POSIX keeps a rename atomic, but neither the bytes of a file nor its name are durable until the file and its
directory have been flushed; every write here does both. Neighbours: `jobs` commits shards with it, the data
set builders list publishers' folders with it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fundus_jax.records import ConfigError, DataError


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(value: object) -> str:
    """Hex SHA-256 of a JSON value in canonical form; TypeError or ValueError for what is not JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush one file, or one directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write `data` to `path`; a reader sees all of it or the old file, at any moment and after any crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """Raise ConfigError where the disk of `folder` gets full within the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"{folder}: the disk is full ({error}); make room: the same command then goes on from here"
        ) from error


def require_free(folder: Path, needed: int) -> None:
    """Raise ConfigError if the file system of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: {free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB are needed; "
            "make room, or choose an output directory on another disk"
        )


def listing(folder: Path, suffixes: Sequence[str], *, most: int = 1_000_000) -> list[Path]:
    """Files directly in `folder` with one of `suffixes` (any case), by name; hidden files are left out.

    A link that leads out of `folder` is refused: a publisher's archive has no use for one. Raises DataError
    for that, for a missing folder, and for more than `most` entries.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check --source against the publisher's layout")
    root, wanted, found = folder.resolve(), {suffix.lower() for suffix in suffixes}, []
    for count, path in enumerate(folder.iterdir()):
        if count >= most:
            raise DataError(f"{folder}: more than {most} entries; this is not the publisher's layout")
        if path.name.startswith(".") or path.suffix.lower() not in wanted:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise DataError(f"{path}: a link that leaves {folder}; replace it by the file itself")
        if path.is_file():
            found.append(path)
    return sorted(found, key=lambda path: path.name)
