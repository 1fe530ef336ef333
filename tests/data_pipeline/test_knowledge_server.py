"""The stage by a language model: retrieval, a server that answers, records with quotations, what is left."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from data_pipeline import jobs, knowledge_base
from data_pipeline.knowledge import extract
from data_pipeline.knowledge.config import KnowledgeConfig
from fundus_jax.chat import ChatConfig, LostError
from fundus_jax.findings import find_mentions
from fundus_jax.records import DataError, Knowledge, text_sha256
from tests.chat_server import Reply, Server

PAIRS = [("PDR", "CFP"), ("Moderate NPDR", "CFP"), ("DME", "OCT")]


def quoting(body: dict, number: int) -> Reply:
    """Claims the first two findings that each passage names, by words around it, and one that none names."""
    shown = body["messages"][-1]["content"]
    said = []
    for place, text in re.findall(r"\[(\d+)\] \(.*\)\n(?:.*\n)?(.+)", shown):
        for one in find_mentions(text)[:2]:
            role = "excluded" if one.denied else "required"
            quote = text[max(0, one.start - 20) : one.end + 20]
            said.append({"passage": int(place), "quote": quote, "finding": one.name, "role": role})
    said.append({"passage": 1, "quote": "no passage says this", "finding": "drusen", "role": "required"})
    return Reply(texts=[json.dumps({"claims": said[:24]})])


def settings(server: Server, **changes) -> KnowledgeConfig:
    """Our notes as passages, read by the model behind a server."""
    chat = ChatConfig(address=server.address, model="m", concurrency=4, patience=0, tries=1)
    return KnowledgeConfig(**{"extractor": "server", "passages": 3, "server": chat, **changes})


def records_of(out: Path) -> dict[tuple[str, str], Knowledge]:
    return {(one.label, one.modality): one for one in jobs.read(out, Knowledge)}


def test_records_are_quotations_and_a_second_run_asks_nobody(tmp_path) -> None:
    with Server(quoting) as server:
        summary = knowledge_base.run(tmp_path / "out", pairs=PAIRS, config=settings(server))
        assert (summary.answers, summary.quarantined, len(server.bodies)) == (3, 0, 3)
        again = knowledge_base.run(tmp_path / "out", pairs=PAIRS, config=settings(server))
        assert (again.shards_skipped, len(server.bodies)) == (1, 3)
    found = records_of(tmp_path / "out")
    assert set(found) == set(PAIRS)
    record = found["Moderate NPDR", "CFP"]
    assert record.claims
    for claim in record.claims:
        [passage] = [one for one in record.passages if one.sha256 == claim.passage]
        assert claim.quote in passage.text
        assert passage.sha256 == text_sha256(passage.text)
        assert (passage.licence, bool(passage.address)) == ("Apache-2.0", True)
    assert record.text == " ".join(dict.fromkeys(claim.quote for claim in record.claims))
    [beside] = (tmp_path / "out").glob("*.dropped.jsonl")
    dropped = [json.loads(line) for line in beside.read_text().splitlines()]
    assert {(one["label"], one["reason"]) for one in dropped} >= {
        (label, "not in the passage") for label, _ in PAIRS
    }
    job = json.loads((tmp_path / "out" / "job.json").read_text())["config"]
    assert (job["model"], job["retriever"], job["prompts"]) == ("m", "bm25", extract.version())


def test_every_field_of_the_configuration_has_a_flag() -> None:
    fields = {one.name for one in dataclasses.fields(KnowledgeConfig)}
    assert set(knowledge_base._FIELDS) == fields - {"server"}


def test_the_request_has_the_papers_question_and_a_schema_without_a_label(tmp_path) -> None:
    with Server(quoting) as server:
        knowledge_base.run(tmp_path / "out", pairs=PAIRS[:1], config=settings(server))
    [body] = server.bodies
    assert "Question: What are the key CFP findings for diagnosing PDR?" in body["messages"][1]["content"]
    schema = json.dumps(body["response_format"])
    assert '"label"' not in schema
    assert '"modality"' not in schema
    assert body["response_format"]["json_schema"]["strict"] is True


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(texts=["{"]), "malformed"),
        (Reply(texts=['{"claims": [], "label": "PDR"}']), "malformed"),
        (Reply(texts=['{"claims": []}'], finish="length"), "truncated"),
        (Reply(texts=[""], refusal="I would rather not"), "refused"),
        (
            Reply(texts=['{"claims": []}']),
            "no claim on PDR in CFP holds .* 0 claims, dropped because there are none",
        ),
    ],
)
def test_no_answer_is_a_quarantine_with_its_reason(tmp_path, reply: Reply, reason: str) -> None:
    with Server(lambda body, number: reply) as server:
        with pytest.raises(DataError, match="1 of 1 items are quarantined"):
            knowledge_base.run(tmp_path / "strict", pairs=PAIRS[:1], config=settings(server))
        summary = knowledge_base.run(tmp_path / "out", pairs=PAIRS[:1], config=settings(server, limit=1.0))
    assert (summary.answers, summary.quarantined) == (0, 1)
    [line] = (tmp_path / "out" / "knowledge-0000.quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "PDR/CFP"
    assert re.search(reason, json.loads(line)["reason"])


def test_a_correction_stands_where_no_claim_held_and_changes_no_other_shard(tmp_path) -> None:
    path = tmp_path / "overrides.toml"
    path.write_text(
        '[[correction]]\nlabel = "PDR"\nmodality = "CFP"\ntext = "New vessels."\n'
        'required = ["neovascularisation"]\n'
        'by = "A. Example"\nwhen = 2026-11-28\nwhy = "By definition: new vessels."\n'
    )
    nothing = Reply(texts=['{"claims": []}'])
    with Server(lambda body, number: nothing) as server:
        config = settings(server, overrides=str(path))
        assert knowledge_base.run(tmp_path / "out", pairs=PAIRS[:1], config=config).answers == 1
    assert records_of(tmp_path / "out")["PDR", "CFP"].required == ("neovascularisation",)


def test_a_lost_server_stops_the_job_and_the_next_run_goes_on(tmp_path) -> None:
    server = Server(quoting).start()
    config = settings(server)
    server.stop()
    with pytest.raises(LostError, match="the same command, given again, goes on"):
        knowledge_base.run(tmp_path / "out", pairs=PAIRS, config=config)
    with server:
        assert knowledge_base.run(tmp_path / "out", pairs=PAIRS, config=config).answers == 3
