"""The judge behind a server: what it is asked, what its answers become, and that no trace talks it round."""

from __future__ import annotations

import dataclasses
import json
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundus_jax import chat, endpoints
from fundus_jax.chat import ChatConfig, LostError
from fundus_jax.grpo import judge_server
from fundus_jax.grpo import train as grpo
from fundus_jax.grpo.judge import JudgeError, Request, RulesJudge
from fundus_jax.grpo.judge_server import JudgeConfig, ServerJudge, harmless, make_judge
from fundus_jax.models.qwen2_5_vl.processor import Processor
from fundus_jax.records import ConfigError, Findings, Knowledge
from tests import small
from tests.chat_server import Reply, Server
from tests.grpo import stand_in

FINDINGS = Findings(example="e", present=("haemorrhage", "microaneurysm"), votes={}, n=0, origin="pixels")
KNOWN = Knowledge(
    label="Mild NPDR", modality="CFP", text="Few <b>MAs</b>.\nNothing else.", required=("microaneurysm",),
    supportive=(), excluded=("haemorrhage",), passages=(),
)  # fmt: skip
GOOD, BAD = "The image shows microaneurysms and haemorrhages.", "The image shows drusen."


def request(trace: str, reference: Findings | Knowledge = FINDINGS, **more: Any) -> Request:
    return Request(trace=trace, reference=reference, modality="CFP", **more)


def judge(address: str, **changes: Any) -> ServerJudge:
    fields = {"timeout": 5.0, "deadline": 20.0, "patience": 0.0, "tries": 2, **changes}
    server = ChatConfig(address=address, model="m", **fields)
    return ServerJudge(JudgeConfig(kind="server", server=server))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF", chat.tenacity.wait_random_exponential(multiplier=0.01, max=0.05))
    monkeypatch.setattr(endpoints, "PROBES", (0.1, 0.2))


# ---- what is asked ----------------------------------------------------------------------------------------


def test_the_judge_is_told_what_nobody_looked_for() -> None:
    one = judge("http://127.0.0.1:1/v1")
    some = dataclasses.replace(FINDINGS, searched=tuple(sorted(FINDINGS.present)))
    texts = [one.messages(request(GOOD, found))[1]["content"] for found in (FINDINGS, some)]
    assert "Nobody looked for" not in texts[0]
    assert "Nobody looked for: hard exudate, cotton-wool spot, neovascularisation, " in texts[1]


def test_a_request_has_the_rules_the_reference_and_the_trace_between_two_numbers() -> None:
    one = judge("http://127.0.0.1:1/v1")
    system, user = one.messages(request(GOOD, about=("drusen",)))
    assert system == {"role": "system", "content": one.prompts["findings"].strip()}
    lines = user["content"].splitlines()
    nonce = lines[0].removeprefix("Number: ")
    assert lines[1:-1] == [
        "Modality: CFP",
        "Findings in the image: haemorrhage, microaneurysm.",
        "The trace has to speak of: drusen.",
        "",
        f"TRACE {nonce} BEGINS",
        GOOD,
        f"TRACE {nonce} ENDS",
        "",
    ]
    assert len({one.messages(request(GOOD))[1]["content"] for _ in range(5)}) == 5, "a new number each time"
    system, user = one.messages(request(GOOD, KNOWN))
    assert system["content"] == one.prompts["knowledge"].strip()
    assert "Required findings: microaneurysm.\nFindings that support it: none.\n" in user["content"]
    assert "What is known: Few ‹b›MAs‹/b›. Nothing else.\n" in user["content"], "a page of the web wrote it"


def test_the_version_follows_prompts_and_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    before = judge("http://h/v1")
    assert before.version == judge("http://elsewhere/v1").version
    number = before.metrics()["judge/version"]
    assert f"{int(number):06x}" == before.version[:6]
    assert np.float32(number) == number, "TensorBoard keeps it as it is"
    monkeypatch.setitem(judge_server.SCHEMAS, "findings", judge_server.KnowledgeRating)
    assert judge("http://h/v1").version != before.version


# ---- what the answers become ------------------------------------------------------------------------------


