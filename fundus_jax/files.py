"""Writes files whole or not at all, and seals a directory with a manifest of sizes and sha256.

A manifest answers two questions about a directory: was it finished (the manifest is written last), and is it
still what was written (every file agrees, none is missing, none is extra). It also holds its own digest, so
that no flipped bit in it passes. Neighbours: `checkpoints.py` seals bundles, `metrics.py` rewrites its file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path
from typing import Any

from absl import logging

from fundus_jax.records import DataError

FORMAT = 1
MANIFEST = "manifest.json"
THREADS = min(8, os.cpu_count() or 1)  # that read or hash files side by side
PIECE = 2**24  # bytes of an array that are read, written or compared in one go
Piece = tuple[slice, ...]  # an index of consecutive rows
Digests = dict[str, dict[str, Any]]  # name -> {"sha256", "size"}


def scratch_name(path: Path) -> Path:
    """A name beside `path` that no other process takes, not even one of the same number on another host."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def append_line(file: FileIO, line: bytes) -> None:
    """One unbuffered write of a line. A disk that fills up may take a part of it, which is taken back: the
    next one must not follow it."""
    written = file.write(line)
    if written != len(line):
        file.truncate(os.fstat(file.fileno()).st_size - written)
        raise OSError(errno.ENOSPC, "there was no room for a whole line", str(file.name))


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file that appears whole or not at all: temporary name in the same directory, fsync, rename."""
    path = Path(path)
    temporary = scratch_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the new name has to survive a power cut too


def pieces(shape: Sequence[int], itemsize: int) -> list[Piece]:
    """The indices of consecutive rows that make up an array of `shape`: in each as many as PIECE bytes hold,
    or one, but about as many in all, since zarr stores chunks of one size; `()` alone for a scalar."""
    if not shape:
        return [()]
    most = max(1, PIECE // max(1, math.prod(shape[1:]) * itemsize))
    rows = max(1, -(-shape[0] // max(1, -(-shape[0] // most))))
    return [(slice(i, min(i + rows, shape[0])),) for i in range(0, shape[0], rows)]


def flush(directory: Path) -> None:
    """What lies under `directory` and its names are on the disk when this returns."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def copy_tree(source: Path, target: Path, *, linked: tuple[str, ...] = ("*",)) -> None:
    """Copy a directory so that the copy appears whole; a copy that is there stays.

    Args:
        source: what to copy; hidden files (locks, scratch) are left out.
        target: the copy, in a folder that exists.
        linked: names like these become hard links where the file system has them. Only for files that are
            never changed in place.
    """
    if target.exists():
        return

    def copy(old: str, new: str) -> None:
        if any(fnmatch(Path(old).name, pattern) for pattern in linked):
            try:
                os.link(old, new)
                return
            except OSError as error:  # another file system, or one without links
                logging.log_first_n(logging.INFO, "copying, not linking: %s", 1, error)
        shutil.copy2(old, new)

    scratch = scratch_name(target)
    try:
        shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(".*"), copy_function=copy)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(target.parent)


def digests(directory: Path, under: str = "", known: Collection[str] = ()) -> Digests:
    """Sync and hash the files of `directory` whose names begin with `under`, but for those that are `known`:
    name -> {"sha256", "size"}. In THREADS, also beside training: a run that is to stop waits for it."""
    names = [name for name in _names(directory) if name.startswith(under) and name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _digest(directory / name, sync=True), names)
        return {
            name: {"sha256": digest, "size": size} for name, (digest, size) in zip(names, found, strict=True)
        }


def write_manifest(directory: Path, facts: dict[str, Any], known: Digests | None = None) -> None:
    """Seal `directory`: sync and hash every file in it, but for those whose digests are `known`, then write
    the manifest, which also carries `facts`."""
    known = known or {}
    files = known | digests(directory, known=known)
    for folder in {(directory / name).parent for name in files}:
        sync(folder)
    write_atomic(directory / MANIFEST, _text({"format": FORMAT, "facts": facts, "files": files}))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory: its `facts` and `files`; the files themselves are not looked at.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    path = directory / MANIFEST
    try:
        found = path.read_bytes()
        manifest = json.loads(found)
        body = {key: manifest[key] for key in ("format", "facts", "files")}
        intact = _text(body).encode() == found
    except FileNotFoundError:
        raise DataError(f"{path} is missing: what {directory} holds was never finished") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not intact:
        raise DataError(f"{path} is damaged: its text does not agree with the sha256 in it")
    if body["format"] != FORMAT:
        raise DataError(f"{path} has format {body['format']!r}, this program reads {FORMAT}")
    return body


def verify(directory: Path) -> dict[str, Any]:
    """Hash every file of a sealed directory and return the manifest.

    Raises:
        DataError: naming a file that is missing, extra, of another size or content, and what was expected.
    """
    manifest = read_manifest(directory)
    expected, found = manifest["files"], _names(directory)
    missing, extra = sorted(expected.keys() - set(found)), sorted(set(found) - expected.keys())
    if missing or extra:
        raise DataError(f"{directory}: missing files {missing}, files that do not belong there {extra}")
    for name in found:  # sizes first: they are known at once
        size = (directory / name).stat().st_size
        if size != expected[name]["size"]:
            raise DataError(f"{directory / name} has {size} bytes, expected {expected[name]['size']}")
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: _digest(directory / name)[0], found)
        for name, digest in zip(found, digests, strict=True):
            if digest != expected[name]["sha256"]:
                raise DataError(
                    f"{directory / name} is damaged: sha256 {digest}, expected {expected[name]['sha256']}"
                )
    return manifest


def is_intact(directory: Path) -> bool:
    """Whether `verify` accepts a directory; what is wrong is logged."""
    try:
        verify(directory)
    except DataError as error:
        logging.warning("%s", error)
        return False
    return True


def remove_sealed(directory: Path, parts: tuple[str, ...]) -> None:
    """Delete a sealed directory, manifest first, so that an interrupted deletion leaves an unfinished one.

    Args:
        directory: what to delete.
        parts: what its entries' names begin with; OSError, and nothing is deleted, if there are others.
    """
    ours = (*parts, MANIFEST)
    foreign = [entry.name for entry in directory.iterdir() if not entry.name.lstrip(".").startswith(ours)]
    if foreign:
        raise OSError(f"not deleting {directory}: {foreign} in it were not written here; move them away")
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def _names(directory: Path) -> list[str]:
    """Everything in a directory that is not a folder, but the manifest: relative names in order."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(path.relative_to(directory).as_posix() for path in paths)
    return [name for name in names if name != MANIFEST]


def _digest(path: Path, *, sync: bool = False) -> tuple[str, int]:
    """sha256 and size of a file; with `sync`, the file is on the disk when this returns."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if sync:
            os.fsync(file.fileno())
    return digest, size


def _text(body: dict[str, Any]) -> str:
    """The one text a manifest can have: sorted, with the sha256 of everything else in it."""
    plain = json.dumps(body, sort_keys=True)
    sealed = {**body, "sha256": hashlib.sha256(plain.encode()).hexdigest()}
    return json.dumps(sealed, indent=1, sort_keys=True) + "\n"


def sync(path: Path) -> None:
    """The file, or the names in the folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
