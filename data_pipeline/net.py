"""Guarded fetching: the only place from which the pipeline asks the network for a page.

The address comes from a table, but a server answers with redirects, and a name server with whatever it likes.
So every hop is checked anew: https, a host of the list, no user name, one port. The name is resolved once,
all its addresses have to be public, and the connection goes to one of them, with the host's name in TLS and
the request: a name that is bound to another address a moment later gains nothing. Bytes are counted as they
come and as they are unpacked; the clock runs from the first hop to the last byte, however slowly a server
drips. No proxy is used, because it would resolve the name again. What is fetched is data:
nothing here reads it. Neighbour: `knowledge/cache.py` keeps it.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit

import tenacity

from fundus_jax.records import DataError

AGENT = "fundus-jax (research; guarded fetch)"
REDIRECTS = (301, 302, 303, 307, 308)
BUSY = (429, 503)
RETRIED = ("unreachable", "busy", "failed")
KINDS = (*RETRIED, "refused", "slow", "large", "status", "malformed")
PIECE = 64 << 10  # bytes read at a time
MOST_ADDRESSES = 4  # of one name, that are tried in turn
LONGEST = 2048  # characters of an address
BACKOFF = tenacity.wait_random_exponential(multiplier=1, max=30)  # seconds
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 behind IPv6-only networks
# Metadata services of clouds that Python's tables may call public: Azure's, Oracle's.
_METADATA = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.0.0.0/24"))

Resolve = Callable[[str, int], list[str]]


class FetchError(DataError):
    """No page. `kind` is one of KINDS; `retry_after`: seconds that the server asks to be left alone."""

    def __init__(self, kind: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a fetch. bytes: of the body, packed and unpacked, each. seconds: for one try with all its
    redirects; the name server's own time-out comes on top. tries: how often a server may fail."""

    bytes: int = 32 << 20
    seconds: float = 60.0
    redirects: int = 5
    tries: int = 4