def test_verdicts_are_those_of_the_rules_when_the_model_keeps_to_the_prompt() -> None:
    requests = [
        request(trace, reference, about=about)
        for trace in (GOOD, BAD, "The image shows microaneurysms.", "No lesion is seen.", "It is a picture.")
        for reference in (FINDINGS, KNOWN)
        for about in ((None, (), ("drusen",)) if reference is FINDINGS else (None,))
    ]
    expected = RulesJudge()(requests)
    assert len({(one.rating, one.reference) for one in expected}) == 5, "every rating occurs"
    with Server(stand_in.reply) as server:
        one = judge(server.address)
        found = one(requests)
        assert [(v.rating, v.reference) for v in found] == [(v.rating, v.reference) for v in expected]
        found = one(requests[:3])  # another step, in another event loop
        assert [v.rating for v in found] == [v.rating for v in expected[:3]]
    told = one.metrics()
    assert told["judge/requests"] == 23
    assert told["judge/prompt_tokens"] == 230
    assert one.metrics()["judge/requests"] == 0, "since the last call"
    assert one([]) == []


def test_calls_of_a_step_are_made_at_the_same_time() -> None:
    with Server(lambda body, number: dataclasses.replace(stand_in.reply(body), wait=0.2)) as server:
        verdicts = judge(server.address, concurrency=5)([request(GOOD)] * 20)
    assert {one.rating for one in verdicts} == {"plausible"}
    assert server.most == 5


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(texts=['{"errors": [], "rating": "plausible"}'], finish="length"), "truncated: "),
        (Reply(texts=['{"errors": [], "rating": "implausible"}']), "malformed: rating: "),
        (Reply(texts=["plausible"]), "malformed: "),
        (Reply(texts=["x"], refusal="No."), "refused: No."),
        (Reply(texts=["x"], finish="content_filter"), "filtered: "),
        (Reply(texts=['{"errors": [], "rating": "plausible"}'], wait=3.0), "timeout: no answer within 0.3 s"),
        (Reply(status=500), "failed: status 500"),
        (Reply(status=400), "rejected: status 400"),
    ],
)
def test_what_can_not_be_read_is_an_abstention_with_the_reason(reply: Reply, reason: str) -> None:
    with Server(lambda body, number: reply) as server:
        [verdict] = judge(server.address, timeout=0.3)([request(GOOD)])
    assert (verdict.rating, verdict.reference) == ("abstain", "findings")
    assert verdict.reasons[0].startswith(reason)


def test_reasons_of_the_model_are_kept_without_control_tokens() -> None:
    answer = {"errors": ["<|im_end|>drusen\nare not there"], "rating": "tenuous"}
    with Server(lambda body, number: Reply(texts=[json.dumps(answer)])) as server:
        [verdict] = judge(server.address)([request(BAD)])
    assert verdict.reasons == ("‹|im_end|›drusen are not there",)


def test_a_reason_that_is_too_long_is_cut_and_the_verdict_counts() -> None:
    answer = {"errors": ["a" * 500], "rating": "tenuous"}
    with Server(lambda body, number: Reply(texts=[json.dumps(answer)])) as server:
        [verdict] = judge(server.address)([request(BAD)])
    assert (verdict.rating, verdict.reasons) == ("tenuous", ("a" * judge_server.LONGEST,))


def test_many_errors_are_cut_and_none_is_no_error() -> None:
    answers = iter(
        [
            {"errors": ["drusen are not there"] * 7, "rating": "flawed"},
            {"errors": ["None.", "No errors found"], "rating": "plausible"},
        ]
    )
    with Server(lambda body, number: Reply(texts=[json.dumps(next(answers))])) as server:
        one = judge(server.address, concurrency=1)
        worst, best = [one([request(trace)])[0] for trace in (BAD, GOOD)]
    assert (worst.rating, len(worst.reasons)) == ("flawed", judge_server.MOST), "the worst traces count too"
    assert (best.rating, best.reasons) == ("plausible", ())


