"""The shard runner: every stage of the pipeline is a pure function of a shard, and this file runs it.

A shard is written into a hidden directory, flushed, renamed file by file, and then exists by virtue of one
line in manifest.jsonl (`manifest`). A killed run loses at most the shards in flight; running the same command
again does what is missing and nothing else. An item ends as answers (records), as a quarantine with a reason,
or it stops the job: there are no default values. Users: ingest and the stages after it; those that ask a
server do so through `asking`.
"""

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from data_pipeline import faults, files, kept, manifest, parts
from fundus_jax import records
from fundus_jax.records import ConfigError, DataError

ENOUGH = 50  # items seen before the share of quarantined ones is judged
SHOWN = 10  # reasons that the stopping message quotes
HEADROOM = 64 << 20  # bytes left free beside twice the largest shard so far


@dataclass(frozen=True)
class Quarantine:
    """An item that gave no answer: its key and, for a reader, why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Job:
    """A stage's name and everything that determines its output besides the input (a JSON object)."""

    name: str
    config: dict


@dataclass(frozen=True)
class ShardInput:
    """One shard of input; `key` hashes what will be read, `items` may be loaded late (in the worker)."""

    name: str
    key: str
    items: Sequence | Callable[[], Sequence]


@dataclass(frozen=True)
class Summary:
    """Counts over all shards of this run's part, those that were there already included.

    shards_left: those of other parts that are not there, or were made of another input; 0: all is finished.
    """

    answers: int
    quarantined: int
    shards_done: int
    shards_skipped: int
    shards_left: int = 0


Process = Callable[[ShardInput, Path], Iterable[Any]]
# Gets the shards in order (items loaded) and the job's directory; gives for each shard an iterator over its
# answers: one an item, a record or a Quarantine. It may read shards ahead, and is resumed after the last.
Through = Callable[[Iterator[ShardInput], Path], Generator[Iterator[Any], None, None]]


def run(
    job: Job,
    shards: Sequence[ShardInput],
    process: Process,
    out: Path,
    *,
    limit: float = 0.02,
    workers: int = 1,
    shard: str = "0/1",
    through: Through | None = None,
) -> Summary:
    """Process the shards that `out` lacks and publish them there.

    Args:
      job: name and config; both go into every shard's key.
      shards: all of the input, whichever part this process takes. Names become file names.
      process: gets a shard (items loaded) and a scratch folder; yields records and `Quarantine`s. Files that
        it writes into the folder, named NAME.something, are published with the shard. With workers > 1 it and
        the items must be picklable (a module's function or a `functools.partial` of one).
      limit: share of quarantined items beyond which the job stops (from 50 items on, and at the end).
      workers: processes that share this part's shards.
      shard: "i/n": take every n-th shard by name from the i-th on, for n processes or hosts on one file
        system. Whichever part ends last completes the directory.
      through: what turns items into answers, if that is not `process`: a server (`asking.through`).
        `process` then gets an iterator over the answers in the place of the items, its quarantines taken
        out, and has but to yield them. For one worker: it is the server that does many things at a time.

    Raises:
      ConfigError: other config than `out` was made with, bad names, another process at work on the same part,
        a full disk.
      DataError: too many items quarantined; the message quotes the first reasons.
    """
    config = json.loads(json.dumps(job.config, allow_nan=False))
    taken = parts.take([one.name for one in _checked(shards)], shard)
    mine = [one for one in shards if one.name in taken]
    out.mkdir(parents=True, exist_ok=True)
    with manifest.running(out, shard), files.room(out):
        manifest.claim(out, job.name, config, [one.name for one in shards])
        made_by = {"job": job.name, "config": config}
        keys = {one.name: files.digest(made_by | {"input": one.key}) for one in shards}
        ready = _ready(out, {name: keys[name] for name in taken})
        todo = [one for one in mine if one.name not in ready]
        _sweep(out, taken, ready)
        tally = _Tally(limit, [ready[one.name] for one in mine if one.name in ready])
        builds = _builds(todo, keys, process, out, workers, through)
        for entry in _published(builds, len(todo), out, tally, workers):
            tally.add(entry)
        tally.judge(at_end=True)
        manifest.finish(out, [one.name for one in shards])
        left = len(keys) - len(_ready(out, keys))
    return Summary(tally.answers, tally.quarantined, len(todo), len(ready), left)


