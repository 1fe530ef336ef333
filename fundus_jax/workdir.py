"""The directory of one run: its configuration, bundles, metrics, and how far each stage has come.

Stages (base, sft, grpo) follow each other; a bundle's number counts steps over all of them, so `checkpoints/`
is one line of time. Running the same command again resumes; another configuration is refused, naming the
fields that differ. The loops own their state and call `resume`, `save` and `log`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
from absl import logging

from fundus_jax import hosts, stop
from fundus_jax.checkpoints import Checkpoints
from fundus_jax.files import write_atomic
from fundus_jax.metrics import Metrics, Progress
from fundus_jax.records import ConfigError

LOCK, PATIENCE = ".lock", 60  # seconds to wait for a run that is about to leave
BEST_BY = "exam/accuracy"  # the metric by which a stage's best bundle is kept (evaluation/exam.py)


class BusyError(OSError):
    """Another process runs in this directory."""


class Workdir:
    """`path` of a run with `config` (JSON).

    Attributes:
        path: the directory. checkpoints: its bundles. metrics: its metrics.jsonl and tb/. config_hash: sha256
        of the config.
        stages: training stage -> its number of steps, in order; the caller sets it once the data says how
        many steps an epoch has.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        if "://" in str(path):
            raise ConfigError(f"--workdir={path} is no path here: mount the bucket, and give its local path")
        self.path = Path(path)
        self._lock: IO[bytes] | None = None
        self.stages: dict[str, int] = {}
        hosts.on_first(lambda: self._claim(config))
        if not (self.path / "config.json").is_file():
            raise ConfigError(
                f"process {jax.process_index()} does not see {self.path}, which the first one writes; "
                "give a --workdir on a file system that all hosts share"
            )
        # of the text that was written: a field given as 2 the first time and as 2.0 now is the same
        self.config_hash = json.loads((self.path / "config.json").read_text(encoding="utf-8"))["hash"]
        self.checkpoints = Checkpoints(self.path / "checkpoints", config_hash=self.config_hash)
        self.metrics = Metrics(self.path)
        self._best: dict[str, tuple[float, int]] = {}  # stage -> its best measurement, and after which step

    def _claim(self, config: Mapping[str, Any]) -> None:
        """Lock the directory and write config.json, or refuse when another configuration stands there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(
                f"--workdir={self.path} can not be made or written to ({error}); choose another"
            ) from error
        path, text = self.path / "config.json", json.dumps(config, indent=1, sort_keys=True)
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            changed = differences(there["config"], json.loads(text))
            if changed:
                raise ConfigError(
                    f"{self.path} was made with another configuration ({'; '.join(changed[:8])}); "
                    "go on with that one, or choose another --workdir"
                )
            return
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_atomic(path, json.dumps({"hash": digest, "config": config}, indent=1, sort_keys=True) + "\n")

    def offset(self, stage: str) -> int:
        """Number of the bundle before the first step of `stage`."""
        names = list(self.stages)
        return sum(self.stages[name] for name in names[: names.index(stage)])

    def finished(self, stage: str) -> bool:
        """Whether the last bundle of `stage` is there, and the exam after it was not left."""
        last = hosts.of_first(self.offset(stage) + self.stages[stage] in self.checkpoints.steps())
        return bool(last) and not self.owes(stage)

    def resume(self, stage: str, state: Any, iterator: Any) -> tuple[Any, int]:
        """(state, step) to go on with: those of the newest bundle of `stage`, or the given state and 0.

        Puts the data iterator at its place, and drops metrics that were logged after that bundle. The given
        arrays are deleted where a bundle takes their place, under whatever names they are held, as the first
        step of a fresh run would have donated them: there is no room for both.
        """
        first, last = self.offset(stage), self.offset(stage) + self.stages[stage]
        steps = [step for step in self.checkpoints.steps() if first < step <= last]
        done = hosts.of_first(max(steps, default=first)) - first
        later = list(self.stages)[list(self.stages).index(stage) + 1 :]
        self.metrics.rewind({stage: done} | dict.fromkeys(later, 0))
        for name in self.stages:
            self._best.pop(name, None)
            for line in self.metrics.past(name):
                self.leads(name, line["step"], line)
        if not done:
            return state, 0
        wanted = jax.tree.map(_shape, state)
        jax.tree.map(lambda leaf: leaf.delete(), state)
        bundle = self.checkpoints.restore(first + done, wanted)
        iterator.set_state(bundle.data_state)
        logging.info("%s: resumed at step %d of %d", stage, done, self.stages[stage])
        return bundle.state, done

    def leads(self, stage: str, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the metrics after `step` hold a measurement (`BEST_BY`) that is the best of the stage so
        far; of equal ones the first is. The loop then saves a bundle, which is kept till a better one comes.
        """
        value = values.get(BEST_BY)
        if value is None or math.isnan(value) or (stage in self._best and value <= self._best[stage][0]):
            return False
        self._best[stage] = (float(value), step)
        return True

    def owes(self, stage: str) -> bool:
        """Whether the exam after the newest step of `stage` was left, because the run was to stop: the line
        of the step says null then."""
        lines = self.metrics.here(stage)
        return bool(hosts.of_first(bool(lines) and lines[-1].get(BEST_BY, 0) is None))

    def make_up(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Put what the exam that was owed has measured where it would have stood. The bundle of `step`, with
        which the stage has resumed, is there already."""
        self.metrics.amend(stage, step, values)
        self.leads(stage, step, values)

    def best(self, stage: str) -> int | None:
        """The step of `stage` with the best measurement in metrics.jsonl; None where nothing was measured."""
        return best_step(self.metrics.past(stage))

    def save(self, stage: str, step: int, state: Any, iterator: Any) -> None:
        """Start to save the bundle after `step` steps of `stage`; the stage's last one is kept for good. Call
        it before the next batch is drawn, or the iterator's place is not the state's."""
        self._save(stage, step, state, iterator.get_state())

    def _save(self, stage: str, step: int, state: Any, place: Any) -> None:
        self.checkpoints.wait()
        number = self.offset(stage) + step
        if hosts.of_first(step > 0 and number not in self.checkpoints.steps()):
            self.metrics.flush()
            counters = {"stage": stage, "step": step}
            final = step == self.stages[stage]
            spared = {self.offset(name) + best for name, (_, best) in self._best.items()}
            about = {"data_state": place, "counters": counters, "final": final, "spared": spared}
            self.checkpoints.save(number, state, **about)

    @contextmanager
    def stoppable(
        self, stage: str, *, on: tuple[type[BaseException], ...] = ()
    ) -> Iterator[Callable[[int, Any, Any], None]]:
        """Around a loop of `stage`: a stop (`fundus_jax.stop`) within saves a bundle of what was kept last,
        and so does an error of the kinds `on`, which all processes raise together.

        Gives `keep(step, state, iterator)`, to be called before each step: with the state after `step` steps,
        and the iterator before it gives the next batch. Where the run is to stop, it stops there.
        """
        kept: list[tuple[int, Any, Any]] = []

        def keep(step: int, state: Any, iterator: Any) -> None:
            kept[:] = [(step, state, iterator.get_state())]
            stop.check()

        with stop.deferred():
            try:
                yield keep
            except (stop.Stopped, *on):
                for step, state, place in kept:
                    logging.info("%s: stopped after step %d of %d", stage, step, self.stages[stage])
                    self._save(stage, step, state, place)
                raise

    def params(self, stage: str, abstract_params: Any, *, best: bool = False) -> Any:
        """The parameters that `stage` ended with, or with `best` those that were measured best, if any were.
        Raises DataError if it has not finished."""
        self.checkpoints.wait()
        wanted, step = {"params": abstract_params}, (best and self.best(stage)) or self.stages[stage]
        return self.checkpoints.restore(self.offset(stage) + step, wanted, partial=True).state["params"]

    def progress(self, stage: str, start: int) -> Progress:
        """A bar (or log lines) for the steps of `stage`."""
        return Progress(self.stages[stage], stage, start=start)

    def close(self) -> None:
        """Wait for the save under way, close the metrics, and let another run have the directory."""
        self.checkpoints.close()
        self.metrics.close()
        if self._lock is not None:
            self._lock.close()


def lock(folder: Path) -> IO[bytes] | None:
    """Hold the directory of a run until the file that is returned is closed; the kernel lets go of it where
    this process dies. None, with a warning, where its file system knows no locks.

    Raises BusyError where another process holds it for longer than PATIENCE: one that is stopping may still
    write its last bundle.
    """
    file, began = open(folder / LOCK, "ab"), time.monotonic()  # noqa: SIM115 - the caller closes it
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, also on NFS
            return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logging.warning("%s can not be locked (%s): let no second run write there", folder, error)
                file.close()
                return None
            if time.monotonic() - began > PATIENCE:
                file.close()
                raise BusyError(
                    f"another run writes to {folder}: stop that one, or choose another --workdir; where none "
                    f"lives, remove {folder / LOCK}"
                ) from error
        if time.monotonic() - began < 1:
            logging.info("waiting up to %d s for another run to leave %s", PATIENCE, folder)
        time.sleep(1)


def best_step(lines: Iterable[Mapping[str, Any]]) -> int | None:
    """The step with the best measurement (`BEST_BY`) among lines of metrics.jsonl, of equal ones the first;
    None where nothing was measured."""
    found = [line for line in lines if line.get(BEST_BY) is not None]
    return max(found, key=lambda line: (line[BEST_BY], -line["step"]))["step"] if found else None


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def differences(old: Any, new: Any, field: str = "") -> list[str]:
    """Each field in which two JSON values differ, as "a.b: 1 there, 2 here"."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{field}.{key}" if field else key
            )
        ]
    return [] if old == new else [f"{field}: {old!r} there, {new!r} here"]