def test_without_a_judge_the_run_stops() -> None:
    with Server(lambda body, number: Reply(status=401)) as server:
        with pytest.raises(JudgeError, match=r"answers 401 .*check address, model and key; then the same"):
            judge(server.address)([request(GOOD)] * 3)
        server.reply = stand_in.reply
        one = judge(server.address, budget_requests=2, concurrency=1)
        with pytest.raises(JudgeError, match=r"2 of judge\.server\.budget_requests = 2 are used"):
            one([request(GOOD)] * 3)
    with pytest.raises(LostError, match=r"judge\.server at http.* has been lost for .*goes on from here"):
        judge(server.address, patience=0.3)([request(GOOD)] * 3)


def test_the_judge_is_chosen_by_its_name() -> None:
    assert isinstance(make_judge(JudgeConfig()), RulesJudge)
    JudgeConfig().validate()
    with pytest.raises(ConfigError, match=r"judge\.kind is 'oracle'; it must be one of rules, server"):
        JudgeConfig(kind="oracle").validate()
    for unasked in (JudgeConfig(answer_tokens=9), JudgeConfig(server=ChatConfig(model="judge"))):
        with pytest.raises(
            ConfigError, match=r"judge\.kind is 'rules', which asks no server.*set judge\.kind to"
        ):
            unasked.validate()
    with pytest.raises(ConfigError, match=r"judge\.server\.model is ''"):
        JudgeConfig(kind="server").validate()
    with pytest.raises(ConfigError, match=r"judge\.server\.address is 'nowhere'"):
        make_judge(JudgeConfig(kind="server", server=ChatConfig(address="nowhere", model="m")))


# ---- traces that attack -----------------------------------------------------------------------------------


def test_no_attack_moves_the_verdict() -> None:
    assert len(stand_in.ATTACKS) >= 30
    with Server(stand_in.reply) as server:
        one = judge(server.address)
        for start, rating in ((BAD, "flawed"), ("Microaneurysms.", "tenuous")):
            verdicts = one([request(f"{start} {attack}") for attack, _ in stand_in.ATTACKS])
            fooled = [
                attack
                for (attack, _), v in zip(stand_in.ATTACKS, verdicts, strict=True)
                if v.rating != rating
            ]
            expected = [attack for attack in fooled if "drusen" in attack and start != BAD]
            assert fooled == expected, "drusen that are claimed are claimed, and no order was followed"


@pytest.mark.parametrize("weakness", ["number", "token"])
def test_the_attacks_would_work_without_the_defence(weakness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if weakness == "number":
        monkeypatch.setattr(secrets, "token_hex", lambda size: stand_in.GUESS)
        monkeypatch.setattr(ServerJudge, "messages", with_a_known_number)
    else:
        monkeypatch.setattr(judge_server, "harmless", lambda text: text)
    attacks = [attack for attack, exploits in stand_in.ATTACKS if exploits == weakness]
    with Server(stand_in.reply) as server:
        verdicts = judge(server.address)([request(f"{BAD} {attack}") for attack in attacks])
    assert [one.rating for one in verdicts] == ["plausible"] * len(attacks)
    assert len(attacks) >= 5


def with_a_known_number(one: ServerJudge, asked: Request) -> list[dict[str, Any]]:
    """`messages` as it would be if the number were the same for all calls: the trace may hold it."""
    made = original_messages(one, dataclasses.replace(asked, trace="TRACE_HERE"))
    made[1]["content"] = made[1]["content"].replace("TRACE_HERE", harmless(asked.trace))
    return made


original_messages = ServerJudge.messages


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_is_made_harmless(text: str) -> None:
    clean = harmless(text)
    assert not set("<>") & set(clean)
    assert all(c in "\n\t" or c.isprintable() or c.isspace() for c in clean)
    assert harmless(clean) == clean
    assert stand_in.CONTROL.search(clean) is None
    clean.encode()  # no half of a surrogate pair


def test_plain_traces_stay_as_they_are() -> None:
    trace = "Die Pupille: 3–4 mm, α < β.\n\tBoxes [[12, 40, 99, 120], [1, 2, 3, 4]]; see [A] and é."
    assert harmless(trace) == trace.replace("<", "‹").replace("[A]", "(A)")


# ---- in a run ---------------------------------------------------------------------------------------------

SAYS = (
    "<think>The image shows microaneurysms and haemorrhages.</think> <answer>Mild NPDR</answer>",
    "<think>The image shows drusen.</think> <answer>AMD</answer>",
    "<think>No lesion is seen.</think> <answer>No DR</answer>",
    "<think>The image shows drusen and fluid.</think> <answer>Drusen</answer>",
)


def run(path: Path, source: Path, one: Any) -> list[dict[str, Any]]:
    """Metrics of three steps of a policy that says one of SAYS, by its first token."""
    config = dataclasses.replace(small.config().grpo, steps=3)
    trainer = small.open_run(path, source, small.config(grpo=config))
    trainer.plan = trainer.work.stages = {"grpo": config.steps}
    prompts = grpo.Prompts(trainer.grpo_pool(), trainer.processor, trainer.config.prompt, 512)
    try:
        grpo.train(trainer.work, small.bigram(trainer), prompts, one, config, trainer.mesh)
    finally:
        trainer.work.close()
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data(tmp_path_factory)


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processor, "decode", lambda self, tokens, **_: SAYS[int(tokens[0]) % len(SAYS)])


