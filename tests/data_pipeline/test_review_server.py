"""The page's server over real sockets: who may ask, what it answers, what a decision leaves on the disk."""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import decisions, review
from data_pipeline.decisions import trace_sha256
from data_pipeline.reviewing.server import MOST_BYTES, TOKEN, Server
from fundus_jax.records import ConfigError, DataError
from tests.data_pipeline import reviews
from tests.data_pipeline.reviews import BAD, GOOD, MILD, Made, case, decide


def cases() -> list[Made]:
    """Six cases; the third has a trace that the check rejected, the last is of another data set."""
    made = [case(number) for number in range(6)]
    made[2] = case(2, BAD, ("absent finding claimed: drusen", "label not reached: x"))
    made[5] = case(5, dataset="other", modality="UWF", split="test")
    return made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server over the cases, for anna."""
    reviews.make(tmp_path / "data", cases())
    made = review.start(tmp_path / "data", tmp_path / "decisions", "anna", 0)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()
    made.desk.ledger.close()


class Answer:
    """Status, headers and body of an answer."""

    def __init__(self, found: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = found.status, found.headers, found.read()

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


def ask(server: Server, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
    """What a browser with the cookie, the page and its token gets; `headers` change or (None) remove some."""
    host = f"127.0.0.1:{server.port}"
    sent: dict[str, Any] = {"Host": host, "Cookie": f"review-{server.port}={server.key}"}
    if body is not None:
        more = {TOKEN: server.token, "Origin": f"http://{host}", "Content-Type": "application/json"}
        sent |= more
    sent |= headers or {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kept = {name: value for name, value in sent.items() if value is not None}
    connection.request("GET" if body is None else "POST", path, data, kept)
    found = Answer(connection.getresponse())
    connection.close()
    return found


def decision(row: int, made: Made, **changes: str) -> dict[str, Any]:
    """The body of a decision to accept, changed as told."""
    return {"row": row, "trace": trace_sha256(made.trace), "outcome": "accept"} | changes


def held(tmp_path: Path) -> dict[str, str]:
    """Example -> outcome, as the files have it."""
    book = decisions.read(decisions.paths(str(tmp_path / "decisions")))
    return {name: found[0].outcome for name, found in book.items()}


def test_it_listens_on_loopback_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", server.port))  # another address of this machine


def test_the_page_forbids_itself_everything_but_its_own(server: Server) -> None:
    found = ask(server, "/")
    policy = found.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)
    assert nonce
    for part in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    page = found.body.decode()
    assert f'<script nonce="{nonce[1]}">' in page
    assert "{{" not in page
    addresses = re.findall(r"""(?:src|href|action)=["']?([^"'\s>]+)|url\(|@import""", page)
    assert addresses == [], "nothing is loaded"
    again = ask(server, "/").headers["Content-Security-Policy"]
    assert nonce[1] not in again, "a nonce is for once"
    assert found.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/case?row=0&move=0", "/picture?row=0&side=500"])
def test_without_the_key_there_is_nothing(server: Server, path: str) -> None:
    for cookie in (None, "", f"review-{server.port}=", f"review-{server.port}=wrong", "other=1"):
        found = ask(server, path, headers={"Cookie": cookie})  # type: ignore[dict-item]
        assert found.status == 403
        assert b"made/0" not in found.body
    first = ask(server, f"/?key={server.key}", headers={"Cookie": None})  # type: ignore[dict-item]
    assert first.status == 200
    assert "HttpOnly; SameSite=Strict" in first.headers["Set-Cookie"]
    assert ask(server, "/?key=wrong").status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:80", "", "[::1]:80"]
)
def test_under_a_foreign_name_there_is_nothing(server: Server, host: str, tmp_path: Path) -> None:
    assert ask(server, "/", headers={"Host": host}).status == 421
    told = {"Host": host, "Origin": f"http://{host}"}
    assert ask(server, "/decide", decision(0, cases()[0]), told).status == 421
    assert held(tmp_path) == {}


