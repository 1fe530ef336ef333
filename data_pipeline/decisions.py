"""What reviewers decided about traces: files that grow by a line, and what holds in the end.

Each reviewer has a file of their own, so nobody's work clashes with another's. A decision counts for the very
text that was read; of several by one reviewer the last counts, and reviewers who disagree are reported, never
outvoted. Neighbours: `reviewing/` writes, `reviewed.py` makes the next stage's input of it.
"""

import datetime
import fcntl
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import files
from fundus_jax import records
from fundus_jax.records import ConfigError, DataError, Trace

SUFFIX = ".jsonl"
OUTCOMES = ("accept", "correct", "reject", "withdraw")  # withdraw: as if nothing had been decided
# Kinds of reasons to reject a trace, in the words of the paper's quality check where it has one.
REASONS = (
    "finding is not there",
    "finding left out",
    "wrong place",
    "knowledge misapplied",
    "reasoning does not follow",
    "answer is wrong",
    "image can not be judged",
    "other",
)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")  # sorts as it is read
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A record like those of `fundus_jax.records`: what a person decided about a trace.

    `trace` is the `trace_sha256` of the text that was read, so that the decision counts for no other. A
    rejection has a reason, "KIND" or "KIND: detail"; a correction has the think text and the answer that
    replace the trace's. `time` is in UTC, as 2026-11-28T13:54:41Z. Raises DataError for anything else.
    """

    example: str
    trace: str
    outcome: str
    reason: str
    think: str
    answer: str
    reviewer: str
    time: str

    def __post_init__(self) -> None:
        named = {"example": self.example, "reviewer": self.reviewer}
        named |= {"reason": self.reason} if self.outcome == "reject" else {}
        named |= {"think": self.think, "answer": self.answer} if self.outcome == "correct" else {}
        empty = [name for name, value in named.items() if not value.strip()]
        foreign = self.outcome != "correct" and bool(self.think or self.answer)
        for wrong, message in (
            (self.outcome not in OUTCOMES, f"outcome is {self.outcome!r}; known are {', '.join(OUTCOMES)}"),
            (bool(empty), f"{', '.join(empty)}: empty, with the outcome {self.outcome}"),
            (foreign, f"{self.outcome} with a text; only a correction has one"),
            (not _SHA256.fullmatch(self.trace), f"trace {self.trace!r} is no sha256"),
            (not _MOMENT.fullmatch(self.time), f"time {self.time!r} has to be UTC, as 2026-11-28T13:54:41Z"),
        ):
            if wrong:
                raise DataError(f"Decision about {self.example!r}: {message}")


Book = Mapping[str, tuple[Decision, ...]]  # example -> what holds of each reviewer who decided on it


def paths(text: str) -> list[Path]:
    """The files that a comma-separated list of files and folders names. Raises ConfigError for one that is
    missing; a folder may be empty still."""
    found: list[Path] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"decisions: {path} does not exist; make the folder, or correct the path")
        found += files.listing(path, (SUFFIX,)) if path.is_dir() else [path]
    return found


def read(paths: Iterable[Path]) -> Book:
    """What holds: the last decision of each reviewer on each example, withdrawn ones left out.

    "Last" is by time, and by order where times are equal: within a file they never go back. Raises DataError
    for a line that is no Decision; a line that a crash cut off was never answered for, and does not count.
    """
    lines = [one for path in paths for one in _lines(path)]
    last: dict[str, dict[str, Decision]] = {}
    for one in sorted(lines, key=lambda one: one.time):
        last.setdefault(one.example, {})[one.reviewer] = one
    standing = {
        example: tuple(by[name] for name in sorted(by) if by[name].outcome != "withdraw")
        for example, by in sorted(last.items())
    }
    return {example: found for example, found in standing.items() if found}


def digest(book: Book) -> str:
    """One hash of all that holds; a decision that was withdrawn or replaced leaves no trace in it."""
    return files.digest([_line(one) for found in book.values() for one in found])


def agree(found: Sequence[Decision]) -> bool:
    """Whether reviewers want the same: all accept, all reject for whatever reason, or the same correction."""
    return len({(one.outcome, one.think, one.answer) for one in found}) <= 1


def trace_sha256(trace: Trace) -> str:
    """What a Decision knows a trace by: the sha256 of its think text and its answer."""
    return files.digest([trace.think, trace.answer])


def now() -> str:
    """The time in UTC as a Decision has it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(one: Decision) -> str:
    return records.to_json(one)  # type: ignore[arg-type]


