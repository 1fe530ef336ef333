"""The journal: it goes on where it was, refuses other questions, names bad lines, and deals out to hosts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fundus_jax.evaluation.engines import Asking, identity
from fundus_jax.evaluation.items import Item
from fundus_jax.evaluation.journal import Journal
from fundus_jax.evaluation.pictures import Images
from fundus_jax.evaluation.report import Prediction
from fundus_jax.records import ConfigError, DataError
from tests.evaluation.samples import Pictures, item, picture

ITEMS = [item(f"q{number}") for number in range(7)]
ASKING = Asking(max_new_tokens=5, temperature=1.0, samples=2)
FACTS = {"engine": "echo"}


class Echo:
    """Says the item's id; is stopped after `most` questions; does not answer `mute`."""

    def __init__(self, most: int = 99, mute: Sequence[int] = ()) -> None:
        self.most, self.mute, self.asked = most, mute, []
        self.facts, self.failures = FACTS, {}

    def answer(
        self, items: Sequence[Item], wanted: Sequence[int], images: Images, asking: Asking
    ) -> Iterator[tuple[int, list[Prediction]]]:
        for index in reversed(wanted):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(index)
            if index in self.mute:
                self.failures[index] = "refused"
                continue
            texts = [f"{items[index].id}/{sample} \N{EYE}\n" for sample in range(asking.samples)]
            yield (
                index,
                [
                    Prediction(
                        item=items[index],
                        response=text,
                        sample=sample,
                        tokens=3,
                        finished=False,
                        logprob=-0.5,
                    )
                    for sample, text in enumerate(texts)
                ],
            )

    def work(self) -> dict[str, float]:
        return {}


def ask(out: Path, engine: Echo, **shard: Any) -> dict[int, list[Prediction]]:
    return Journal(out, ITEMS, FACTS, ASKING, **shard).ask(engine, Pictures(lambda _: picture(1)))


def test_it_goes_on(tmp_path: Path) -> None:
    whole = ask(tmp_path / "whole", Echo())
    assert sorted(whole) == list(range(7))
    first = Echo(most=3)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "cut", first)
    path = tmp_path / "cut" / "answers" / "00000-of-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the third was being written
    second = Echo()
    assert ask(tmp_path / "cut", second) == whole
    assert first.asked == [6, 5, 4]
    assert second.asked == [4, 3, 2, 1, 0]
    third = Echo()
    assert ask(tmp_path / "cut", third) == whole
    assert third.asked == []


def test_hosts_share_the_questions(tmp_path: Path) -> None:
    engines = [Echo(), Echo(), Echo()]
    found = [ask(tmp_path, engine, shard=(number, 3)) for number, engine in enumerate(engines)]
    assert [sorted(engine.asked) for engine in engines] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(one) for one in found] == [3, 5, 7]
    assert found[2] == ask(tmp_path / "alone", Echo())
    with pytest.raises(ConfigError, match="shard 3/3"):
        ask(tmp_path, Echo(), shard=(3, 3))


def test_hosts_that_ask_at_the_same_time_find_each_others_answers(tmp_path: Path) -> None:
    """The first to end lacks some; the last one, which began with it, has all."""
    first, second = (Journal(tmp_path, ITEMS, FACTS, ASKING, shard=(number, 2)) for number in range(2))

    class Waiting(Echo):
        def answer(self, *args: Any) -> Iterator[tuple[int, list[Prediction]]]:
            yield from super().answer(*args)
            assert len(first.ask(Echo(), Pictures(lambda _: picture(1)))) == 7, "the other one ends meanwhile"

    assert len(second.ask(Waiting(), Pictures(lambda _: picture(1)))) == 7


def test_what_has_no_answer_is_asked_again(tmp_path: Path) -> None:
    assert sorted(ask(tmp_path, Echo(mute=[2, 4]))) == [0, 1, 3, 5, 6]
    again = Echo()
    assert sorted(ask(tmp_path, again)) == list(range(7))
    assert again.asked == [4, 2]


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, ITEMS, FACTS, ASKING)
    with pytest.raises(ConfigError, match="asking.max_new_tokens: 5 there, 6 here"):
        Journal(tmp_path, ITEMS, FACTS, dataclasses.replace(ASKING, max_new_tokens=6))
    content = ITEMS[0].messages[0] | {"content": [{"type": "text", "text": "Which?"}]}
    changed = dataclasses.replace(ITEMS[0], messages=(content,))
    with pytest.raises(ConfigError, match="questions.sha256"):
        Journal(tmp_path, [changed, *ITEMS[1:]], FACTS, ASKING)
    with pytest.raises(ConfigError, match="engine: 'echo' there, 'server' here"):
        Journal(tmp_path, ITEMS, {"engine": "server"}, ASKING)
    relabelled = [dataclasses.replace(one, answers=("AMD",)) for one in ITEMS]
    Journal(tmp_path, relabelled, FACTS, ASKING)  # answers do not depend on what is right


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    ask(tmp_path, Echo())
    path = tmp_path / "answers" / "00000-of-00001.jsonl"
    lines = path.read_text().splitlines()
    for bad in ("{", "[]", json.dumps({"id": "q1", "answers": [{"response": "x"}]})):
        path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        with pytest.raises(DataError, match="00000-of-00001.jsonl:2 .* remove the line"):
            ask(tmp_path, Echo())


def test_identity_is_that_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = identity(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert identity(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert identity(tmp_path) != first
    with pytest.raises(ConfigError, match="neither weights nor"):
        identity(tmp_path / "nothing")
