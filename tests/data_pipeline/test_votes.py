"""Findings by vote, against a real HTTP server: majorities, failing answers, images nobody is asked about."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import findings, jobs, pictures, votes
from data_pipeline.votes import VotesConfig, VoteSource, vocabulary
from fundus_jax import chat
from fundus_jax.chat import LostError
from fundus_jax.findings import FINDINGS
from fundus_jax.records import ConfigError, DataError, Example, Findings, Knowledge
from tests.chat_server import Body, Reply, Server
from tests.data_pipeline import voters
from tests.data_pipeline.made import example

CORE = vocabulary()
SEEN = {"microaneurysm": 5, "haemorrhage": 3, "hard exudate": 2, "drusen": 1}  # votes of five


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voters.idrid(tmp_path_factory.mktemp("votes"))


def config(server: Server, model: str = "stand-in", **changes: Any) -> VotesConfig:
    return VotesConfig(server=voters.chat(server.address, model=model), **changes)


def run(examples: Path, out: Path, reply: Callable[[Body, int], Reply], kind: str = "votes", **changes: Any):
    """Records by example, and the server with all that it was asked."""
    with Server(reply) as server:
        source = findings.make_source(kind, config(server, **changes))
        findings.run(examples, out, source=source)
    return {one.example: one for one in jobs.read(out, Findings)}, server


def log(out: Path) -> list[dict[str, Any]]:
    """The lines about requests, over all shards."""
    paths = sorted(out.glob("*.votes.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_more_than_half_of_the_votes_make_a_finding(examples: Path, tmp_path: Path) -> None:
    found, server = run(examples, tmp_path / "out", voters.voting(SEEN))
    asked = list(jobs.read(examples, Example))
    assert found.keys() == {one.id for one in asked}
    for one in found.values():
        assert (one.origin, one.n, one.present) == ("votes", 5, ("haemorrhage", "microaneurysm"))
        assert one.votes == {name: SEEN.get(name, 0) for name in CORE["CFP"]}
    assert len(server.bodies) == len({one.image for one in asked}) < len(asked), "one request an image"
    assert {line["asked"] for line in log(tmp_path / "out")} == {5}
    assert findings.run(examples, tmp_path / "out", source=again(server)).shards_skipped == 2


def test_half_of_the_votes_make_none(examples: Path, tmp_path: Path) -> None:
    found, _ = run(examples, tmp_path / "out", voters.voting({"microaneurysm": 3, "haemorrhage": 2}), n=4)
    for one in found.values():
        assert (one.n, one.votes["haemorrhage"], one.present) == (4, 2, ("microaneurysm",))


def again(server: Server) -> VoteSource:
    return VoteSource(config(server), CORE)


def test_what_is_asked(examples: Path, tmp_path: Path) -> None:
    _, server = run(examples, tmp_path / "out", voters.voting({}), temperature=0.9, seed=3)
    sent = set()
    for body in server.bodies:
        assert (body["n"], body["temperature"], body["model"]) == (5, 0.9, "stand-in")
        name, fields = voters.schema(body)
        assert (name, tuple(fields)) == ("Ballot", CORE["CFP"])
        assert {tuple(one["enum"]) for one in fields.values()} == {("present", "absent")}
        assert body["response_format"]["json_schema"]["schema"]["additionalProperties"] is False
        assert body["response_format"]["json_schema"]["schema"]["required"] == list(CORE["CFP"])
        [turn] = body["messages"]
        image, text = turn["content"]
        assert text["text"].startswith(
            "In this colour fundus photograph image, determine the presence of the following findings: "
            "microaneurysm, haemorrhage, "
        )
        assert not [label for label in ("NPDR", "PDR", "No DR") if label in text["text"]], "no label leaks"
        head, data = image["image_url"]["url"].split(",")
        assert head == "data:image/jpeg;base64"
        sent.add(base64.b64decode(data))
    stored = {pictures.of(examples, one).read() for one in jobs.read(examples, Example)}
    assert sent == stored
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == len(seeds)
    assert sorted(seeds) == sorted(line["seed"] for line in log(tmp_path / "out"))


def test_requests_are_the_same_again(examples: Path, tmp_path: Path) -> None:
    def told(name: str, **changes: Any) -> list[str]:
        _, server = run(examples, tmp_path / name, voters.voting({}), **changes)
        return sorted(json.dumps(body, sort_keys=True) for body in server.bodies)

    assert told("a") == told("b")
    assert not set(told("c", seed=1)) & set(told("a2"))


def test_both_asks_for_what_the_masks_are_not_about(examples: Path, tmp_path: Path) -> None:
    """IDRiD has masks of four lesions: they stand, whatever the votes, and new vessels are voted on."""
    found, server = run(
        examples, tmp_path / "out", voters.voting({"microaneurysm": 0, "neovascularisation": 3}), "both"
    )
    lesions = ("cotton-wool spot", "haemorrhage", "hard exudate", "microaneurysm")
    left = [name for name in CORE["CFP"] if name not in lesions]
    for one in jobs.read(examples, Example):
        record = found[one.id]
        if one.findings is None:
            assert (record.origin, record.present) == ("votes", ("neovascularisation",))
            assert record.searched == tuple(sorted(CORE["CFP"]))
            continue
        assert (record.origin, record.n, list(record.votes)) == ("both", 5, left)
        assert record.present == tuple(sorted((*one.findings, "neovascularisation")))
        assert (one.searched, record.searched) == (lesions, tuple(sorted(CORE["CFP"])))
    asked = [tuple(voters.schema(body)[1]) for body in server.bodies]
    assert sorted(map(len, asked)) == [len(left)] * 3 + [len(CORE["CFP"])] * 8
    for body, names in zip(server.bodies, asked, strict=True):
        assert f"the following findings: {', '.join(names)}." in body["messages"][0]["content"][1]["text"]
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert [way["name"] for way in job["config"]["sources"]] == ["pixels", "votes"]


def test_missing_answers_are_asked_for_again(examples: Path, tmp_path: Path) -> None:
    def reply(body: Body, number: int) -> Reply:
        texts = voters.ballots(body, {"drusen": 5})
        if body["n"] == 5:
            texts[1], texts[3] = '{"drusen": "perhaps"}', texts[3][:40]
        return Reply(texts=texts)

    found, server = run(examples, tmp_path / "out", reply)
    assert {(one.n, one.votes["drusen"], one.present) for one in found.values()} == {(5, 5, ("drusen",))}
    assert sorted({body["n"] for body in server.bodies}) == [2, 5]
    lines = log(tmp_path / "out")
    assert [line["asked"] for line in lines] == [5, 2] * (len(lines) // 2)
    assert lines[0]["failed"] == {"malformed": 2}
    assert lines[1]["failed"] == {}
    assert len({line["seed"] for line in lines}) == len(lines), "another seed for the second request"


@pytest.mark.parametrize(
    ("reply", "requests", "reason"),
    [
        (Reply(texts=["{}"] * 5), 3, "malformed: 0 of 5 answers count after 3 requests; the last: malformed"),
        (Reply(texts=["{}"] * 5, finish="length"), 3, "truncated: 0 of 5 answers count after 3 requests"),
        (Reply(texts=["no"] * 5, refusal="I am no doctor."), 3, "refused: 0 of 5 answers count"),
        (Reply(status=400), 1, "rejected: status 400"),
        (Reply(raw='{"choices": ['), 3, "malformed: 0 of 5 answers count"),
        (Reply(status=500), 2, "failed: status 500"),
    ],
)
def test_without_enough_answers_an_image_is_quarantined(
    examples: Path, tmp_path: Path, reply: Reply, requests: int, reason: str
) -> None:
    bad = "idrid/train/A/IDRiD_01/modality"
    stored = {one.id: pictures.of(examples, one).read() for one in jobs.read(examples, Example)}
    mark = base64.b64encode(stored[bad]).decode()

    def choose(body: Body, number: int) -> Reply:
        return reply if mark in json.dumps(body) else Reply(texts=voters.ballots(body, SEEN))

    with Server(choose) as server:
        source = findings.make_source("votes", config(server))
        summary = findings.run(examples, tmp_path / "out", source=source, limit=0.2)
    assert summary.quarantined == 1
    assert sum(mark in json.dumps(body) for body in server.bodies) == requests
    [line] = [
        json.loads(line)
        for path in (tmp_path / "out").glob("*.quarantine.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert line["key"] in {name for name, data in stored.items() if data == stored[bad]}
    assert line["reason"].startswith(reason)
    found = {one.example for one in jobs.read(tmp_path / "out", Findings)}
    assert found == {name for name, data in stored.items() if data != stored[bad]}, (
        "no default for the others"
    )


def test_too_many_quarantines_stop_the_job(examples: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are quarantined, more than 2.0%"):
        run(examples, tmp_path / "out", lambda body, number: Reply(texts=["{}"] * body["n"]))


def test_a_lost_server_stops_the_job_and_nothing_is_paid_twice(examples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def reply(body: Body, number: int) -> Reply:
        return Reply(texts=voters.ballots(body, SEEN)) if number < 6 else Reply(status=503)

    with Server(reply) as server:
        source = VoteSource(VotesConfig(server=voters.chat(server.address, concurrency=1)), CORE)
        with pytest.raises(LostError, match="has been lost .*goes on from here"):
            findings.run(examples, out, source=source)
        good = [json.dumps(body, sort_keys=True) for body in server.bodies[:6]]
        server.reply, first = voters.voting(SEEN), len(server.bodies)
        findings.run(examples, out, source=source)
        later = [json.dumps(body, sort_keys=True) for body in server.bodies[first:]]
    assert not set(good) & set(later)
    assert len(good) + len(later) == 11
    run(examples, tmp_path / "whole", voters.voting(SEEN))
    for path in (tmp_path / "whole").glob("*.jsonl"):
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"n": 3}, {"seed": 1}, {"temperature": 0.5}, {"retries": 0}, {"answer_tokens": 8}, {"model": "other"}],
)
def test_other_settings_are_another_job(examples: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run(examples, tmp_path / "out", voters.voting(SEEN))
    with pytest.raises(ConfigError, match="other settings"):
        run(examples, tmp_path / "out", voters.voting(SEEN), **changes)


def test_another_address_is_the_same_job(examples: Path, tmp_path: Path) -> None:
    run(examples, tmp_path / "out", voters.voting(SEEN))
    _, server = run(examples, tmp_path / "out", voters.voting(SEEN))
    assert server.bodies == []


def test_other_images_are_voted_on_again(tmp_path: Path) -> None:
    """The records may be the same where the pixels are not."""
    one, two = voters.idrid(tmp_path / "one"), voters.idrid(tmp_path / "two", quality=60, max_side=48)
    keys = [
        {shard.name: shard.key for shard in again(Server(voters.voting({}))).inputs(path)}
        for path in (one, two)
    ]
    same = [{shard.name: shard.key for shard in findings.PixelSource().inputs(path)} for path in (one, one)]
    assert keys[0].keys() == keys[1].keys()
    assert all(keys[0][name] != keys[1][name] for name in keys[0])
    assert same[0] == same[1]


def known(modality: str, *names: str, excluded: tuple[str, ...] = ()) -> Knowledge:
    return Knowledge(
        label="x", modality=modality, text="x", required=names[:1], supportive=names[1:], excluded=excluded,
        passages=(),
    )  # fmt: skip


def test_the_vocabulary_is_that_of_the_knowledge() -> None:
    words = vocabulary(
        [
            known("CFP", "venous beading", "haemorrhage", excluded=("irma",)),
            known("CFP", "microaneurysm"),
            known("UWF", "subretinal fluid"),  # which only OCT shows
        ]
    )
    assert words["CFP"] == ("microaneurysm", "haemorrhage", "venous beading", "irma")
    assert words["OCT"] == CORE["OCT"]
    assert words["UWF"] == CORE["UWF"], "nothing that it names can be seen there"
    for modality, names in (words | CORE).items():
        assert all(modality in FINDINGS[name].modalities for name in names)


def test_a_ballot_knows_its_findings_and_no_others() -> None:
    schema = votes.ballot(("cotton-wool spot", "drusen"))
    good = {"cotton-wool spot": "present", "drusen": "absent"}
    assert schema.model_validate(good).model_dump(by_alias=True) == good
    for bad in ({"drusen": "absent"}, good | {"subretinal fluid": "present"}, good | {"drusen": "unsure"}):
        with pytest.raises(ValueError, match="validation error"):
            schema.model_validate(bad)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"votes\.n is 0; it must be at least 1"):
        VotesConfig(n=0).validate()
    with pytest.raises(ConfigError, match=r"votes\.server\.model is ''"):
        findings.make_source("both", VotesConfig())
    with pytest.raises(ConfigError, match="findings is 'rules'; it must be one of masks, votes, both"):
        findings.make_source("rules", VotesConfig())


def test_an_image_that_is_gone_is_quarantined(tmp_path: Path) -> None:
    examples = voters.idrid(tmp_path)
    source = VoteSource(VotesConfig(server=voters.chat("http://127.0.0.1:1/v1")), CORE)
    [image, *_] = source.inputs(examples)[0].items()  # type: ignore[operator]
    (examples / image.picture.file.name).unlink()

    result = asyncio.run(source.ask(None, image))  # type: ignore[arg-type] - it does not come to asking
    assert result == jobs.Quarantine(
        image.id, f"{image.picture.file.name} is missing; run the ingest job again"
    )


def test_masks_of_everything_leave_nothing_to_ask(tmp_path: Path) -> None:
    whole = example(id="whole")  # as phantoms have them
    foreign = example(id="foreign", modality="OCT", findings=("microaneurysm",), searched=("microaneurysm",))
    masks = findings.PixelSource()
    source = VoteSource(VotesConfig(server=voters.chat("http://127.0.0.1:1/v1")), CORE, masks=masks)
    for one in (whole, foreign):
        image = votes.Image((one,), pictures.of(tmp_path, one))  # no picture is there to be read
        outcome = asyncio.run(source.ask(None, image))  # type: ignore[arg-type] - it does not come to asking
        assert isinstance(outcome, votes.Outcome)
        assert outcome.records == tuple(masks.find([one]))