def test_localhost_and_a_tunnel_are_its_names(server: Server) -> None:
    for host in ("localhost:9000", f"localhost:{server.port}", "127.0.0.1:9000", "127.0.0.1"):
        assert ask(server, "/", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({TOKEN: None}, 403),
        ({TOKEN: "wrong"}, 403),
        ({TOKEN: "wröng"}, 403),
        ({"Cookie": None}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_decisions_come_from_the_page_alone(
    server: Server, headers: dict[str, Any], status: int, tmp_path: Path
) -> None:
    headers = {name: value and value.encode().decode("latin-1") for name, value in headers.items()}
    assert ask(server, "/decide", decision(0, cases()[0]), headers).status == status
    assert held(tmp_path) == {}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        ({"row": "x"}, 400),
        ({"row": True}, 400),
        ({"row": 99}, 404),
        ({"row": -1}, 404),
        ({"row": 10**400}, 404),
        ({"row": 0, "outcome": ["accept"]}, 400),
        ({"row": 0, "outcome": "accept", "think": "x" * 20_001}, 400),
        (b'{"row": 0, "think": "\\ud800"}', 400),
        ({"row": 0, "outcome": "maybe", "trace": "0" * 64}, 409),
        ({"row": 0, "outcome": "accept", "trace": "0" * 64}, 409),
        ({"row": 0, "outcome": "withdraw", "trace": trace_sha256(cases()[0].trace)}, 409),
        (b"x" * (MOST_BYTES + 1), 413),
    ],
)
def test_what_is_no_decision_is_refused(server: Server, body: object, status: int, tmp_path: Path) -> None:
    found = ask(server, "/decide", body)
    assert (found.status, "error" in found.json) == (status, True)
    assert held(tmp_path) == {}
    assert ask(server, "/case?row=0&move=0").status == 200, "it goes on"


def test_unknown_pages_and_bad_numbers(server: Server) -> None:
    assert ask(server, "/../../etc/passwd").status == 404
    assert ask(server, "/nothing").status == 404
    assert ask(server, "/nothing", {"row": 0}).status == 404
    assert ask(server, "/case?row=x&move=0").status == 400
    assert ask(server, "/case").status == 400
    assert ask(server, "/case?row=99999999999999999999&move=1").json["row"] is None


def test_a_case_shows_all_that_is_known(server: Server) -> None:
    found = ask(server, "/case?row=0&move=0").json
    shown = found["case"]
    assert (found["place"], found["matching"], found["progress"]["open"]) == (1, 6, 6)
    assert found["next"] == 1
    assert ask(server, "/case?row=4&move=1").json["next"] is None
    assert shown["findings"]["rows"] == [
        ["microaneurysm", True, 5],
        ["haemorrhage", True, 4],
        ["hard exudate", False, 1],
    ]
    assert (shown["findings"]["n"], shown["findings"]["unseen"]) == (5, 1)
    assert shown["boxes"] == [["haemorrhage", 100, 100, 200, 200]]
    (passage,) = shown["knowledge"]["passages"]
    assert passage["licence"] == "CC-BY-4.0"
    assert passage["quotes"][0] == ["haemorrhage", "required", "more than microaneurysms"]
    assert [kind for _, kind, _ in shown["trace"]["pieces"] if kind] == ["supported"] * 5
    bad = ask(server, "/case?row=2&move=0").json["case"]["trace"]
    assert [(text, kind) for text, kind, _ in bad["pieces"] if kind] == [("drusen", "unsupported")]
    assert bad["missed"] == ["microaneurysm", "haemorrhage"]
    assert (bad["kept"], bad["reasons"]) == (
        False,
        ["absent finding claimed: drusen", "label not reached: x"],
    )


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("dataset=other", [5]),
        ("modality=CFP", [0, 1, 2, 3, 4]),
        ("label=Mild%20NPDR", []),
        ("check=rejected", [2]),
        ("check=kept&modality=CFP", [0, 1, 3, 4]),
        ("check=absent%20finding%20claimed", [2]),
        ("decision=open", [0, 2, 3, 4, 5]),
        ("decision=accept&split=train", [1]),
        ("decision=reject", []),
        ("task=nothing", []),
    ],
)
def test_filters_choose_what_is_walked_through(server: Server, query: str, rows: list[int]) -> None:
    assert ask(server, "/decide", decision(1, cases()[1])).status == 200
    forth, at = [], -1
    while (at := ask(server, f"/case?row={at}&move=1&{query}").json["row"]) is not None:
        forth.append(at)
    back, at = [], 6
    while (at := ask(server, f"/case?row={at}&move=-1&{query}").json["row"]) is not None:
        back.append(at)
    assert (forth, back) == (rows, rows[::-1])


