"""The answers that a server gave for a shard that is not published yet, so that none is paid for twice.

A shard of server work may take an hour, and is published only as a whole. So each answer is added to a hidden
file beside the shards as it comes, under the hash of its request; a run that starts again finds it there. One
line, one `write`: a killed process loses none of them. They are not flushed: after a power cut the last ones
are asked for again. The file goes when its shard is published. Neighbours: `asking` uses it, through
`Chat.remembering`; `jobs` removes what a killed run left of a shard that is published.

    .NAME.answers   one line an answer: {"request": sha256, "answer": text, "sha256": of both}
"""

import errno
import json
from collections import defaultdict, deque
from pathlib import Path

from absl import logging

from data_pipeline import files


def path(out: Path, name: str) -> Path:
    """Where the answers about shard `name` of directory `out` are kept."""
    return out / f".{name}.answers"


class Kept:
    """The kept answers of shard `name` in directory `out`.

    Requests may be equal, as those about two copies of a picture are: each takes an answer of its own.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.path = path(out, name)
        self._known: defaultdict[str, deque[str]] = defaultdict(deque)
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        torn = len(lines.pop()) > 0
        for line in lines:
            if found := _parsed(line):
                self._known[found[0]].append(found[1])
            else:
                torn = True
        if torn:
            logging.warning("%s has a torn line; its answer is asked for again", self.path)
            whole = [_line(key, answer) for key, answers in self._known.items() for answer in answers]
            files.write_atomic(self.path, b"".join(whole))

    def take(self, request: object) -> str | None:
        """The answer to a request (JSON), or None if none is left; what is taken stays on disk."""
        if not self._known:
            return None
        key = files.digest(request)
        answers = self._known.get(key)
        if not answers:
            return None
        answer = answers.popleft()
        if not answers:
            del self._known[key]
        return answer

    def keep(self, request: object, answer: str) -> None:
        """Add the answer to a request. Raises OSError when the disk is full."""
        with self.path.open("ab", buffering=0) as stream:
            line = _line(files.digest(request), answer)
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, "only a part of an answer could be written", str(self.path))

    def drop(self) -> None:
        """Remove the file: the shard is published."""
        self.path.unlink(missing_ok=True)


def _line(key: str, answer: str) -> bytes:
    check = files.digest([key, answer])
    return json.dumps({"request": key, "answer": answer, "sha256": check}).encode() + b"\n"


def _parsed(line: bytes) -> tuple[str, str] | None:
    """Request and answer of one line; None for a line that was not written whole."""
    try:
        row = json.loads(line)
        key, answer, check = row["request"], row["answer"], row["sha256"]
    except (ValueError, TypeError, KeyError):
        return None
    return (key, answer) if files.digest([key, answer]) == check else None
