"""What a directory of shards says about itself: job.json (who wrote it) and manifest.jsonl (what is in it).

A shard exists only once its line stands in manifest.jsonl; everything else in the directory is left over from
a crash. `jobs` writes through this module, `jobs.read` and the later stages read through it.

    job.json        {"schema", "name", "config", "shards": [every name the input has]}
    manifest.jsonl  one line a shard: {"schema", "name", "key", "items", "answers", "quarantined",
                    "files": {name: {"bytes", "sha256"}}}
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline import files, parts
from fundus_jax.records import ConfigError, DataError

SCHEMA = 1
JOB, MANIFEST, LOCK = "job.json", "manifest.jsonl", ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One published shard: its counts, and size and hash of each of its files."""

    name: str
    key: str
    items: int
    answers: int
    quarantined: int
    files: dict[str, dict[str, int | str]]
    schema: int = SCHEMA

    @classmethod
    def parse(cls, line: str, where: str) -> "Entry":
        """Read one line; anything unexpected is a DataError that names `where`."""
        try:
            entry = cls(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: not a manifest line ({error}); delete the line, then run the job again"
            ) from error
        if entry.schema != SCHEMA:
            raise DataError(
                f"{where}: schema {entry.schema}, this program reads {SCHEMA}; build the directory again"
            )
        return entry

    def line(self) -> str:
        """The entry as one line of JSON with its line feed."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"


def load(out: Path) -> dict[str, Entry]:
    """The entries of `out` by shard name; the later of two lines counts, a torn last line does not."""
    path = out / MANIFEST
    if not path.exists():
        return {}
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    entries = (Entry.parse(line, f"{path}:{n}") for n, line in enumerate(whole.splitlines(), 1))
    return {entry.name: entry for entry in entries}


@contextmanager
def _locked(out: Path, name: str, *, wait: bool) -> Iterator[None]:
    with (out / name).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            part = name.removeprefix(f"{LOCK}-").replace("-", "/")
            raise ConfigError(
                f"{out}: another process runs part {part} of the job; let it finish or stop it"
            ) from error
        yield


@contextmanager
def running(out: Path, part: str) -> Iterator[None]:
    """Hold part `part` ("i/n") of the directory; the kernel lets go of it when the process dies.

    Raises ConfigError when another process holds it, or a part of another n: it would have the same shards.
    """
    mine = f"{LOCK}-{part.replace('/', '-')}"
    with ExitStack() as held:
        with _locked(out, LOCK, wait=True):
            for path, count in _parts(out):
                if count != parts.parse(part)[1]:
                    with _locked(out, path.name, wait=False):
                        pass
            held.enter_context(_locked(out, mine, wait=False))
            (out / mine).touch()
        yield


def _parts(out: Path) -> list[tuple[Path, int]]:
    """The locks of all parts that ever ran, the last first; each with the number of parts that there were."""
    paths = sorted(out.glob(f"{LOCK}-*-*"), key=lambda path: -path.stat().st_mtime_ns)
    return [(path, int(path.name.rsplit("-", 1)[1])) for path in paths]


def append(out: Path, entry: Entry) -> None:
    """Publish a shard whose files are durable: one line, flushed. Cuts off a torn line of a killed run."""
    path = out / MANIFEST
    with _locked(out, LOCK, wait=True):
        fresh = not path.exists()
        with path.open("a+b") as stream:
            _cut(stream)
            stream.write(entry.line().encode())
            stream.flush()
            files.sync(path)
        if fresh:
            files.sync(out)


def _cut(stream: BinaryIO) -> None:
    """Cut off a torn last line; whether there is one is seen by the last byte."""
    if end := stream.seek(0, os.SEEK_END):
        stream.seek(end - 1)
        if stream.read() != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


def finish(out: Path, names: Sequence[str]) -> None:
    """Once all of `names` are published, sort the manifest: its bytes must not depend on who ran when."""
    with _locked(out, LOCK, wait=True):
        entries = load(out)
        if set(names) == set(entries):
            lines = "".join(entries[name].line() for name in sorted(entries)).encode()
            if (out / MANIFEST).read_bytes() != lines:
                files.write_atomic(out / MANIFEST, lines)


def claim(out: Path, name: str, config: dict, shards: Sequence[str]) -> None:
    """Write job.json, or check that the one there is of the same job.

    Raises ConfigError naming every field that differs, or shards in `out` that the input no longer has.
    """
    mine = {"schema": SCHEMA, "name": name, "config": config, "shards": sorted(shards)}
    path = out / JOB
    with _locked(out, LOCK, wait=True):
        if path.exists():
            theirs = _job(path)
            changed = differences(
                {k: theirs[k] for k in ("name", "config")}, {k: mine[k] for k in ("name", "config")}
            )
            if changed:
                raise ConfigError(
                    f"{out} was made with other settings ({'; '.join(changed)}); "
                    "use those, or choose another directory"
                )
            if gone := sorted(set(load(out)) - set(shards)):
                raise ConfigError(
                    f"{out} holds {len(gone)} shards that the input does not have ({', '.join(gone[:5])}); "
                    "choose another directory, or delete this one"
                )
            if theirs == mine:
                return
        elif (out / MANIFEST).exists():
            raise ConfigError(
                f"{out} has a {MANIFEST} and no {JOB}; it is not this program's: choose another directory"
            )
        files.write_atomic(path, json.dumps(mine, sort_keys=True, indent=1) + "\n")


def _job(path: Path) -> dict:
    try:
        job = json.loads(path.read_text())
        if set(job) != {"schema", "name", "config", "shards"} or job["schema"] != SCHEMA:
            raise ValueError(f"has fields {sorted(job)}")
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not a job description of schema {SCHEMA} ({error}); build the directory again"
        ) from error
    return job


def differences(old: object, new: object, field: str = "") -> list[str]:
    """Each field in which two JSON values differ, as "a.b: 1 there, 2 here"."""
    if isinstance(old, dict) and isinstance(new, dict):
        absent = "nothing"
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(
                old.get(key, absent), new.get(key, absent), f"{field}.{key}" if field else key
            )
        return found
    return [] if old == new else [f"{field}: {old!r} there, {new!r} here"]


def intact(out: Path, entry: Entry) -> bool:
    """Whether all files of a shard are there with their size (their bytes are hashed when they are read)."""
    try:
        return all(os.stat(out / name).st_size == facts["bytes"] for name, facts in entry.files.items())
    except FileNotFoundError:
        return False


def complete(out: Path) -> list[Entry]:
    """The entries of a finished directory in name order. Raises DataError if it is no job's, or is not
    finished; the message names the parts that are missing."""
    if not (out / JOB).is_file():
        raise DataError(f"{out}: no {JOB} here; give the output directory of a pipeline job")
    entries, names = load(out), _job(out / JOB)["shards"]
    if missing := [name for name in names if name not in entries]:
        count = next((count for _, count in _parts(out)), 1)
        lacking = [f"{i}/{count}" for i in range(count) if set(missing) & parts.take(names, f"{i}/{count}")]
        again = f"of parts {', '.join(lacking)}: wait for them, or run them again"
        raise DataError(
            f"{out}: {len(missing)} of {len(names)} shards are not finished (first: {missing[0]}), "
            f"{again if count > 1 else 'run the job again'}"
        )
    return [entries[name] for name in sorted(names)]


def check(out: Path, entry: Entry, name: str) -> None:
    """Raise DataError unless file `name` of a shard has the bytes that were published."""
    path, facts = out / name, entry.files[name]
    if not path.is_file():
        raise DataError(
            f"{path}: missing, though {MANIFEST} lists it; run the job again, which rebuilds the shard"
        )
    if path.stat().st_size != facts["bytes"] or files.sha256(path) != facts["sha256"]:
        raise DataError(
            f"{path}: its bytes are not those that were published (sha256 differs from {MANIFEST}); "
            "delete the file and run the job again, which rebuilds that shard only"
        )
