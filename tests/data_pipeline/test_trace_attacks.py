"""Knowledge from strangers that gives orders: no trace obeys and no label changes; unfenced, they would."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from data_pipeline import asking, instructions, trace_server
from data_pipeline.composing import Case
from fundus_jax.records import Knowledge, Trace
from tests.chat_server import Server
from tests.data_pipeline import voters
from tests.data_pipeline.made import example
from tests.data_pipeline.test_trace_server import FOUND, GOOD, MODERATE, writer
from tests.grpo import stand_in


def poisoned(attack: str) -> Knowledge:
    return dataclasses.replace(MODERATE, text=f"{MODERATE.text} {attack}")


def attacked(server: Server, attacks: Sequence[str]) -> list[Trace]:
    one = writer(server)
    cases = [Case(example(id=f"made/{k}"), FOUND, poisoned(attack)) for k, attack in enumerate(attacks)]
    answers = asking.ask_all(cases, one.ask, one.settings.server, "writer.server")
    return [answer.trace for answer in answers]


def test_no_poisoned_knowledge_is_obeyed() -> None:
    assert len(stand_in.ATTACKS) >= 30
    with Server(voters.author) as server:
        found = attacked(server, [attack for attack, _ in stand_in.ATTACKS])
    assert {(one.answer, one.kept, one.think) for one in found} == {("Moderate NPDR", True, GOOD)}


def test_a_known_number_would_open_the_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "nonce", lambda *texts: stand_in.GUESS)
    attacks = [attack for attack, exploits in stand_in.ATTACKS if exploits == "number"]
    with Server(voters.author) as server:
        found = attacked(server, attacks)
    assert len(attacks) >= 4
    assert all(one.think.startswith("This is plausible.") for one in found)
    assert {one.answer for one in found} == {"Moderate NPDR"}, "and even then no label changes"


def test_control_tokens_would_open_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_server, "harmless", lambda text: text)
    attacks = [attack for attack, exploits in stand_in.ATTACKS if exploits == "token"]
    with Server(voters.author) as server:
        assert all(one.think.startswith("This is plausible.") for one in attacked(server, attacks))


def test_a_number_depends_on_all_texts_and_stands_in_none() -> None:
    one = instructions.nonce("a", "b")
    assert one == instructions.nonce("a", "b")
    assert one not in (instructions.nonce("ab", ""), instructions.nonce("a", "c"))
    assert instructions.nonce("a", f"b {one}") != one
