"""What the pipeline's throughput is measured against: a server of fixed capacity, a client without weight.

The server answers each request after `latency` seconds and works on `slots` at a time; the others wait, as in
vLLM. The client sends bytes that were made before over connections that stay open, and looks at nothing but
the length of the answer: what it reaches is what the server gives. No jax here: children are measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from fundus_jax.records import ConfigError, DataError

SAID = '{"findings": ["drusen"]}'


def _completion(n: int) -> bytes:
    message = {"role": "assistant", "content": SAID}
    body = {
        "choices": [{"index": i, "finish_reason": "stop", "message": message} for i in range(n)],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


async def _serve(slots: int, latency: float, ready: Connection) -> None:
    free = asyncio.Semaphore(slots)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked = json.loads(await _read(reader))
                async with free:
                    await asyncio.sleep(latency)
                writer.write(_completion(asked["n"]))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """One message of HTTP, its body; raises IncompleteReadError where the other side has gone."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lengths = [line.split(":")[1] for line in head.split("\r\n") if line.startswith("content-length:")]
    if not lengths:
        raise DataError(f"a message without a Content-Length, which is all that is read here: {head[:300]}")
    return await reader.readexactly(int(lengths[0]))


def _process(slots: int, latency: float, ready: Connection) -> None:
    asyncio.run(_serve(slots, latency, ready))


@contextlib.contextmanager
def server(slots: int, latency: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(slots, latency, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.kill()
        process.join()


async def _send(address: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> float:
    parts, waiting = urlsplit(address), iter([json.dumps(body).encode() for body in bodies])
    if parts.scheme != "http":
        raise ConfigError(f"--address={address} must begin with http://: this client speaks nothing else")
    host, port = parts.hostname or "", parts.port or 80
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
    head += "Content-Type: application/json\r\n"

    async def work() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for text in waiting:
            writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            answer = await _read(reader)
            if b'"choices"' not in answer:
                said = answer[:300].decode(errors="replace")
                raise DataError(f"{address} answers no completion; look at --model and the server: {said}")
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return time.perf_counter() - begun


def plain(address: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> float:
    """Answers a second to `bodies`, with so many requests under way."""
    return len(bodies) / asyncio.run(_send(address, bodies, concurrency))
