"""The guard of fetching, against a real TLS server on loopback that does what a hostile one would."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading

import pytest

from data_pipeline import net
from data_pipeline.net import Fetcher, FetchError, Limits, is_public
from tests.data_pipeline.tls_server import NAMES, Server, answer, trusting


def fails(fetcher: Fetcher, address: str, kind: str, words: str, **more) -> FetchError:
    """The error of a fetch, after its kind and words were checked."""
    with pytest.raises(FetchError, match=words) as caught:
        fetcher.get(address, **more)
    assert caught.value.kind == kind
    return caught.value


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",  # noqa: S104
        "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1", "239.1.2.3", "255.255.255.255",
        "240.0.0.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fc00::1",
        "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:7f00:1::1", "localhost", "",
        "1.2.3", "0x7f.1",
    ],
)  # fmt: skip
def test_no_address_inside_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["130.14.29.110", "8.8.8.8", "2607:f220:41e:4290::110", "64:ff9b::808:808"]
)
def test_addresses_outside_are(address: str) -> None:
    assert is_public(address)


def test_a_page_is_had_by_name_over_tls() -> None:
    body = gzip.compress(b"<html>drusen</html>", mtime=0)
    kind = "text/html; charset=utf-8"
    with Server(lambda c, r: c.sendall(answer(body, Content_Encoding="gzip", Content_Type=kind))) as server:
        page = server.fetcher().get(server.at("/a?b=1#c"), {"api_key": "s3cret"})
    assert (page.body, page.kind) == (b"<html>drusen</html>", "text/html")
    assert page.address == server.at("/a?b=1")  # without the fragment, and without what is private
    [request] = server.requests
    assert request.target == "/a?b=1&api_key=s3cret"
    assert request.headers["host"] == f"pages.test:{server.port}"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://pages.test/", "only https"),
        ("ftp://pages.test/", "only https"),
        ("file:///etc/passwd", "only https"),
        ("https://pages.test:22/", "only https"),
        ("https://user@pages.test/", "only https"),
        ("https://pages.test\\@evil.test/", "only https"),
        ("https://evil.test/", "not on the list"),
        ("https://pages.test.evil.test/", "not on the list"),
        ("https://127.0.0.1/", "not on the list"),
        ("https://[::1]/", "not on the list"),
        ("https://[::1/", "no address"),
        ("https://pages.test:99999/", "no address"),
        ("https://pages.test/\r\nHost: evil.test", "plain ASCII"),
        ("https://pаges.test/", "plain ASCII"),  # the second letter is Cyrillic
        ("https://pages.test/" + "a" * 3000, "longer than"),
    ],
)
def test_other_addresses_are_refused_before_anything_is_asked(address: str, words: str) -> None:
    def never(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was looked up")

    fails(Fetcher({"pages.test": 0.0}, resolve=never), address, "refused", words)


def test_the_default_guard_lets_nothing_through_to_this_machine() -> None:
    with Server(lambda c, r: c.sendall(answer(b"inside"))) as server:
        fetcher = server.fetcher(permitted=is_public)
        fails(fetcher, server.at(), "refused", r"is at \['127.0.0.1'\]; only public")
        both = server.fetcher(permitted=is_public, resolve=lambda host, port: ["8.8.8.8", "127.0.0.1"])
        fails(both, server.at(), "refused", "only public")  # one that is barred is one too many
    assert server.requests == []


def test_the_name_is_looked_up_once_and_the_checked_address_is_the_one_that_is_asked() -> None:
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    with Server(lambda c, r: c.sendall(answer(b"x"))) as server:
        fetcher = server.fetcher(resolve=rebinding)
        assert fetcher.get(server.at()).body == b"x"
        assert asked == ["pages.test"]
        fails(fetcher, server.at(), "refused", "127.0.0.2")  # looked up anew for a new page, and checked anew
    assert len(server.requests) == 1


def test_an_address_that_turns_out_to_be_another_is_refused(monkeypatch) -> None:
    """What the kernel says of the connection counts, whatever was asked for."""
    real = socket.create_connection
    with Server(lambda c, r: c.sendall(answer(b"x"))) as server:
        monkeypatch.setattr(
            net.socket,
            "create_connection",
            lambda address, timeout: real(("127.0.0.1", server.port), timeout),
        )
        fetcher = server.fetcher(resolve=lambda h, p: ["8.8.8.8"], permitted=is_public)
        fails(fetcher, server.at(), "refused", "leads to 127.0.0.1")
    assert server.requests == []


def test_redirects_are_followed_on_the_list_and_checked_anew() -> None:
    targets = {
        "/there": "/page",
        "/other": "https://other.test:{port}/page",
        "/plain": "http://pages.test/page",
        "/metadata": "https://169.254.169.254/latest/meta-data/",
        "/evil": "https://evil.test/",
        "/inside": "https://inside.test:{port}/page",
        "/round": "/round",
    }

    def handle(connection: ssl.SSLSocket, request) -> None:
        path = request.target.partition("?")[0]
        if path in targets:
            location = targets[path].format(port=server.port)
            connection.sendall(answer(b"", "302 Found", Location=location))
        else:
            connection.sendall(answer(request.target.encode()))

    with Server(handle) as server:
        hosts = dict.fromkeys((*NAMES, "inside.test"), 0.0)
        where = {"inside.test": ["10.0.0.7"]}
        fetcher = server.fetcher(hosts=hosts, resolve=lambda h, p: where.get(h, ["127.0.0.1"]))
        page = fetcher.get(server.at("/there"), {"api_key": "s3cret"})
        assert page.body == b"/page"  # the key stays with the first hop
        assert fetcher.get(server.at("/other")).address == server.at("/page", "other.test")
        fails(fetcher, server.at("/plain"), "refused", "only https")
        fails(fetcher, server.at("/metadata"), "refused", "only https, without a user name, on port")
        fails(fetcher, server.at("/evil"), "refused", "only https")
        fails(fetcher, server.at("/inside"), "refused", r"10\.0\.0\.7.*only public")
        fails(fetcher, server.at("/round"), "refused", "more than 5 redirects")


def test_a_certificate_of_another_name_is_refused() -> None:
    with Server(lambda c, r: c.sendall(answer(b"x"))) as server:
        fetcher = server.fetcher(hosts={"wrong.test": 0.0})
        fails(fetcher, server.at(host="wrong.test"), "refused", "Hostname mismatch")
        strict = server.fetcher(context=net.tls())
        fails(strict, server.at(), "refused", "self-signed|unable to get local issuer")


def drip(connection: ssl.SSLSocket, over: threading.Event, piece: bytes) -> None:
    """Send a piece again and again until the test is over, or the client has left."""
    while not over.wait(0.02):
        connection.sendall(piece)


@pytest.mark.parametrize("where", ["head", "body", "silence"])
def test_the_clock_ends_a_server_that_drips_or_says_nothing(where: str) -> None:
    def handle(connection: ssl.SSLSocket, request) -> None:
        if where == "head":
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            drip(connection, server.over, b"a")
        elif where == "body":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            drip(connection, server.over, b"a")
        else:
            server.over.wait()

    with Server(handle) as server:
        fails(server.fetcher(seconds=0.5), server.at(), "slow", "not done within 0.5 s|too long")


def test_the_clock_runs_on_over_redirects() -> None:
    def handle(connection: ssl.SSLSocket, request) -> None:
        server.over.wait(0.3)
        connection.sendall(answer(b"", "302 Found", Location="/on"))

    with Server(handle) as server:
        limits = Limits(seconds=0.8, redirects=1000)
        fails(server.fetcher(limits=limits), server.at(), "slow", "not done within|too long")
    assert len(server.requests) < 5


@pytest.mark.parametrize("how", ["told", "endless", "chunked", "bomb"])
def test_bytes_are_bounded_as_they_come_and_as_they_are_unpacked(how: str) -> None:
    def handle(connection: ssl.SSLSocket, request) -> None:
        if how == "told":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n")
            server.over.wait()
        elif how == "bomb":
            connection.sendall(answer(gzip.compress(bytes(200 << 20)), Content_Encoding="gzip"))
        else:
            chunked = how == "chunked"
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"Transfer-Encoding: chunked\r\n" * chunked + b"\r\n")
            while True:
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n" if chunked else bytes(0x10000))

    with Server(handle) as server:
        fails(server.fetcher(), server.at(), "large", "more than 1048576 bytes")


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (answer(b"abc")[:-1], "failed", "ends after 2 of 3 bytes"),
        (b"", "failed", "RemoteDisconnected"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "malformed", "HTTPException"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", "malformed", "LineTooLong"),
        (b"ICY 200\r\n\r\n", "malformed", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "failed|malformed", "Error|Read"),
        (
            answer(gzip.compress(b"abc" * 100, mtime=0)[:-9], Content_Encoding="gzip"),
            "malformed",
            "one whole gzip",
        ),
        (answer(b"abc", Content_Encoding="gzip"), "malformed", "error"),
        (answer(b"abc", Content_Encoding="br"), "malformed", "not asked for"),
        (answer(b"", "404 Not Found"), "status", "answers 404"),
        (answer(b"", "302 Found"), "status", "answers 302"),
        (answer(b"", "500 Oops"), "failed", "answers 500"),
    ],
)
def test_a_broken_response_is_an_error_of_its_kind(response: bytes, kind: str, words: str) -> None:
    with Server(lambda c, r: c.sendall(response)) as server, pytest.raises(FetchError, match=words) as caught:
        server.fetcher(limits=Limits(tries=2, seconds=20)).get(server.at())
    assert caught.value.kind in kind.split("|")
    assert len(server.requests) == (2 if caught.value.kind == "failed" else 1)


def test_a_busy_server_is_left_alone_as_long_as_it_asks_and_tried_again() -> None:
    slept = []

    def handle(connection: ssl.SSLSocket, request) -> None:
        busy = answer(b"", "429 Too Many", Retry_After="7")
        connection.sendall(busy if len(server.requests) == 1 else answer(b"at last"))

    with Server(handle) as server:
        assert server.fetcher(sleep=slept.append).get(server.at()).body == b"at last"
    assert len(slept) == 1
    assert slept[0] >= 7


def test_a_host_is_asked_no_faster_than_its_pause() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds

    with Server(lambda c, r: c.sendall(answer(b"x"))) as server:
        fetcher = server.fetcher(
            hosts={"pages.test": 0.35, "other.test": 0.0}, clock=lambda: now[0], sleep=sleep
        )
        for _ in range(3):
            fetcher.get(server.at())
        fetcher.get(server.at(host="other.test"))
    assert slept == [0.35, 0.35]


def test_what_is_private_stands_in_no_error() -> None:
    with Server(lambda c, r: c.sendall(answer(b"", "400 Bad"))) as server:
        error = fails(server.fetcher(), server.at("/x?y=1"), "status", "400", private={"api_key": "s3cret"})
        assert "s3cret" not in str(error)
        gone = server.fetcher(resolve=lambda h, p: [])
        fails(gone, server.at(), "refused", "no address", private={"api_key": "s3cret"})

    def lost(host: str, port: int) -> list[str]:
        raise socket.gaierror("unknown name")

    fetcher = Fetcher({"pages.test": 0.0}, Limits(tries=1), resolve=lost, context=trusting())
    fails(fetcher, "https://pages.test/", "unreachable", "unknown name")
