"""A server on loopback that speaks TLS as the hosts `NAMES`, with a certificate that only tests trust.

`Server(handle)` calls `handle(connection, request)` for each connection: the function writes bytes of the
response itself, so that it can be slow, endless or wrong in every way that a real server can.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from data_pipeline.net import Fetcher, Limits

FOLDER = Path(__file__).parent / "tls"
NAMES = ("pages.test", "other.test", "eutils.ncbi.nlm.nih.gov", "eyewiki.org")
Handle = Callable[[ssl.SSLSocket, "Request"], None]


class Request:
    """The head of a request: its first line's target, and its headers in lower case."""

    def __init__(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.target = first.split(" ")[1]
        self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k}


class Server:
    """`with Server(handle) as server`: `requests` are those that came, `port` is where."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.requests = handle, []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(FOLDER / "cert.pem", FOLDER / "key.pem")
        self.over = threading.Event()

    def __enter__(self) -> Server:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.listening.close()

    def fetcher(self, *, seconds: float = 20, hosts: dict[str, float] | None = None, **more) -> Fetcher:
        """A fetcher that finds the names here, and takes loopback, and nothing else, for public."""
        named = {"resolve": lambda host, port: ["127.0.0.1"], "permitted": lambda a: a == "127.0.0.1"}
        named |= {"context": trusting(), "sleep": lambda seconds: None} | more
        limits = named.pop("limits", Limits(seconds=seconds, bytes=1 << 20))
        return Fetcher(hosts or dict.fromkeys(NAMES, 0.0), limits, port=self.port, **named)

    def at(self, path: str = "/", host: str = "pages.test") -> str:
        """An address here."""
        return f"https://{host}:{self.port}{path}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),  # a client that has had enough leaves
            self.context.wrap_socket(plain, server_side=True) as connection,
        ):
            head = b""
            while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
                head += more
            if head:
                request = Request(head.partition(b"\r\n\r\n")[0])
                self.requests.append(request)
                self.handle(connection, request)


def trusting() -> ssl.SSLContext:
    """A client's context that trusts the tests' certificate, and checks names."""
    return ssl.create_default_context(cafile=str(FOLDER / "cert.pem"))


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole response; underscores in names of headers are hyphens."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