def read(out: Path, cls: type, *, side_files: bool = False) -> Iterator[Any]:
    """All records of a finished directory in shard-name order; a shard's hash is checked before it is read.

    With `side_files` (images) those are hashed as well; else their presence and size are. Raises DataError.
    """
    for entry in manifest.complete(Path(out)):
        for name in entry.files:
            if side_files or name == f"{entry.name}.jsonl" or not manifest.intact(Path(out), entry):
                manifest.check(Path(out), entry, name)
        yield from records.read_jsonl(Path(out) / f"{entry.name}.jsonl", cls)


def _ready(out: Path, keys: Mapping[str, str]) -> dict[str, manifest.Entry]:
    """Those of some shards, by name, that are there as they would be made now; `keys` says of each what its
    key has to be."""
    done = manifest.load(out)
    same = {name: done[name] for name, key in keys.items() if name in done and done[name].key == key}
    return {name: entry for name, entry in same.items() if manifest.intact(out, entry)}


def _sweep(out: Path, mine: Collection[str], ready: Collection[str]) -> None:
    """Remove what a killed run left: the scratch folders of this part, and answers about published shards."""
    for left in out.glob(".*.*"):
        name, _, kind = left.name[1:].partition(".")
        if name in mine and kind.startswith("part-"):
            shutil.rmtree(left)
        elif name in ready and left == kept.path(out, name):
            left.unlink()


class _Tally:
    """Counts of the finished shards, and the rule that stops a job."""

    def __init__(self, limit: float, entries: Sequence[manifest.Entry]):
        self.limit, self.items, self.answers, self.quarantined = limit, 0, 0, 0
        self.reasons: list[str] = []
        for entry in entries:
            self.add(entry)

    def add(self, entry: manifest.Entry) -> None:
        self.items += entry.items
        self.answers += entry.answers
        self.quarantined += entry.quarantined

    def judge(self, *, at_end: bool = False, items: int = 0, quarantined: Sequence[Quarantine] = ()) -> None:
        """Raise DataError if too many are quarantined; `items`, `quarantined`: of a shard not added yet."""
        self.reasons = (self.reasons + [f"{one.key}: {one.reason}" for one in quarantined])[:SHOWN]
        bad, seen = self.quarantined + len(quarantined), self.items + items
        if bad > self.limit * seen and (seen >= ENOUGH or at_end):
            shown = "\n  ".join(self.reasons) or "see the *.quarantine.jsonl files"
            raise DataError(
                f"{bad} of {seen} items are quarantined, more than {self.limit:.1%}; repair the input, or "
                f"allow more (limit). First reasons:\n  {shown}"
            )


@dataclass(frozen=True)
class _Built:
    """A shard that stands complete and flushed in its hidden folder."""

    folder: Path
    entry: manifest.Entry
    quarantined: tuple[Quarantine, ...]


def _builds(
    todo: Sequence[ShardInput],
    keys: dict[str, str],
    process: Process,
    out: Path,
    workers: int,
    through: Through | None,
) -> Generator[_Built, None, None]:
    """The shards that are built: in order with one worker, as they come with more."""
    build = partial(_build, process=process, out=out)
    if through is None:
        in_order = (build(one, keys[one.name]) for one in todo)
        return in_order if workers <= 1 else _pooled(todo, keys, build, workers)
    if workers > 1:
        raise ConfigError(f"workers is {workers}; a stage that asks a server takes 1, and its concurrency")
    loaded = (replace(one, items=_items(one)) for one in todo)
    return _answered(todo, keys, build, through(loaded, out))


def _answered(
    todo: Sequence[ShardInput],
    keys: dict[str, str],
    build: Callable,
    answers: Generator[Iterator[Any], None, None],
) -> Generator[_Built, None, None]:
    with closing(answers):
        for given, one in zip(answers, todo, strict=True):
            yield build(one, keys[one.name], answers=given)


def _published(
    builds: Generator[_Built, None, None], count: int, out: Path, tally: _Tally, workers: int
) -> Iterator[manifest.Entry]:
    """Publish `count` shards as they are built."""
    largest = 0
    files.require_free(out, HEADROOM)
    with closing(builds), _Progress(count, out.name) as progress:
        for number, built in enumerate(builds, 1):
            tally.judge(items=built.entry.items, quarantined=built.quarantined)
            _publish(out, built)
            progress.step(built.entry)
            yield built.entry
            largest = max(largest, sum(int(facts["bytes"]) for facts in built.entry.files.values()))
            if number < count:
                files.require_free(out, HEADROOM + 2 * largest * max(1, workers))


