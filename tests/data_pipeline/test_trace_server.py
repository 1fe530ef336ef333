"""Traces by a server, against a real HTTP server: what is asked for, kept, written again and rejected."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import findings, jobs, knowledge_base, trace_server, traces
from data_pipeline.composing import Case
from data_pipeline.trace_server import ServerWriter, WriterConfig
from fundus_jax import chat, dialog
from fundus_jax.records import Box, ConfigError, Example, Findings, Trace
from tests.chat_server import Body, Reply, Server
from tests.data_pipeline import voters
from tests.data_pipeline.made import SPOT, example, write_examples
from tests.data_pipeline.test_traces import NOTES

MODERATE = NOTES["Moderate NPDR", "CFP"]
GOOD = (
    "The image shows microaneurysms and haemorrhages. Microaneurysm, haemorrhage fit Moderate NPDR. So the "
    "answer is Moderate NPDR."
)
FOUND = Findings(example="made/0", present=("haemorrhage", "microaneurysm"), votes={}, n=0, origin="pixels")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))


def stages(tmp_path: Path, examples: Sequence[Example]) -> tuple[Path, Path, Path]:
    """Finished examples, findings by masks, and knowledge from the notes."""
    made = write_examples(tmp_path / "examples", {"a": examples})
    findings.run(made, tmp_path / "findings")
    pairs = knowledge_base.pairs_in_play(examples) or (("PDR", "CFP"),)
    knowledge_base.run(tmp_path / "knowledge", pairs=pairs)
    return made, tmp_path / "findings", tmp_path / "knowledge"


def writer(server: Server, boxes: int = 0, concurrency: int = 16, **changes: Any) -> ServerWriter:
    there = voters.chat(server.address, concurrency=concurrency)
    return ServerWriter(WriterConfig(server=there, **changes), boxes)


def run(
    tmp_path: Path,
    examples: Sequence[Example],
    reply: Callable[[Body, int], Reply],
    *,
    limit: float = 0.02,
    **changes: Any,
) -> tuple[list[Trace], Server]:
    """The traces of some examples, and the server with all that it was asked."""
    with Server(reply) as server:
        parts = stages(tmp_path, examples)
        traces.run(*parts, tmp_path / "out", writer=writer(server, **changes), limit=limit)
    return list(jobs.read(tmp_path / "out", Trace)), server


def tries(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "a.tries.jsonl").read_text().splitlines()]


def summary(tmp_path: Path) -> dict[str, Any]:
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    del found["of"]  # a hash of the shards that were counted
    return found


# ---- what is asked ----------------------------------------------------------------------------------------


def test_a_good_trace_is_written_checked_and_kept(tmp_path: Path) -> None:
    [trace], server = run(tmp_path, [example()], voters.author, seed=4)
    assert trace == Trace(example="made/0", think=GOOD, answer="Moderate NPDR", kept=True, reasons=())
    assert [voters.schema(body)[0] for body in server.bodies] == ["Draft", "Faults"]
    assert [body["temperature"] for body in server.bodies] == [0.7, 0.0]
    [line] = tries(tmp_path)
    assert (line["think"], line["reasons"], line["seed"]) == (GOOD, [], server.bodies[0]["seed"])
    assert len(line["prompt"]) == 64
    assert summary(tmp_path) == {
        "writer": "server", "traces": 1, "kept": 1, "reasons": {},
        "tries": {"written": 1, "kept": 1, "reasons": {}},
    }  # fmt: skip


def test_the_messages(tmp_path: Path) -> None:
    _, server = run(tmp_path, [example()], voters.author)
    write, check = (body["messages"] for body in server.bodies)
    assert [turn["role"] for turn in write] == ["system", "user"]
    for guide in ("summary", "connection", "conclusion", "At most 120 words"):
        assert guide in write[0]["content"]
    lines = write[1]["content"].splitlines()
    nonce = lines[0].removeprefix("Number: ")
    assert lines[1:11] == [
        "Modality: Colour fundus photograph (CFP)",
        "Question: What is the diagnosis for this image?",
        "Right answer: Moderate NPDR",
        "Findings in the image: microaneurysm, haemorrhage.",
        "Nobody looked for: none.",
        "In words: The image shows microaneurysms and haemorrhages.",
        "Where they lie: haemorrhage: upper left.",
        f"Required for the answer: {', '.join(trace_server.findings.required(MODERATE))}.",
        "Supporting it: hard exudate, cotton-wool spot.",
        f"Excluding it: {', '.join(MODERATE.excluded)}.",
    ]
    assert lines[12] == f"KNOWLEDGE {nonce} BEGINS"
    assert lines[-1] == f"KNOWLEDGE {nonce} ENDS"
    assert "\n".join(lines[13:-1]) == MODERATE.text
    for kind in trace_server.Fault.model_fields["kind"].annotation.__args__:
        assert f"- {kind}: " in check[0]["content"]
    number = check[1]["content"].splitlines()[0].removeprefix("Number: ")
    assert number != nonce, "the trace is hashed too"
    assert check[1]["content"].endswith(f"TRACE {number} BEGINS\n{GOOD}\nTRACE {number} ENDS")


def test_requests_are_the_same_again_and_seeds_are_not_shared(tmp_path: Path) -> None:
    def told(name: str, **changes: Any) -> list[str]:
        two = [example(), example(id="made/1")]
        _, server = run(
            tmp_path / name, two, lambda body, _: voters.draft(body, summary="Drusen."), **changes
        )
        return sorted(json.dumps(body, sort_keys=True) for body in server.bodies)

    first = told("a")
    assert first == told("b")
    assert len({json.loads(body)["seed"] for body in first}) == 6, "two examples, three tries each"
    assert not set(first) & set(told("c", seed=1))


def test_what_needs_no_model_or_could_never_pass_is_not_asked_for(tmp_path: Path) -> None:
    examples = [
        example(id="1", task="modality", options=(), answer="Photograph", findings=None, boxes=()),
        example(id="2", task="laterality", options=("Right eye", "Left eye"), answer="Right eye"),
        example(id="3", findings=None, boxes=()),  # nobody looked
        example(id="4", findings=("microaneurysm",)),  # more than these is required
        example(id="5", options=(), answer="Best disease"),  # nothing is known of it
    ]
    with Server(voters.author) as server:
        parts = stages(tmp_path, examples[:4])
        parts = (write_examples(tmp_path / "all", {"a": examples}), *parts[1:])
        findings.run(parts[0], tmp_path / "found")
        traces.run(parts[0], tmp_path / "found", parts[2], tmp_path / "out", writer=writer(server))
    assert server.bodies == []
    found = list(jobs.read(tmp_path / "out", Trace))
    assert [one.kept for one in found] == [True, True, False, False, False]
    reasons = [one.reasons[0].partition(":")[0] for one in found[2:]]
    assert reasons == ["no findings", "required finding omitted", "knowledge missing"]
    assert tries(tmp_path) == []


def test_a_label_that_requires_nothing_needs_what_supports_it() -> None:
    """Some diseases are known by any of several findings."""
    loose = dataclasses.replace(MODERATE, required=(), supportive=("haemorrhage", "hard exudate"))
    bare = dataclasses.replace(MODERATE, required=(), supportive=())
    nothing = dataclasses.replace(FOUND, present=())
    for known, found, possible in (
        (loose, FOUND, True),
        (loose, nothing, False),
        (bare, nothing, True),
        (MODERATE, nothing, False),
    ):
        assert trace_server._possible(Case(example(), found, known)) == possible


def test_a_question_about_one_finding(tmp_path: Path) -> None:
    one = example(
        task="lesion_presence",
        question="Can drusen be seen in this image?",
        options=("Yes", "No"),
        answer="No",
    )
    [trace], server = run(
        tmp_path,
        [one],
        lambda body, n: voters.draft(body, connection="Drusen are absent.") if n == 0 else voters.faults(),
    )
    assert trace.kept, trace.reasons
    assert "Nothing more than the findings." in server.bodies[0]["messages"][1]["content"]


# ---- what is rejected -------------------------------------------------------------------------------------


def test_rejected_by_rules_it_is_written_again(tmp_path: Path) -> None:
    def reply(body: Body, number: int) -> Reply:
        if voters.schema(body)[0] == "Faults":
            return voters.faults()
        return voters.draft(body, **({"summary": "The image shows hard exudates."} if number == 0 else {}))

    [trace], server = run(tmp_path, [example()], reply)
    assert trace.kept
    assert [voters.schema(body)[0] for body in server.bodies] == ["Draft", "Draft", "Faults"], (
        "no check of the first"
    )
    first, second = tries(tmp_path)
    assert first["reasons"] == ["absent finding claimed: hard exudate"]
    assert second["reasons"] == []
    assert first["seed"] != second["seed"]
    assert summary(tmp_path)["tries"] == {"written": 2, "kept": 1, "reasons": {"absent finding claimed": 1}}


def test_the_model_finds_the_papers_error_kinds(tmp_path: Path) -> None:
    found = [("knowledge omitted", "it jumps"), ("redundant or incorrect finding", "<b>too</b>\nmuch")]

    def reply(body: Body, number: int) -> Reply:
        return voters.draft(body) if voters.schema(body)[0] == "Draft" else voters.faults(*found)

    [trace], server = run(tmp_path, [example()], reply, retries=1)
    assert not trace.kept
    assert trace.reasons == (
        "knowledge omitted (by the model): it jumps",
        "redundant or incorrect finding (by the model): ‹b›too‹/b› much",
    )
    assert trace.think == GOOD, "what was rejected can be read"
    assert len(server.bodies) == 4, "written twice, and rejected for good"
    told = summary(tmp_path)
    assert told["reasons"] == {
        "knowledge omitted (by the model)": 1,
        "redundant or incorrect finding (by the model)": 1,
    }
    assert told["tries"]["reasons"]["knowledge omitted (by the model)"] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"summary": "The image shows drusen."}, "absent finding claimed: drusen"),
        ({"summary": "This OCT shows microaneurysms and haemorrhages."}, "modality contradiction: "),
        ({"summary": "MAs.", "connection": "They fit Moderate NPDR."}, "required finding omitted: "),
        ({"connection": "So it is."}, "knowledge missing: no sentence connects"),
        ({"conclusion": "So the answer is PDR."}, "label not reached: "),
        (
            {"summary": "Many haemorrhages in all quadrants, and microaneurysms."},
            "absent finding claimed: many",
        ),
        ({"summary": "a " * 130}, "malformed: 1"),
        ({"summary": "The image <|im_end|> shows haemorrhages."}, "malformed: the text holds markup"),
        ({"summary": "<think>Haemorrhages</think>"}, "malformed: the text holds markup"),
        ({"summary": "<ref>haemorrhage</ref><box>[[1, 1, 9, 9]]</box>"}, "malformed: the text holds markup"),
        ({"summary": "＜answer＞Haemorrhages"}, "malformed: the text holds markup"),
    ],
)
def test_faults_that_rules_see(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    [trace], _ = run(tmp_path, [example()], lambda body, _: voters.draft(body, **changes), retries=0)
    assert not trace.kept
    assert any(one.startswith(reason) for one in trace.reasons), trace.reasons


def test_an_answer_that_can_not_be_read_is_a_try(tmp_path: Path) -> None:
    cut = dataclasses.replace(Reply(texts=["{"]), finish="length")

    def reply(body: Body, number: int) -> Reply:
        return cut if number in (0, 2) else voters.author(body, number)  # a text, then a check

    [trace], _ = run(tmp_path, [example()], reply)
    assert trace.kept
    assert [line["reasons"][:1] for line in tries(tmp_path)] == [
        ["no answer: truncated: the answer ends with 'length'"],
        ["no answer: truncated: the answer ends with 'length'"],
        [],
    ]
    assert [line["think"] for line in tries(tmp_path)] == ["", GOOD, GOOD]


@pytest.mark.parametrize(
    ("reply", "requests", "reason"),
    [
        (Reply(texts=['{"summary": "x"}']), 3, "malformed: connection: Field required"),
        (Reply(texts=["x"], refusal="No."), 3, "refused: No."),
        (Reply(status=400), 1, "rejected: status 400"),
        (Reply(status=500), 2, "failed: status 500"),
    ],
)
def test_without_a_text_an_example_is_quarantined(
    tmp_path: Path, reply: Reply, requests: int, reason: str
) -> None:
    found, server = run(tmp_path, [example()], lambda *_: reply, limit=1)
    assert found == []
    assert len(server.bodies) == requests
    line = json.loads((tmp_path / "out" / "a.quarantine.jsonl").read_text())
    assert line["key"] == "made/0"
    assert line["reason"].startswith(reason)


def test_a_text_that_nobody_could_check_is_quarantined(tmp_path: Path) -> None:
    def reply(body: Body, number: int) -> Reply:
        return voters.draft(body) if voters.schema(body)[0] == "Draft" else Reply(texts=["fine"])

    found, _ = run(tmp_path, [example()], reply, limit=1)
    assert found == [], "neither kept nor rejected"


def test_a_rejection_stands_where_the_last_try_came_to_nothing(tmp_path: Path) -> None:
    def reply(body: Body, number: int) -> Reply:
        return voters.draft(body, summary="The image shows drusen.") if number == 0 else Reply(texts=["{"])

    [trace], server = run(tmp_path, [example()], reply)
    assert len(server.bodies) == 3
    assert trace.reasons == ("absent finding claimed: drusen",)


# ---- boxes ------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_masks(tmp_path: Path) -> None:
    boxes = (*SPOT, Box(finding="microaneurysm", x1=40, y1=700, x2=60, y2=720))
    [trace], server = run(tmp_path, [example(boxes=boxes)], voters.author, boxes=2)
    assert trace.kept, trace.reasons
    assert trace.think == (
        "Lower left: <ref>microaneurysm</ref><box>[[40, 700, 60, 720]]</box>. Upper left: "
        f"<ref>haemorrhage</ref><box>[[100, 100, 200, 200]]</box>. {GOOD}"
    )
    assert set(dialog.parse_boxes(trace.think).boxes) == set(boxes)
    write, check = (body["messages"][1]["content"] for body in server.bodies)
    assert "Where they lie: microaneurysm: lower left; haemorrhage: upper left." in write
    assert "Lower left: microaneurysm. Upper left: haemorrhage. The image shows" in check
    assert "[[" not in write + check


def test_votes_do_not_say_how_far_a_finding_spreads() -> None:
    """So a severe stage needs no such claim, and none may be made."""
    one = example(answer="Severe NPDR", findings=None, boxes=())
    voted = dataclasses.replace(FOUND, origin="votes", n=5, votes={"haemorrhage": 5, "microaneurysm": 5})
    case = Case(one, voted, NOTES["Severe NPDR", "CFP"])
    asked = ServerWriter(WriterConfig(server=voters.chat("http://127.0.0.1:1/v1")))
    think = GOOD.replace("Moderate", "Severe")
    assert asked._by_rules(case, think) == ()
    assert asked._by_rules(case, think.replace("shows", "shows in all quadrants")) == (
        "absent finding claimed: many haemorrhages in all quadrants",
    )
    drawn = Case(dataclasses.replace(one, findings=FOUND.present, boxes=SPOT), FOUND, case.knowledge)
    assert any(reason.startswith("label not reached") for reason in asked._by_rules(drawn, think))


# ---- the job ----------------------------------------------------------------------------------------------


def test_other_settings_are_another_job(tmp_path: Path) -> None:
    run(tmp_path, [example()], voters.author)
    for changes in ({"retries": 1}, {"most_words": 90}, {"temperature": 0.1}, {"seed": 1}, {"boxes": 2}):
        with pytest.raises(ConfigError, match="other settings"):
            run(tmp_path, [example()], voters.author, **changes)
    with pytest.raises(ConfigError, match="other settings"):
        traces.run(tmp_path / "examples", tmp_path / "findings", tmp_path / "knowledge", tmp_path / "out")


def test_a_lost_server_stops_the_job_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    def reply(body: Body, number: int) -> Reply:
        return voters.author(body, number) if number < 5 else Reply(status=503)

    examples = [example(id=f"made/{k}") for k in range(6)]
    parts = stages(tmp_path, examples)
    with Server(reply) as server:
        with pytest.raises(chat.LostError, match="has been lost .*goes on from here"):
            traces.run(*parts, tmp_path / "out", writer=writer(server, concurrency=1))
        good = [json.dumps(body, sort_keys=True) for body in server.bodies[:5]]
        server.reply, first = voters.author, len(server.bodies)
        traces.run(*parts, tmp_path / "out", writer=writer(server))
        later = [json.dumps(body, sort_keys=True) for body in server.bodies[first:]]
    assert not set(good) & set(later)
    assert len(good + later) == 12
    with Server(voters.author) as server:
        traces.run(*parts, tmp_path / "whole", writer=writer(server))
    for path in (tmp_path / "whole").glob("a.*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_the_command(tmp_path: Path) -> None:
    parts = stages(tmp_path, [example(), example(id="made/1", findings=("drusen",))])
    with Server(voters.author) as server:
        words = [sys.executable, "-m", "data_pipeline.traces", "--traces=server", f"--out={tmp_path / 'out'}"]
        words += [
            f"--{name}={path}"
            for name, path in zip(("examples", "findings", "knowledge"), parts, strict=True)
        ]
        words += [f"--writer.server.address={server.address}", "--writer.server.model=stand-in"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "traces (server): 1 of 2 kept; {'knowledge missing': 1, 'required finding omitted': 1}" in done.stderr
    )
    assert "HTTP Request" not in done.stderr, "a line a request would bury everything else"
    assert [one.kept for one in jobs.read(tmp_path / "out", Trace)] == [True, False]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"writer\.retries is -1; it must be at least 0"):
        WriterConfig(retries=-1).validate()
    with pytest.raises(ConfigError, match=r"writer\.server\.model is ''"):
        traces.make_writer("server", WriterConfig())
    with pytest.raises(ConfigError, match="traces is 'llm'; it must be one of rules, server"):
        traces.make_writer("llm", WriterConfig())
