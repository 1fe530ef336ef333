"""The data stage with models behind servers: votes on images, and traces that a model writes and checks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import jobs
from data_pipeline.trace_server import WriterConfig
from data_pipeline.votes import VotesConfig
from fundus_jax import chat
from fundus_jax.chat import ChatConfig
from fundus_jax.records import ConfigError, Example, Findings, Trace
from fundus_jax.workdir import Workdir
from launch import stages
from launch.config import RunConfig, as_json
from tests import small
from tests.chat_server import Body, Reply, Server
from tests.data_pipeline import voters

SEEN = {"drusen": 4, "intraretinal fluid": 3, "microaneurysm": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))


def reply(body: Body, number: int) -> Reply:
    if voters.schema(body)[0] == "Ballot":
        return Reply(texts=voters.ballots(body, SEEN))
    return voters.author(body, number)


def config(server: Server, **changes: Any) -> RunConfig:
    there = voters.chat(server.address)
    made = small.config()
    fields = {"findings": "votes", "traces": "server", "votes": VotesConfig(server=there)}
    made.data = dataclasses.replace(made.data, **fields | {"writer": WriterConfig(server=there)} | changes)
    made.validate()
    return made


def test_the_data_stage_asks_the_servers(tmp_path: Path) -> None:
    with Server(reply) as server:
        made = config(server)
        work = Workdir(tmp_path, as_json(made))
        stages.prepare_data(made, work)
        first = len(server.bodies)
        stages.prepare_data(made, work)
        assert len(server.bodies) == first, "nothing is asked twice"
    data = tmp_path / "data"
    examples = {one.id: one for one in jobs.read(data / "examples", Example)}
    found = {one.example: one for one in jobs.read(data / "findings", Findings)}
    assert {one.origin for one in found.values()} == {"votes"}
    assert found.keys() == examples.keys()
    for name, one in found.items():
        expected = {"CFP": ("drusen",), "UWF": ("drusen",), "OCT": ("drusen", "intraretinal fluid")}
        assert one.present == expected[examples[name].modality]
    kept = [one for one in jobs.read(data / "traces", Trace) if one.kept]
    diagnosed = {examples[one.example].answer for one in kept if examples[one.example].task == "disease"}
    assert diagnosed
    assert diagnosed <= {"AMD", "Drusen", "DME", "Glaucoma", "Normal", "No DR"}, (
        "what drusen or fluid can mean"
    )
    asked = [
        way["name"] for way in json.loads((data / "findings" / "job.json").read_text())["config"]["sources"]
    ]
    assert asked == ["votes"]
    summary = json.loads((data / "traces" / "summary.json").read_text())
    assert summary["writer"] == "server"
    assert summary["kept"] == len(kept)
    work.close()


def test_a_config_without_a_model_is_refused_before_anything_happens() -> None:
    for field, kind, message in (
        ("findings", "both", r"votes\.server\.model is ''"),
        ("traces", "server", r"writer\.server\.model is ''"),
        ("traces", "llm", "data.traces is 'llm'; it must be one of rules, server"),
    ):
        made = small.config()
        setattr(made.data, field, kind)
        with pytest.raises(ConfigError, match=message):
            made.validate()
    made = small.config()
    made.data.votes.server = ChatConfig()  # nobody asks it
    made.validate()