def _pooled(
    todo: Sequence[ShardInput], keys: dict[str, str], build: Callable, workers: int
) -> Generator[_Built, None, None]:
    waiting = iter(todo)
    with ProcessPoolExecutor(min(workers, max(1, len(todo))), get_context("spawn"), _die_with_parent) as pool:
        flying: set[Future[_Built]] = set()
        try:
            while True:
                for one in waiting:
                    flying.add(pool.submit(build, one, keys[one.name]))
                    if (
                        len(flying) > workers
                    ):  # one in hand, so that no worker idles while this process publishes
                        break
                if not flying:
                    return
                landed, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in landed:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker when its parent is gone: a `kill -9` of it tells the pool's children nothing."""

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    if (parent := parent_process()) is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _build(
    shard: ShardInput, key: str, *, process: Process, out: Path, answers: Iterator[Any] | None = None
) -> _Built:
    """Run `process` over one shard in a hidden folder of `out`; in a pool this is what the workers do."""
    folder = out / f".{shard.name}.part-{os.getpid()}-{time.time_ns():x}"
    folder.mkdir()
    try:
        items = _items(shard) if answers is None else ()
        faults.hit("before_process")
        given = _Given(answers) if answers is not None else None
        written, quarantined = 0, given.quarantined if given else []
        with (folder / f"{shard.name}.jsonl").open("w", encoding="utf-8") as stream:
            for result in process(replace(shard, items=given or items), folder):
                if isinstance(result, Quarantine):
                    quarantined.append(result)
                else:
                    stream.write(records.to_json(result) + "\n")
                    written += 1
        for _ in given or ():
            pass  # what `process` left unread is counted too, and its quarantines are kept
        faults.hit("after_process")
        lines = [json.dumps({"key": one.key, "reason": one.reason}) + "\n" for one in quarantined]
        (folder / f"{shard.name}.quarantine.jsonl").write_text("".join(lines), encoding="utf-8")
        facts = {path.name: _facts(path, shard.name) for path in sorted(folder.iterdir())}
        files.sync(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    count = given.count if given else len(items)
    entry = manifest.Entry(
        name=shard.name, key=key, items=count, answers=written, quarantined=len(quarantined), files=facts
    )
    return _Built(folder, entry, tuple(quarantined))


def _items(shard: ShardInput) -> Sequence:
    return shard.items() if callable(shard.items) else shard.items


class _Given:
    """The answers about a shard's items: counted as they are read, the quarantines among them kept apart."""

    def __init__(self, answers: Iterator[Any]) -> None:
        self.answers, self.count = answers, 0
        self.quarantined: list[Quarantine] = []

    def __iter__(self) -> Iterator[Any]:
        for one in self.answers:
            self.count += 1
            if isinstance(one, Quarantine):
                self.quarantined.append(one)
            else:
                yield one


def _facts(path: Path, shard: str) -> dict[str, int | str]:
    if not path.is_file() or not path.name.startswith(f"{shard}."):
        raise ValueError(f"{path}: a side file of shard {shard} must be a plain file named {shard}.something")
    files.sync(path)
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _publish(out: Path, built: _Built) -> None:
    faults.hit("before_rename")
    for name in sorted(built.entry.files):
        (built.folder / name).replace(out / name)
        faults.hit("after_rename")
    files.sync(out)
    faults.hit("before_manifest")
    manifest.append(out, built.entry)
    faults.hit("after_manifest")
    built.folder.rmdir()


class _Progress:
    """A bar on a terminal, elsewhere a log line every few seconds."""

    def __init__(self, shards: int, title: str, *, seconds: float = 10.0):
        self.bar = tqdm(total=shards, desc=title, unit="shard", disable=not sys.stderr.isatty() or not shards)
        self.title, self.shards, self.seconds = title, shards, seconds
        self.done, self.items, self.quarantined = 0, 0, 0
        self.begun = self.spoken = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, entry: manifest.Entry) -> None:
        """Count one published shard."""
        self.done, self.items = self.done + 1, self.items + entry.items
        self.quarantined += entry.quarantined
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and (now - self.spoken > self.seconds or self.done == self.shards):
            self.spoken = now
            logging.info(
                "%s: %d of %d shards, %d items (%d quarantined), %.1f items/s",
                self.title, self.done, self.shards, self.items, self.quarantined,
                self.items / max(now - self.begun, 1e-9),
            )  # fmt: skip


def _checked(shards: Sequence[ShardInput]) -> Sequence[ShardInput]:
    if not shards:
        raise ConfigError(
            "the job has no input: no shard was found; check the source directory and the split"
        )
    names = [one.name for one in shards]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"shard names are not unique: {sorted({n for n in names if names.count(n) > 1})[:5]}"
        )
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) or name == "manifest":
            raise ConfigError(f"shard name {name!r}: use letters, digits, '-' and '_', and not 'manifest'")
    return shards
