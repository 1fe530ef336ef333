"""Keeps the bundles of a run: model and optimizer state, place in the data, counters, config hash.

Orbax writes the arrays and commits them by a rename, but it restores a flipped weight bit without a word.
So each bundle is sealed with a manifest of sha256, written last: a bundle without one was never finished, and
one that does not agree with it is refused. The loops save and resume through here, `convert.py` and
`evaluation/` read. Neighbours: `bundle.py` has the content of a bundle, `files.py` the manifest.

    directory/<step>/bundle.json     config hash, counters, place in the data; a table of the arrays
    directory/<step>/state/          the arrays, in Orbax's own layout
    directory/<step>/manifest.json   size and sha256 of all of the above
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from fundus_jax import bundle, files, hosts
from fundus_jax.bundle import Bundle
from fundus_jax.files import MANIFEST
from fundus_jax.records import ConfigError, DataError

CONTENT, STATE = "bundle.json", "state"
HEADROOM = 1.2  # free space that a save asks for, as a multiple of the bundle's size
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


class SaveError(OSError):
    """A bundle could not be written. Those saved before it are untouched."""


class Checkpoints:
    """The bundles of one run, `directory/<step>/`, on a local or mounted directory.

    With several processes all of them call `save`, `wait` and `restore` together, on a directory that all
    see; process 0 writes everything but the arrays. Only `save` deletes anything: what an interrupted save
    left, and bundles older than the newest `keep` unless `final` or `spared`. So others may read while one
    trains.
    """

    def __init__(self, directory: str | os.PathLike[str], *, config_hash: str, keep: int = 2) -> None:
        if "://" in os.fspath(directory):
            raise ConfigError(f"no checkpoints under {directory}: mount the bucket and give its local path")
        if keep < 1:
            raise ConfigError(f"keep is {keep}; the newest bundle has to stay: keep >= 1")
        self.directory = Path(os.path.abspath(directory))
        self.config_hash, self.keep = config_hash, keep
        options = ocp.AsyncOptions(timeout_secs=3600)
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: bytes | dict,
        counters: dict,
        final: bool = False,
        spared: Collection[int] = (),
    ) -> None:
        """Start to save; returns when the arrays are copied, so that `state` may then be donated.

        Args:
            step: names the bundle; a step is saved once.
            state: any pytree of arrays (no typed PRNG keys, no empty arrays).
            data_state: where the data iterator stands; the same on every process.
            counters: whatever else the loop needs to go on; plain JSON, the same on every process.
            final: the bundle ends a stage and is never pruned.
            spared: steps whose bundles are not pruned either, this time.

        Raises:
            SaveError: the save before this one failed, or less than 1.2 times the bundle's size is free.
            ConfigError: `step` is already saved.
            DataError: `state`, `data_state` or `counters` can not be stored faithfully.
        """
        self.wait()
        if not _STEP.fullmatch(str(step)):
            raise ConfigError(f"step is {step!r}; it has to be a whole number from 0")
        arrays = bundle.named_leaves(state)
        text = bundle.to_text(step, self.config_hash, arrays, data_state, counters)
        _require_same_everywhere(step, text)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values()) + len(text)
        path = self._path(step)
        hosts.on_first(lambda: self._open(step, size, text))
        try:
            self._orbax.save(path / STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            shutil.rmtree(path, ignore_errors=True)
            raise self._save_error(step, error) from error
        self._thread = threading.Thread(
            target=self._commit, args=(step, final, frozenset(spared)), name=f"save-{step}"
        )
        self._thread.start()

    def adopt(self, step: int, source: Path) -> None:
        """Take the finished bundle of `step` over from the directory of another run: its arrays as they are,
        sealed anew under this run's config hash. The caller knows that both configurations lead to it.

        With several processes only one calls this. Raises DataError where the other bundle is not intact.
        """
        path, other = self._path(step), source / str(step)
        facts = files.verify(other)["facts"]
        if step in self.steps():
            raise ConfigError(f"{path} is already saved; a bundle is not replaced")
        if path.exists():
            files.remove_sealed(path, (CONTENT, STATE))  # an adoption that was interrupted
        path.mkdir(parents=True)
        files.copy_tree(other / STATE, path / STATE)
        files.write_atomic(path / CONTENT, bundle.under((other / CONTENT).read_text(), self.config_hash))
        files.write_manifest(path, facts)

    def wait(self) -> None:
        """Wait for the save under way, and raise SaveError if it failed.

        Call it before the program ends, also by an exception: the interpreter's shutdown stops Orbax.
        """
        if self._thread is not None:
            hosts.raise_everywhere(self._joined())

    def close(self) -> None:
        """Wait like `wait`, for a process that may be leaving alone: the others are not asked."""
        if failure := self._joined():
            raise failure

    def _joined(self) -> SaveError | None:
        """What became of the save under way, once it has ended."""
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        return failure

    def steps(self) -> list[int]:
        """Steps with a finished bundle, in order. A damaged one is among them: nobody skips it unseen."""
        return sorted(int(path.name) for path in self._folders() if (path / MANIFEST).exists())

    def latest(self) -> int | None:
        """The newest finished step; None where there is none."""
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract_state: Any, *, partial: bool = False) -> Bundle:
        """Read a bundle, after checking the sha256 of every file of it.

        Args:
            step: one of `steps()`.
            abstract_state: a pytree of ShapeDtypeStruct (or arrays). A leaf is placed by its `sharding`,
                whatever it was saved with; without one on the first device, or with several processes on all.
            partial: the bundle may hold more arrays than asked for, as when only the weights are wanted.

        Raises:
            DataError: there is no such bundle, or a file of it is wrong, missing or too many.
            ConfigError: it was saved under another config hash, or holds other arrays than asked for.
        """
        self.wait()
        path = self._path(step)
        hosts.on_first(lambda: self._verify(step))
        text = (path / CONTENT).read_text()
        content = bundle.from_text(text, path, step=step, config_hash=self.config_hash)
        wanted = bundle.named_leaves(abstract_state)
        bundle.require_arrays(path, content["arrays"], wanted, partial=partial)
        arguments = ocp.args.PyTreeRestore(
            item={name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()},
            restore_args={name: bundle.restore_args(leaf) for name, leaf in wanted.items()},
            partial_restore=partial,
        )
        arrays = self._orbax.restore(path / STATE, args=arguments)
        return Bundle(
            step=step,
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]),
            data_state=content["data_state"],
            counters=content["counters"],
        )

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _folders(self) -> list[Path]:
        entries = self.directory.iterdir() if self.directory.is_dir() else []
        return [path for path in entries if _STEP.fullmatch(path.name) and path.is_dir()]

    def _open(self, step: int, size: int, text: str) -> None:
        """Make the bundle's folder with its JSON part, after removing what interrupted saves left."""
        path = self._path(step)
        if step in self.steps():
            raise ConfigError(f"{path} is already saved; save a step once, final=True if it ends a stage")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for other in self._folders():
                if not (other / MANIFEST).exists():
                    logging.warning("removing %s: its save was never finished", other)
                    files.remove_sealed(other, (CONTENT, STATE))
            free, needed = shutil.disk_usage(self.directory).free, HEADROOM * size
            if free < needed:
                raise OSError(f"{free / 1e6:.1f} MB are free, {HEADROOM} x its size is {needed / 1e6:.1f} MB")
            path.mkdir()
            files.write_atomic(path / CONTENT, text)
        except OSError as error:
            raise self._save_error(step, error) from error

    def _commit(self, step: int, final: bool, spared: frozenset[int]) -> None:
        """Runs in the background: when Orbax has committed the arrays, write the manifest, then prune. Each
        process hashes what it wrote; the first one everything else."""
        path = self._path(step)
        try:
            self._orbax.wait_until_finished()
            own: files.Digests | None = None
            try:
                own = files.digests(path, f"{STATE}/ocdbt.process_{jax.process_index()}/")
            finally:  # the first one waits for it
                parts = hosts.to_first(own)
            if parts:
                lost = [process for process, part in enumerate(parts) if part is None]
                if lost:
                    raise OSError(f"processes {lost} could not make sure of what they wrote: see their logs")
                known = {name: digest for part in parts for name, digest in part.items()}
                files.write_manifest(path, {"step": step, "final": final}, known)
                self._prune(spared)
        except BaseException as error:  # whatever it is, `wait` raises it in the caller's thread
            logging.error("saving step %d: %s", step, error)
            if jax.process_index() == 0 and not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)  # a full disk needs the space
            self._failure = self._save_error(step, error)
            self._failure.__cause__ = error

    def _prune(self, spared: frozenset[int]) -> None:
        for step in self.steps()[: -self.keep]:
            try:
                if step not in spared and not files.read_manifest(self._path(step))["facts"]["final"]:
                    files.remove_sealed(self._path(step), (CONTENT, STATE))
            except DataError as error:
                logging.warning("not pruned: %s", error)

    def _save_error(self, step: int, error: BaseException) -> SaveError:
        what = "was saved, but not all older ones removed," if step in self.steps() else "was not saved"
        return SaveError(
            f"step {step} {what} in {self.directory}: {type(error).__name__}: {error}. Free some space or "
            f"mend the disk, then run again: it goes on from the newest finished step, {self.latest()}"
        )

    def _verify(self, step: int) -> None:
        """Check every file; DataError says which earlier step could be used instead."""
        path = self._path(step)
        if step not in self.steps():
            raise DataError(f"{path} is not a finished bundle; finished steps are {self.steps()}")
        try:
            files.verify(path)
        except DataError as error:
            earlier = [old for old in self.steps() if old < step and files.is_intact(self._path(old))]
            remedy = "no earlier step is intact: start again in another workdir"
            if earlier:
                remedy = f"step {earlier[-1]} is intact: move {path} away to go on from there"
            raise DataError(f"{error}; {remedy}") from error


def _require_same_everywhere(step: int, text: str) -> None:
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(digest) != digest):
        raise ConfigError(
            f"step {step}: data_state or counters differ between processes; save what is global"
        )
