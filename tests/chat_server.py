"""A server on loopback that speaks OpenAI's chat protocol, as a test wants it to answer.

It is a real HTTP server in threads of its own, so that the client under test opens connections, waits and is
cut off as it would be elsewhere. `Reply` says what one request gets; the function given to `Server` chooses.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(kw_only=True)
class Reply:
    """What one request gets. texts: the choices. raw: the whole body, in the place of a completion. wait:
    seconds before it. drip: seconds between its bytes. half, hang_up: the connection ends in the middle of
    it, or before it.
    """

    texts: list[str] = field(default_factory=list)
    finish: str = "stop"
    refusal: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None
    wait: float = 0.0
    drip: float = 0.0
    half: bool = False
    hang_up: bool = False

    def payload(self) -> bytes:
        """The body of the response."""
        if self.raw is not None:
            return self.raw.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": f"status {self.status} it is", "code": None}}).encode()
        choices = [
            {
                "index": i,
                "finish_reason": self.finish,
                "message": {"role": "assistant", "content": text, "refusal": self.refusal},
            }
            for i, text in enumerate(self.texts)
        ]
        usage = {"prompt_tokens": 10, "completion_tokens": len(choices), "total_tokens": 10 + len(choices)}
        return json.dumps(
            {"id": "1", "object": "chat.completion", "choices": choices, "usage": usage}
        ).encode()


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 5 by default: a busy machine would reset connections at random


class Server:
    """`with Server(lambda body, number: Reply(...)) as server`: number counts requests from 0.

    Attributes: bodies, headers and times of all requests; most: how many were under way at once; looks: how
    often a client asked whether it is there, which `there` answers. `stop` and `start` take it off its port
    and put it back.
    """

    def __init__(self, reply: Callable[[Body, int], Reply]) -> None:
        self.reply, self.port = reply, 0
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.now = self.most = self.looks = 0
        self.there = 200  # status of the answer to GET
        self._lock, self._server = threading.Lock(), None

    @property
    def address(self) -> str:
        """What a client is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Server:
        """Listen, on the same port as before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
                outer.serve(self)

            def do_GET(self) -> None:  # noqa: N802
                outer.look(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Listening(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Leave the port; connections that are open are reset at their next request."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        length = int(handler.headers["Content-Length"])
        sent = handler.rfile.read(length)
        if len(sent) < length:
            return  # the client went away while it asked
        body = json.loads(sent)
        with self._lock:
            number = len(self.bodies)
            self.bodies.append({"path": handler.path, **body})
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        reply = self.reply(body, number)
        time.sleep(reply.wait)
        with self._lock:
            self.now -= 1
        handler.close_connection = True  # so that no open connection outlives `stop`
        if reply.hang_up:
            return
        payload = reply.payload()
        try:
            handler.send_response(reply.status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(payload)))
            handler.send_header("Connection", "close")
            for name, value in reply.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            self._send(handler, payload[: len(payload) // 2] if reply.half else payload, reply.drip)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client waited no longer

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, payload: bytes, drip: float) -> None:
        for byte in payload if drip else ():
            handler.wfile.write(bytes([byte]))
            time.sleep(drip)
        handler.wfile.write(b"" if drip else payload)

    def look(self, handler: BaseHTTPRequestHandler) -> None:
        """Say whether the server is there, as a list of its models does."""
        with self._lock:
            self.looks += 1
        payload = b'{"object": "list", "data": []}'
        handler.send_response(self.there if handler.path == "/v1/models" else 404)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(payload)
        handler.close_connection = True