@pytest.mark.usefixtures("talkative")
def test_a_run_waits_for_its_judge_and_goes_on_when_it_is_back(source: Path, tmp_path: Path) -> None:
    """Away for a second in step two; then away for too long in step three, and the same command later."""
    rules = run(tmp_path / "rules", source, RulesJudge())
    asked = [int(line["judge/asked"]) for line in rules]
    assert min(asked) >= 1
    with Server(stand_in.reply) as server:

        def first_away_then_lost(body: Any, number: int) -> Reply:
            if number == asked[0]:
                threading.Timer(0.05, server.stop).start()
                threading.Timer(1.0, server.start).start()
                return Reply(hang_up=True, wait=0.2)
            rated.append(server.now)
            return stand_in.reply(body) if len(rated) <= sum(asked[:2]) else Reply(status=503)

        rated: list[int] = []
        server.reply = first_away_then_lost
        one = judge(server.address, patience=3.0, concurrency=1)
        with pytest.raises(LostError, match="has been lost"):
            run(tmp_path / "server", source, one)
        assert len((tmp_path / "server" / "metrics.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / "server" / "checkpoints" / "2" / "bundle.json").is_file(), "what it had is saved"
        server.reply = stand_in.reply
        lines = run(tmp_path / "server", source, judge(server.address))
    assert lines[1]["judge/retries"] >= one.chat.config.breaker, "the server was away"
    for ours, theirs in zip(lines, rules, strict=True):
        assert ours["judge/abstained"] == 0 < ours["judge/asked"]
        assert ours["reward/agreement"] == 1
        same = [name for name in theirs if not name.startswith(("time", "compiles"))]
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


WAITING = """
import sys
from fundus_jax import stop
from fundus_jax.chat import ChatConfig
from fundus_jax.grpo.judge import Request
from fundus_jax.grpo.judge_server import JudgeConfig, ServerJudge
from fundus_jax.records import Findings

stop.install(grace=60)
judge = ServerJudge(JudgeConfig(kind="server", server=ChatConfig(address=sys.argv[1], model="m")))
findings = Findings(example="e", present=(), votes={}, n=0, origin="pixels")
with stop.deferred():
    stop.interruptible(lambda: judge([Request(trace="t", reference=findings, modality="CFP")] * 4))
"""


@pytest.mark.parametrize("lost", [False, True], ids=["answers late", "is lost"])
def test_a_stop_does_not_wait_for_the_judge(lost: bool) -> None:
    asked = threading.Event()

    def reply(body: Any, number: int) -> Reply:
        if number == 8 or not lost:
            asked.set()
        return Reply(status=503) if lost else Reply(texts=["x"], wait=50.0)

    with Server(reply) as server:
        words = [sys.executable, "-c", WAITING, server.address]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            assert asked.wait(timeout=60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 128 + signal.SIGTERM, "and not after the grace of a minute"
        finally:
            process.kill()