def test_decisions_are_on_the_disk_when_it_answers(server: Server, tmp_path: Path) -> None:
    made = cases()
    assert ask(server, "/decide", decision(0, made[0])).json["case"]["decision"]["outcome"] == "accept"
    why = {"outcome": "reject", "reason": "wrong place: <b>"}
    ask(server, "/decide", decision(1, made[1], **why))
    other = GOOD.replace("microaneurysms and haemorrhages", "haemorrhages and microaneurysms")
    text = {"outcome": "correct", "think": other, "answer": "Moderate NPDR"}
    ask(server, "/decide", decision(3, made[3], **text))
    assert held(tmp_path) == {"made/0": "accept", "made/1": "reject", "made/3": "correct"}
    progress = ask(server, "/case?row=0&move=0").json["progress"]
    assert progress == {"open": 3, "accept": 1, "correct": 1, "reject": 1}
    assert ask(server, "/undo", {}).json == {"row": 3}
    assert ask(server, "/undo", {}).json == {"row": 1}
    assert held(tmp_path) == {"made/0": "accept"}
    assert ask(server, "/undo", {}).json == {"row": 0}
    assert ask(server, "/undo", {}).json == {"row": None}
    assert ask(server, "/case?row=0&move=0").json["progress"]["open"] == 6


def test_a_correction_passes_the_check_or_is_not_taken(server: Server, tmp_path: Path) -> None:
    found = ask(server, "/check", {"row": 0, "think": BAD, "answer": "Moderate NPDR"}).json
    assert "absent finding claimed: drusen" in found["reasons"]
    text = {"outcome": "correct", "think": BAD, "answer": "Moderate NPDR"}
    refused = ask(server, "/decide", decision(0, cases()[0], **text))
    assert refused.json == {"reasons": found["reasons"]}
    assert held(tmp_path) == {}


def test_a_picture_is_sent_in_the_size_of_the_screen(server: Server, tmp_path: Path) -> None:
    from PIL import Image

    found = ask(server, "/picture?row=0&side=320")
    (tmp_path / "x.jpg").write_bytes(found.body)
    assert Image.open(tmp_path / "x.jpg").size == (320, 240)
    assert found.headers["Content-Type"] == "image/jpeg"
    next((tmp_path / "data" / "examples").glob("*.array_record")).unlink()
    assert ask(server, "/picture?row=0&side=320").status == 200, "kept in memory"
    lost = ask(server, "/picture?row=1&side=320")
    assert (lost.status, "is missing; run the ingest job again" in lost.json["error"]) == (409, True)


def test_decisions_of_others_are_shown_after_ones_own(tmp_path: Path) -> None:
    made = cases()
    data = reviews.make(tmp_path / "data", made)
    decide(tmp_path / "decisions", "ben", made[0], "reject", "wrong place")
    decide(tmp_path / "decisions", "anna", case(1, MILD), "accept")
    server = review.start(data, tmp_path / "decisions", "anna", 0)
    try:
        desk = server.desk
        assert desk.look(0, 0, {})["case"]["others"] == [], "it would sway"
        shown = desk.decide(0, trace_sha256(made[0].trace), "accept", "", "", "")["case"]
        assert [one["reviewer"] for one in shown["others"]] == ["ben"]
        assert shown["disagree"]
        assert desk.look(-1, 1, {"decision": "disagree"})["row"] == 0
        assert desk.look(-1, 1, {"decision": "void"})["row"] == 1, "another text than anna read"
        assert desk.look(1, 0, {})["case"]["decision"]["void"] == "the trace has changed since"
    finally:
        server.server_close()
        server.desk.ledger.close()


def test_data_that_change_or_are_missing_are_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data" / "traces" / "train-00000.jsonl").write_text("{}\n")
    found = ask(server, "/case?row=0&move=0")
    assert (found.status, "has changed since this page was started" in found.json["error"]) == (409, True)
    with pytest.raises(DataError, match="not those that were published"):
        review.start(tmp_path / "data", tmp_path / "decisions", "ben", 0)
    with pytest.raises(DataError, match="no finished examples, findings, traces, knowledge"):
        review.start(tmp_path / "nothing", tmp_path / "decisions", "ben", 0)
    reviews.make(tmp_path / "more", cases())
    with pytest.raises(ConfigError, match="take another one"):
        review.start(tmp_path / "more", tmp_path / "decisions", "cleo", server.port)


def test_the_command_prints_an_address_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    reviews.make(tmp_path / "data", cases()[:1])
    command = [sys.executable, "-m", "data_pipeline.review", "--port=0", f"--data={tmp_path}/data"]
    command += [f"--decisions={tmp_path}/decisions", "--reviewer=anna"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    # what runs in a shell's background ignores Ctrl-C, and so would its children
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            assert re.match(r"Open http://127\.0\.0\.1:\d+/\?key=[\w-]{32}$", lines[1])
            assert str(tmp_path / "decisions" / "anna.jsonl") in lines[2]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()