def _lines(path: Path) -> list[Decision]:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        texts = whole.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error
    kind: Any = Decision
    return [records.from_json(kind, text, f"{path}:{n}") for n, text in enumerate(texts, 1)]


@dataclass
class Ledger:
    """The file of one reviewer, open for more lines; this process holds it alone until `close`."""

    path: Path
    reviewer: str
    standing: dict[str, Decision]
    undo: list[tuple[str, Decision | None]]  # of this session: example, what held before
    time: str
    stream: int

    @classmethod
    def open(cls, folder: Path, reviewer: str) -> "Ledger":
        """The file FOLDER/REVIEWER.jsonl. Raises ConfigError for a bad name, or when another process has the
        file open; DataError for a file that is damaged."""
        if not _NAME.fullmatch(reviewer):
            raise ConfigError(
                f"reviewer {reviewer!r}: use up to 40 letters, digits, '.', '_' and '-'; it names a file"
            )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{reviewer}{SUFFIX}"
        stream = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = _lines(path)
            foreign = sorted({one.reviewer for one in lines} - {reviewer})
            if foreign:
                raise DataError(f"{path}: has decisions of {', '.join(foreign)}; a file has one reviewer")
            data = path.read_bytes()
            os.ftruncate(stream, data.rfind(b"\n") + 1)  # a line that a crash cut off
        except BlockingIOError as error:
            os.close(stream)
            raise ConfigError(
                f"{path}: {reviewer} reviews in another process already; end that one, or take another name"
            ) from error
        except BaseException:
            os.close(stream)
            raise
        files.sync(folder)
        mine = {name: found[0] for name, found in read([path]).items()}
        return cls(path, reviewer, mine, [], max((one.time for one in lines), default=""), stream)

    def add(self, example: str, trace: str, outcome: str, reason="", think="", answer="") -> Decision:
        """Write a decision; it is on the disk when this returns. Raises DataError for what is no Decision,
        OSError where it could not be saved, and then nothing has changed."""
        before = self.standing.get(example)
        made = self._write(example, trace, outcome, reason, think, answer)
        self.undo.append((example, before))
        return made

    def take_back(self) -> str | None:
        """Undo the last decision of this session, by one more line that says what held before. Returns its
        example; None where there is nothing to undo."""
        if not self.undo:
            return None
        example, before = self.undo[-1]
        if before is None:
            self._write(example, self.standing[example].trace, "withdraw", "", "", "")
        else:
            self._write(example, before.trace, before.outcome, before.reason, before.think, before.answer)
        self.undo.pop()
        return example

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.stream)

    def _write(
        self, example: str, trace: str, outcome: str, reason: str, think: str, answer: str
    ) -> Decision:
        made = Decision(
            example=example, trace=trace, outcome=outcome, reason=reason, think=think, answer=answer,
            reviewer=self.reviewer, time=max(now(), self.time),
        )  # fmt: skip
        line, size = (_line(made) + "\n").encode(), os.fstat(self.stream).st_size
        try:
            if os.write(self.stream, line) != len(line):
                raise OSError(f"{self.path}: the disk took a part of the line only")
            os.fsync(self.stream)
        except OSError:
            os.ftruncate(self.stream, size)
            raise
        self.time = made.time
        if outcome == "withdraw":
            self.standing.pop(example, None)
        else:
            self.standing[example] = made
        return made
