"""The reviewers' page over HTTP, for this machine alone.

The page shows pictures of patients and what models wrote about them, and it changes what is trained on. So it
listens on the loopback address only; wants a key, as other people may be logged in here, which the address
that is printed carries once and a cookie then; answers only to the names of this machine, so that no foreign
name can be turned onto it (DNS rebinding); and takes decisions only from its own page: same origin, JSON, and
a token that stands in the page. The page may load nothing but its pictures and run nothing but its own
script. Neighbours: `desk.py` does what is asked; page/ has the page.
"""

import hmac
import json
import re
import secrets
from collections.abc import Callable
from functools import lru_cache
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from absl import logging

from data_pipeline import decisions
from data_pipeline.reviewing import cases
from data_pipeline.reviewing.desk import Desk
from fundus_jax.records import ConfigError, DataError

ADDRESS = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # under which a browser may ask
MOST_BYTES = 256 << 10  # of a request's body
SECONDS = 30  # within which a request has to arrive
TOKEN = "X-Review-Token"  # noqa: S105 - a header's name
POLICY = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'nonce-{nonce}'; "
    "script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
FILES = ("review.css", "show.js", "act.js", "review.html")
_PAGE = resources.files("data_pipeline.reviewing") / "page"
_FIELDS = ("trace", "outcome", "reason", "think", "answer")


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is answered with a status and a reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Server(ThreadingHTTPServer):
    """Serves a desk. `address` is what the reviewer opens; it holds the key."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int) -> None:
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise ConfigError(f"--port={port}: {error.strerror}; take another one, or 0 for any") from error
        self.desk = desk
        self.key, self.token = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        self.port = self.server_address[1]
        self.address = f"http://{ADDRESS}:{self.port}/?key={self.key}"
        self.picture = lru_cache(maxsize=16)(self._picture)

    def _picture(self, row: int, side: int) -> bytes:
        return cases.picture(self.desk.index, self.desk.index.case(row), side)

    def page(self, nonce: str) -> str:
        """The page with its style and script in it."""
        start = {
            "reviewer": self.desk.ledger.reviewer,
            "total": len(self.desk.index),
            "facets": self.desk.facets(),
            "reasons": list(decisions.REASONS),
            "unknown": self.desk.unknown,
        }
        style, show, act, page = ((_PAGE / name).read_text(encoding="utf-8") for name in FILES)
        parts = {
            "style": style, "script": show + act, "nonce": nonce, "token": self.token,
            "start": escape(json.dumps(start), quote=True),
        }  # fmt: skip
        # In one pass: what is put in is not looked at again.
        return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other on a connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "review", ""
    timeout = SECONDS

    def do_GET(self) -> None:  # noqa: N802 - the name is the library's
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        logging.debug("review: %s", format % args)

    def _answer(self, do: Callable[[], None]) -> None:
        try:
            self._require_own_name()
            do()
        except Refused as refused:
            self._refuse(refused.status, refused.reason)
        except (DataError, ConfigError) as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the browser has gone
        except OSError as error:
            logging.error("review: %s", error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"nothing was decided: {error}")

    def _require_own_name(self) -> None:
        name = self.headers.get("Host", "")
        if name.rpartition(":")[0] not in NAMES and name not in NAMES:
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST, f"this is {' or '.join(NAMES)}, under no other name"
            )

    def _cookie(self) -> str:
        return f"review-{self.server.port}"

    def _require_key(self) -> None:
        pairs = (part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";"))
        given = {name: value for name, _, value in pairs}.get(self._cookie(), "")
        if not _same(given, self.server.key):
            raise Refused(
                HTTPStatus.FORBIDDEN, "open the address that the review command printed; it holds the key"
            )

    def _get(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, max_num_fields=20))
        if parts.path == "/favicon.ico":  # browsers ask by themselves
            self._send(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
            return
        if parts.path == "/" and "key" in query:
            if not _same(query["key"], self.server.key):
                raise Refused(
                    HTTPStatus.FORBIDDEN, "this key is of another session; see what was printed last"
                )
        else:
            self._require_key()
        if parts.path == "/":
            nonce = secrets.token_urlsafe(18)
            more = {
                "Content-Security-Policy": POLICY.format(nonce=nonce),
                "Set-Cookie": f"{self._cookie()}={self.server.key}; HttpOnly; SameSite=Strict; Path=/",
            }
            self._send(HTTPStatus.OK, self.server.page(nonce).encode(), "text/html; charset=utf-8", more)
        elif parts.path == "/case":
            row, move = _number(query, "row"), _number(query, "move")
            self._json(self.server.desk.look(row, max(-1, min(move, 1)), query))
        elif parts.path == "/picture":
            row, side = self._row(query), _number(query, "side")
            self._send(HTTPStatus.OK, self.server.picture(row, side), "image/jpeg")
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> None:
        body = self._body()  # first: what is not read would be taken for the next request
        self._require_key()
        origin, host = self.headers.get("Origin", ""), self.headers.get("Host", "")
        if origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"origin {origin!r} is not this page's")
        if not _same(self.headers.get(TOKEN, ""), self.server.token):
            raise Refused(HTTPStatus.FORBIDDEN, "the page is of an earlier session; load it again")
        desk, path = self.server.desk, urlsplit(self.path).path
        if path == "/undo":
            self._json({"row": desk.undo()})
            return
        row = self._row(body)
        if path == "/check":
            self._json(desk.check(row, *(_text(body, name) for name in ("think", "answer"))))
        elif path == "/decide":
            self._json(desk.decide(row, *(_text(body, name) for name in _FIELDS)))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request with a body names its length")
        if int(length) > MOST_BYTES:
            self.close_connection = True
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes, at most {MOST_BYTES} are read"
            )
        data = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "only application/json is read")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "not a JSON object")
        return body

    def _row(self, query: dict[str, Any]) -> int:
        row = _number(query, "row")
        if not 0 <= row < len(self.server.desk.index):
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no trace {row}")
        return row

    def _json(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        try:
            self._json({"error": reason}, status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, status: HTTPStatus, data: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        policy = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
        self.send_response(status)
        for name, value in ({**HEADERS, **policy} | (more or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


def _number(query: dict[str, Any], name: str) -> int:
    value = query.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is missing")
    try:
        number = int(value)
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is {str(value)[:20]!r}, not a number") from error
    return max(-(2**31), min(number, 2**31))


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > cases.LONGEST:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is not a text of at most {cases.LONGEST} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name}: half of a surrogate pair") from error
    return value
