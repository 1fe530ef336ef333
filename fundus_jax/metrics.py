"""Writes what a run measures: `metrics.jsonl` and TensorBoard files, always, and to Weights & Biases where
asked; and shows how far it is.

The JSONL file is the record that reports are made from, so it survives a kill: lines are appended whole, a
torn last line is dropped, and `rewind` takes back what a resumed run will measure again. Process 0 writes,
the others do nothing. Neighbours: the loops log here; `report.py` reads the file.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tensorboardX import SummaryWriter
from tqdm import tqdm

from fundus_jax import hosts
from fundus_jax.files import append_line, write_atomic
from fundus_jax.records import ConfigError, DataError

STAGES = ("data", "base", "sft", "grpo", "evaluate")
RESERVED = ("stage", "step", "time")


class Metrics:
    """`workdir/metrics.jsonl` and `workdir/tb/<stage>/`, both appended to.

    A line is {"stage": ..., "step": ..., "time": seconds since 1970, NAME: number, ...}. A number that is not
    finite is written as null, because JSON has no NaN.
    """

    def __init__(self, workdir: str | Path) -> None:
        self.path = Path(workdir) / "metrics.jsonl"
        self._boards: dict[str, SummaryWriter] = {}
        self._purge: dict[str, int] = {}  # stage -> first step that a board has to forget
        self._wandb: Any = None
        self._file = None
        if jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def join_wandb(self, project: str, config: Mapping[str, Any]) -> None:
        """Log to Weights & Biases too, from here on; a workdir is one run there, also when it is resumed.

        Its own variables say how: WANDB_MODE=offline, WANDB_API_KEY, WANDB_ENTITY, ... It takes nothing back:
        what a resumed run does again is there twice.

        Args:
            project: its name there.
            config: what the run is shown with.

        Raises:
            ConfigError: the package, which is optional, is missing.
        """
        if self._file is None:
            return
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"Weights & Biases was asked for (project {project!r}), but its package can not be imported "
                f"({error}); pip install wandb, or leave --wandb out"
            ) from error
        folder = self.path.parent
        known = folder / "wandb_run.txt"
        if not known.exists():
            write_atomic(known, uuid.uuid4().hex[:16] + "\n")
        self._wandb = wandb.init(
            project=project,
            name=folder.name,
            id=known.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        for stage in STAGES:
            self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, safe from a kill of this process when it returns.

        Args:
            stage: one of STAGES.
            step: of that stage.
            values: numbers or scalar arrays by name, e.g. {"loss": 0.3, "reward/format": 0.9}.

        Raises:
            ConfigError: for an unknown stage or a reserved name.
        """
        if stage not in STAGES:
            raise ConfigError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ConfigError(f"metrics of {stage} may not be called {taken}: the line itself has these")
        if self._file is None:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3), **numbers}
        append_line(self._file, _line(line))
        self._show(stage, step, numbers)

    def amend(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Write `values` into the line that a step has already, in the place of what it said of these names;
        a kill leaves the one line or the other. Raises DataError as `past` does."""
        if self._file is None:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        lines = self.path.read_bytes().splitlines(keepends=True)
        for at, line in enumerate(lines):
            if _stage_and_step(line, f"{self.path}:{at + 1}") == (stage, step):
                lines[at] = _line(json.loads(line) | numbers)
        self._replace(lines)
        self._show(stage, step, numbers)

    def _show(self, stage: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Give a step's numbers to whoever draws them."""
        board = self._board(stage)
        for name, number in numbers.items():
            board.add_scalar(name, math.nan if number is None else number, step)
        if self._wandb is not None:
            known = {f"{stage}/{name}": number for name, number in numbers.items() if number is not None}
            self._wandb.log({f"{stage}/step": int(step), **known})

    def past(self, stage: str) -> list[dict[str, Any]]:
        """The lines of a stage, as logged; all processes get the first one's. Raises as `here`."""
        return hosts.gather(self.here(stage))[0]

    def here(self, stage: str) -> list[dict[str, Any]]:
        """The lines of a stage, as logged, on the process that writes them; none on the others.

        Raises DataError for a line that is not what this class writes; names file and line.
        """
        found = []
        if self._file is not None:
            for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
                if _stage_and_step(line, f"{self.path}:{number}")[0] == stage:
                    found.append(json.loads(line))
        return found

    def rewind(self, stage_steps: Mapping[str, int]) -> None:
        """Drop the lines that a run resumed from a checkpoint will write again.

        Args:
            stage_steps: for each stage to rewind, the last step that stays; -1 drops all of it. Other stages
                stay as they are.

        Raises:
            ConfigError: for an unknown stage.
            DataError: a line is not what this class writes; names file and line.
        """
        unknown = sorted(set(stage_steps) - set(STAGES))
        if unknown:
            raise ConfigError(f"stages {unknown} are not among {', '.join(STAGES)}")
        if self._file is None:
            return
        kept, dropped = [], 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            stage, step = _stage_and_step(line, f"{self.path}:{number}")
            if step <= stage_steps.get(stage, step):
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            logging.info("%s: dropped %d lines past %s", self.path, dropped, dict(stage_steps))
            self._replace(kept)
        for stage, step in stage_steps.items():
            self._purge[stage] = step + 1
            if stage in self._boards:
                self._boards.pop(stage).close()

    def flush(self) -> None:
        """Write what the boards hold back; the JSONL file holds nothing back."""
        for board in self._boards.values():
            board.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for board in self._boards.values():
            board.close()
        self._boards.clear()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _replace(self, lines: Iterable[bytes]) -> None:
        """The file with other lines, in one stroke."""
        if self._file is not None:
            self._file.close()
        write_atomic(self.path, b"".join(lines))
        self._open()

    def _open(self) -> None:
        """Open for appending, after cutting off a last line that a kill left half written."""
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logging.warning(
                "%s: dropped a half-written last line (%d bytes)", self.path, len(content) - whole
            )
            self._file.truncate(whole)

    def _board(self, stage: str) -> SummaryWriter:
        if stage not in self._boards:
            folder = str(self.path.parent / "tb" / stage)
            self._boards[stage] = SummaryWriter(folder, purge_step=self._purge.get(stage))
        return self._boards[stage]


class Progress:
    """How far a stage is: a bar on a terminal, else a log line at most every ten seconds. Process 0 only.

    Args:
        total: steps of the stage.
        stage: its name.
        start: the step that a resumed stage goes on from.
    """

    EVERY = 10.0  # seconds between log lines

    def __init__(self, total: int, stage: str, *, start: int = 0) -> None:
        self.total, self.stage, self.done = total, stage, start
        self._silent = jax.process_index() != 0
        self._first, self._began, self._told = start, time.monotonic(), time.monotonic()
        shown = sys.stderr.isatty() and not self._silent
        self._bar = tqdm(total=total, initial=start, desc=stage, unit="step") if shown else None

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more steps; `note` (e.g. "loss 0.31") is shown beside."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif not self._silent and time.monotonic() - self._told >= self.EVERY:
            self._told = time.monotonic()
            logging.info("%s", self.text(note))

    def text(self, note: str = "") -> str:
        """One line: stage, steps, rate, remaining time, note."""
        rate = (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate > 0 else "no step yet"
        return (
            f"{self.stage} {self.done}/{self.total}, {rate:.2f} steps/s, {left}{', ' if note else ''}{note}"
        )

    def close(self) -> None:
        """Leave the finished bar, or one last log line."""
        if self._bar is not None:
            self._bar.close()
        elif not self._silent:
            logging.info("%s", self.text())


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, allow_nan=False) + "\n").encode()


def _number(value: Any) -> float | int | None:
    """A plain number: whole ones stay whole, not finite ones become None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _stage_and_step(line: bytes, where: str) -> tuple[str, int]:
    try:
        entry = json.loads(line)
        stage, step = entry["stage"], entry["step"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: not a line of metrics ({error}); mend or remove that line") from error
    if not isinstance(step, int):
        raise DataError(f"{where}: step is {step!r}, not a whole number; mend or remove that line")
    return stage, step
