"""Asks a server about very many items: so many requests under way at a time, results in the items' order.

    async def ask(chat: Chat, example: Example) -> Findings: ...

    for result in ask_all(examples, ask, config, "findings.server"): ...             # one list of items
    jobs.run(job, shards, as_answered, out, through=through(ask, config, "findings.server"))  # a stage

An item ends as what `ask` returns, as a quarantine with the reason why the server gave no answer, or it stops
the job: a lost server and a spent budget do, and so does what only the user can mend. In a stage one line of
requests runs through all shards, so the server is not left without work at a shard's end, and each answer is
kept on disk as it comes (`kept`), so that a killed run repeats only the requests that were under way.

The event loop has a thread of its own: while the caller writes and flushes a shard, the requests go on.
Neighbours: `fundus_jax/chat.py` is the client, `jobs.py` runs the shards.
"""

import asyncio
import contextlib
import functools
import itertools
import logging as python_logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from data_pipeline.jobs import Quarantine, ShardInput, Through
from data_pipeline.kept import Kept
from fundus_jax.chat import Chat, ChatConfig, ChatError, LostError
from fundus_jax.records import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")
Ask = Callable[[Chat, Item], Awaitable[Result]]

STOPS = {"down": LostError, "budget": ConfigError}  # kinds of ChatError that no other item would escape
AHEAD = 32  # items taken before the first is answered, times concurrency: one slow item holds up no other
_END = object()  # stands after the last item of a shard


def ask_all(
    items: Iterable[Item],
    ask: Ask[Item, Result],
    config: ChatConfig,
    where: str,
    *,
    name: Callable[[Item], str] = attrgetter("id"),
) -> Generator[Result | Quarantine, None, None]:
    """What `ask` gives for each item, in the items' order, with `config.concurrency` of them under way.

    Args:
        items: taken as they are needed, so that there may be any number of them.
        ask: makes the requests about one item and returns its result; it runs in the thread of the event
            loop, where long work belongs into `asyncio.to_thread`. A ChatError that leaves it is the item's
            quarantine.
        config, where: the server, and what errors call it.
        name: the key of an item in a quarantine.

    Raises LostError when the server is lost for longer than `config.patience`, ConfigError when the budget is
    spent and for what only the user can mend; and whatever else `ask` raises. No item is begun after that.
    """
    return _in_order(items, functools.partial(_settled, ask=ask, name=name), config, where)


def through(
    ask: Ask[Any, Any],
    config: ChatConfig,
    where: str,
    *,
    name: Callable[[Any], str] = attrgetter("id"),
) -> Through:
    """For `jobs.run`: a stage whose `process` gets the results of `ask` in the place of the items."""

    async def settle(chat: Chat, pair: tuple[Kept, Any]) -> tuple[Kept, Any]:
        kept, item = pair
        if item is _END:
            return pair
        return kept, await _settled(chat.remembering(kept), item, ask=ask, name=name)

    def answers(shards: Iterator[ShardInput], out: Path) -> Generator[Iterator[Any], None, None]:
        pairs = (
            (kept, item)
            for shard in shards
            for kept in [Kept(out, shard.name)]
            for item in itertools.chain(shard.items, [_END])  # type: ignore[arg-type]
        )
        with contextlib.closing(_in_order(pairs, settle, config, where)) as results:
            for kept, group in itertools.groupby(results, key=itemgetter(0)):
                yield (result for _, result in group if result is not _END)
                kept.drop()  # the shard is published

    return answers


def as_answered(shard: ShardInput, folder: Path) -> Iterable[Any]:
    """The `process` of a stage whose records are what `ask` returns."""
    del folder  # no side files
    return shard.items  # type: ignore[return-value]


async def _settled(chat: Chat, item: Item, *, ask: Ask[Item, Result], name: Callable[[Item], str]) -> Any:
    """The result of one item, or its quarantine."""
    try:
        return await ask(chat, item)
    except ChatError as error:
        if error.kind in STOPS:
            raise STOPS[error.kind](f"{error}; the same command, given again, goes on from here") from None
        return Quarantine(name(item), str(error))


def _in_order(
    items: Iterable[Any],
    settle: Callable[[Chat, Any], Coroutine[Any, Any, Any]],
    config: ChatConfig,
    where: str,
) -> Generator[Any, None, None]:
    """`settle` of each item, in order."""
    waiting: deque[Future[Any]] = deque()
    rest = iter(items)
    with _line(config, where) as submit:
        while True:
            room = AHEAD * config.concurrency - len(waiting)
            waiting.extend(submit(settle, item) for item in itertools.islice(rest, room))
            if not waiting:
                return
            yield waiting.popleft().result()


@contextlib.contextmanager
def _line(config: ChatConfig, where: str) -> Iterator[Callable[..., Future[Any]]]:
    """A client with its event loop in a thread; yields what hands it an item, and ends what is under way."""
    chat, slots = Chat(config, where), asyncio.Semaphore(config.concurrency)
    for name in ("httpx", "httpx2"):  # they log every request
        python_logging.getLogger(name).setLevel(python_logging.WARNING)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=where, daemon=True)
    thread.start()

    broken: list[Exception] = []

    async def in_turn(settle: Callable[[Chat, Any], Awaitable[Any]], item: Any) -> Any:
        async with slots:
            if broken:  # the caller will come to it; until then nothing more is asked for in vain
                raise broken[0]
            try:
                return await settle(chat, item)
            except Exception as error:
                broken.append(error)
                raise

    def run(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    try:
        run(chat.__aenter__()).result()
        yield lambda settle, item: run(in_turn(settle, item))
    finally:
        run(_end(chat)).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        logging.info("%s: %s", where, ", ".join(f"{value} {key}" for key, value in chat.counts.items()))


async def _end(chat: Chat) -> None:
    """Cancel what is under way, and close the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await chat.__aexit__()
    await asyncio.get_running_loop().shutdown_default_executor()
