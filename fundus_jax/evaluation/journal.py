"""The answers of an evaluation as they come: one that was stopped goes on, and several hosts can share the
questions.

    OUT/asked.json                     what the answers depend on, and its hash
    OUT/answers/00000-of-00001.jsonl   a line for each question that was answered, with all its samples

A line is written whole, and a torn last one, of a process that was killed, is dropped. Other hosts have files
of their own there (--shard=1/4). What an answer is worth is not in it: that can be read off again by other
rules. Neighbours: run.py, launch/evaluate.py (who ask), engines.py (what answers).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fundus_jax import hosts
from fundus_jax.evaluation.engines import Asking, Engine
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.report import Prediction
from fundus_jax.files import append_line, write_atomic
from fundus_jax.records import ConfigError, DataError
from fundus_jax.workdir import differences

_FIELDS = ("response", "tokens", "finished", "logprob")


class Journal:
    """The answers to `items` under `out`, of an engine with `facts` that was asked as `asking` says.

    shard: (i, n): of n hosts this is number i, and asks every n-th question from the i-th on.

    Attributes:
        hash: sha256 of all that the answers depend on.

    Raises ConfigError where `out` has answers of something else, naming what differs.
    """

    def __init__(
        self,
        out: Path,
        items: Sequence[Item],
        facts: dict[str, Any],
        asking: Asking,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        asking.validate()
        self.out, self.items, self.asking, self.shard = out, items, asking, shard
        if not 0 <= shard[0] < shard[1]:
            raise ConfigError(f"shard {shard[0]}/{shard[1]}: of n hosts the first is 0 and the last n - 1")
        self.folder = out / "answers"
        self.path = self.folder / f"{shard[0]:05d}-of-{shard[1]:05d}.jsonl"
        questions = {"number": len(items), "sha256": _digest(items)}
        told = {**facts, "asking": dataclasses.asdict(asking), "questions": questions}
        text = json.dumps(told, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        hosts.on_first(lambda: self._claim(json.loads(text)))

    def known(self) -> dict[int, list[Prediction]]:
        """The answers there are, of all hosts, by the index of their items."""
        index = {item.id: number for number, item in enumerate(self.items)}
        found: dict[int, list[Prediction]] = {}
        for path in sorted(self.folder.glob("*-of-*.jsonl")):
            for line in _whole_lines(path):
                number = index[line["id"]]
                item = self.items[number]
                found.setdefault(
                    number,
                    [
                        Prediction(item=item, sample=sample, **{name: one[name] for name in _FIELDS})
                        for sample, one in enumerate(line["answers"])
                    ],
                )
        if hosts.of_first(len(found)) != len(found):
            raise ConfigError(
                f"not all processes see the same answers in {self.folder}; share it among hosts"
            )
        return found

    def ask(self, engine: Engine, images: Images) -> dict[int, list[Prediction]]:
        """All answers by the index of their items, after asking for those of this host that are not there.

        Those of other hosts, and what the engine can not answer, may be missing."""
        found = self.known()
        mine = range(self.shard[0], len(self.items), self.shard[1])
        wanted = [number for number in mine if number not in found]
        for number, answers in engine.answer(self.items, wanted, images, self.asking):
            self._append(self.items[number], answers)
            found[number] = answers
        return self.known() | found if self.shard[1] > 1 else found  # others may have gone on meanwhile

    def _append(self, item: Item, answers: Iterable[Prediction]) -> None:
        if not hosts.is_first():
            return
        facts = [{name: getattr(one, name) for name in _FIELDS} for one in answers]
        line = json.dumps({"id": item.id, "answers": facts}, ensure_ascii=False) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            append_line(file, line.encode("utf-8", errors="replace"))

    def _claim(self, told: dict[str, Any]) -> None:
        """Write asked.json, or refuse where another evaluation stands there; mend the file of this host."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.out / "asked.json"
        if path.exists():
            changed = differences(json.loads(path.read_text(encoding="utf-8"))["asked"], told)
            if changed:
                raise ConfigError(
                    f"{self.out} has answers of another evaluation ({'; '.join(changed[:6])}); go on with "
                    "that one, or choose another --out"
                )
        else:
            text = json.dumps({"hash": self.hash, "asked": told}, indent=1, sort_keys=True)
            write_atomic(path, text + "\n")
        if self.path.exists():
            data = self.path.read_bytes()
            if not data.endswith(b"\n") and data:
                write_atomic(self.path, data[: data.rfind(b"\n") + 1])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of answers; what comes after the last line break is being written, or torn.

    Raises DataError for a line that is no answer; names file and line.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            one = json.loads(line)
            complete = isinstance(one["id"], str) and all(
                set(_FIELDS) <= set(ours) for ours in one["answers"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is no answer: {error}; remove the line, it is asked again"
            ) from error
        if not complete:
            raise DataError(f"{path}:{number} lacks a part of an answer; remove the line, it is asked again")
        found.append(one)
    return found


def _digest(items: Sequence[Item]) -> str:
    """sha256 of all that the answers to items depend on."""
    told = [[item.id, item.images, item.messages] for item in items]
    return hashlib.sha256(json.dumps(told, ensure_ascii=True).encode()).hexdigest()