@dataclass(frozen=True, slots=True)
class Page:
    """What an address gave: `address` after redirects, `kind` as in text/html, `body` unpacked."""

    address: str
    kind: str
    body: bytes


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: neither private, loopback, link-local, shared,
    multicast or reserved, nor a cloud's metadata service, nor one of these inside an IPv6 address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.sixtofour is not None or ip.teredo is not None:
            return False
    inside = ip.is_multicast or ip.is_reserved or any(ip in network for network in _METADATA)
    return ip.is_global and not inside


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, each once, in the order of the resolver. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def tls() -> ssl.SSLContext:
    """TLS 1.2 or newer; the certificate has to be valid for the host's name."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Fetcher:
    """Gets pages from a list of hosts.

    Args:
      hosts: name -> seconds from one request to the next. No other host is asked, not even by redirect.
      limits: bounds of each fetch.
      port: the one that may be asked.
      resolve, permitted, context, clock, sleep: what tests replace; the defaults are the guard.
    """

    def __init__(
        self,
        hosts: Mapping[str, float],
        limits: Limits | None = None,
        *,
        port: int = 443,
        resolve: Resolve = resolve,
        permitted: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.hosts, self.limits, self.port = dict(hosts), limits or Limits(), port
        self._resolve, self._permitted, self._context = resolve, permitted, context or tls()
        self._clock, self._sleep = clock, sleep
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def get(self, address: str, private: Mapping[str, str] | None = None) -> Page:
        """The page at an address.

        Args:
          address: https, on one of the hosts.
          private: further parameters of the query, such as a key; they go to the first hop only, and stand in
            no error and no Page.

        Raises FetchError, which names the address and what was wrong.
        """
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, FetchError) and e.kind in RETRIED),
            wait=_pause,
            stop=tenacity.stop_after_attempt(self.limits.tries),
            sleep=self._sleep,
            reraise=True,
        )
        return tries(self._follow, address, dict(private or {}))

    def _follow(self, address: str, private: Mapping[str, str]) -> Page:
        deadline = self._clock() + self.limits.seconds
        for _ in range(self.limits.redirects + 1):
            parts = self._checked(address)
            self._turn(str(parts.hostname))
            with _Exchange(self, parts, deadline) as exchange:
                location = exchange.ask(private)
                if location is None:
                    return exchange.page(parts.geturl())
            address, private = urljoin(parts.geturl(), location), {}
        raise FetchError("refused", f"{address}: more than {self.limits.redirects} redirects")

    def _checked(self, address: str) -> SplitResult:
        """The parts of an address that may be asked, without fragment."""
        shown = address[:200]
        if len(address) > LONGEST or any(not "!" <= c <= "~" for c in address):
            raise FetchError("refused", f"{shown!r}: longer than {LONGEST} characters, or not plain ASCII")
        try:
            parts = urlsplit(address)
            port = parts.port or 443
        except ValueError as error:
            raise FetchError("refused", f"{shown!r}: no address ({error})") from None
        if parts.scheme != "https" or "@" in parts.netloc or port != self.port:
            raise FetchError("refused", f"{shown}: only https, without a user name, on port {self.port}")
        if parts.hostname not in self.hosts:
            raise FetchError(
                "refused", f"{shown}: the host is not on the list ({', '.join(sorted(self.hosts))})"
            )
        return parts._replace(path=parts.path or "/", fragment="")

    def _turn(self, host: str) -> None:
        """Wait until the host may be asked again."""
        with self._lock:
            now = self._clock()
            at = max(now, self._next.get(host, now))
            self._next[host] = at + self.hosts[host]
        if at > now:
            self._sleep(at - now)

    def connect(self, host: str, left: Callable[[], float]) -> ssl.SSLSocket:
        """A TLS connection to an address that was checked; `left` gives the seconds that remain."""
        try:
            found = self._resolve(host, self.port)
        except OSError as error:
            raise FetchError("unreachable", f"{host}: {error}") from None
        barred = [address for address in found if not self._permitted(address)]
        if barred or not found:
            raise FetchError("refused", f"{host} is at {barred or 'no address'}; only public ones are asked")
        plain = self._reach(host, found[:MOST_ADDRESSES], left)
        try:
            peer = str(plain.getpeername()[0])
            if not self._permitted(peer):
                raise FetchError("refused", f"{host}: the connection leads to {peer}, which is not public")
            plain.settimeout(left())
            return self._context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise

    def _reach(self, host: str, addresses: list[str], left: Callable[[], float]) -> socket.socket:
        errors = []
        for address in addresses:
            try:
                return socket.create_connection((address, self.port), timeout=left() / len(addresses))
            except OSError as error:
                errors.append(f"{address}: {error}")
        raise FetchError("unreachable", f"{host}: {'; '.join(errors)}")


class _Exchange:
    """One request on one connection, under one deadline."""

    def __init__(self, fetcher: Fetcher, parts: SplitResult, deadline: float) -> None:
        self.fetcher, self.parts, self.deadline = fetcher, parts, deadline
        self.limit = fetcher.limits.bytes
        self.socket: ssl.SSLSocket | None = None

    def __enter__(self) -> "_Exchange":
        return self

    def __exit__(self, *_: object) -> None:
        if self.socket is not None:
            self.socket.close()

    @property
    def name(self) -> str:
        return f"{self.parts.netloc}{self.parts.path}"[:200]

    def left(self) -> float:
        """Seconds that remain; FetchError when there are none."""
        seconds = self.deadline - self.fetcher._clock()
        if seconds <= 0:
            raise FetchError("slow", f"{self.name}: not done within {self.fetcher.limits.seconds:g} s")
        return seconds

    def ask(self, private: Mapping[str, str]) -> str | None:
        """Sends the request. Returns where a redirect leads, None for a page. Raises FetchError."""
        query = "&".join(filter(None, (self.parts.query, urlencode(private))))
        headers = {"Host": self.parts.netloc, "User-Agent": AGENT, "Accept-Encoding": "gzip"}
        headers["Connection"] = "close"
        with self._named():
            self.socket = self.fetcher.connect(str(self.parts.hostname), self.left)
            connection = http.client.HTTPConnection(self.parts.netloc)
            connection.sock = _Wire(self.socket, self.left)
            connection.request(
                "GET", f"{self.parts.path}?{query}" if query else self.parts.path, None, headers
            )
            self.response = connection.getresponse()
        status, location = self.response.status, self.response.headers.get("Location")
        if status in REDIRECTS and location:
            return location
        if status != 200:
            kind = "busy" if status in BUSY else ("failed" if status >= 500 else "status")
            after = self.response.headers.get("Retry-After", "")
            seconds = min(float(after), 120.0) if after.isascii() and after.isdigit() else 0.0
            raise FetchError(kind, f"{self.name}: answers {status}", seconds)
        return None

    def page(self, address: str) -> Page:
        """The page that the response brings."""
        packed = self.response.headers.get("Content-Encoding", "identity").strip().lower()
        if packed not in ("identity", "gzip"):
            raise FetchError("malformed", f"{self.name}: sent as {packed[:40]!r}, which was not asked for")
        with self._named():
            pieces = self._unzipped(self._pieces()) if packed == "gzip" else self._pieces()
            body = b"".join(pieces)
        return Page(address, self.response.headers.get_content_type(), body)

    def _pieces(self) -> Iterator[bytes]:
        told, size = self.response.length, 0
        if told is not None and told > self.limit:
            raise self._too_large()
        while piece := self.response.read(PIECE):
            self.left()
            size += len(piece)
            if size > self.limit:
                raise self._too_large()
            yield piece
        if told is not None and size != told:
            raise FetchError("failed", f"{self.name}: ends after {size} of {told} bytes")

    def _unzipped(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        unzip, size = zlib.decompressobj(31), 0  # 31: gzip, and nothing else
        for piece in pieces:
            data = unzip.decompress(piece, self.limit + 1 - size)
            size += len(data)
            if size > self.limit:
                raise self._too_large()
            yield data
        if not unzip.eof or unzip.unused_data:
            raise FetchError("malformed", f"{self.name}: is not one whole gzip stream")

    def _too_large(self) -> FetchError:
        return FetchError("large", f"{self.name}: more than {self.limit} bytes")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turns what the libraries raise into FetchErrors."""
        try:
            yield
        except FetchError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise FetchError("refused", f"{self.name}: {error.verify_message}") from None
        except TimeoutError:
            self.left()  # says so when all of the time is over
            raise FetchError("slow", f"{self.name}: said nothing for too long") from None
        except (http.client.RemoteDisconnected, http.client.IncompleteRead, OSError) as error:
            raise FetchError("failed", f"{self.name}: {type(error).__name__}") from None
        except (http.client.HTTPException, zlib.error) as error:
            raise FetchError("malformed", f"{self.name}: {type(error).__name__}") from None


class _Wire:
    """A socket as http.client wants one, each of whose operations ends with the deadline."""

    def __init__(self, connected: ssl.SSLSocket, left: Callable[[], float]) -> None:
        self.socket, self.left = connected, left

    def sendall(self, data: bytes) -> None:
        self.socket.settimeout(self.left())
        self.socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        del mode  # "rb", always
        return io.BufferedReader(_Reader(self.socket, self.left), PIECE)

    def close(self) -> None:
        """Nothing: the response still reads, and `_Exchange` closes."""


class _Reader(io.RawIOBase):
    def __init__(self, connected: ssl.SSLSocket, left: Callable[[], float]) -> None:
        self.socket, self.left = connected, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.socket.settimeout(self.left())
        return self.socket.recv_into(buffer)


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    after = error.retry_after if isinstance(error, FetchError) else 0.0
    return max(after, BACKOFF(state))
