"""SIGTERM and Ctrl-C: the run saves what it has and leaves in time, to go on from there when started again.

Clouds and schedulers ask before they take a machine away, and wait about 30 seconds. What happens then
depends on where the program is:

* In most places there is nothing to save, or files are written atomically: `Stopped` is raised at once, as
  KeyboardInterrupt is.
* Within `deferred()`, where a loop holds a state that is worth saving, the wish is only noted. The loop calls
  `check` wherever its state is whole; there all processes agree, `Stopped` is raised in every one, and the
  loop saves the same step everywhere.
* While XLA compiles or a program runs, Python runs no handler at all. So a thread waits too, and ends the
  process once the grace is over: then the newest bundle stands, and what came after it is computed again.

With several processes another thread of one that gets a signal tells the others. Where these are in
`interruptible`, their threads send it to their own process: it leaves its server too, instead of letting the
first wait for it.

The exit code is 128 + the signal's number (143, 130): it tells a scheduler to start the same command again.
Neighbours: `hosts` (agreement), the loops (`check`), `launch/run.py` (`install`, and the last step out).
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, TypeVar, cast

import jax
from absl import logging

from fundus_jax import hosts

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 20.0  # seconds from the signal to the end of the process, at the latest
LISTEN = 0.5  # seconds between two looks at what other processes got
LOOK = 0.05  # seconds between two looks while a server is waited for
TOLD = "stop"  # under which they tell it (`hosts.tell`)
_wanted = 0  # the signal that came; the process has one, so the module has
_deferred = 0  # how many `deferred` blocks the main thread is in
_interruptible = False  # whether it is in `interruptible`


class Stopped(SystemExit):
    """The run was asked to stop; `code` is the exit code."""


def install(grace: float = GRACE) -> None:
    """Listen from here on; the process is gone `grace` seconds after the signal. Main thread only.

    Call it once the devices are up: their runtimes bring handlers of their own.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to even while Python runs no handler
    came: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_watch, args=(reader, grace, came), name="stop", daemon=True).start()
    if jax.process_count() > 1:
        threading.Thread(target=_exchange, args=(came,), name="stop-others", daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, _handle)


def requested() -> int:
    """The signal that this process got, or 0. To be asked where the other processes can not be."""
    return _wanted


def check() -> None:
    """Raise Stopped if any process was asked to stop. All processes call it at the same points."""
    if wanted := hosts.highest(_wanted):
        raise Stopped(128 + wanted)


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal is noted and nothing is raised before `check`, or the end of the block, which is a
    `check` too."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    check()


def interruptible(action: Callable[[], T]) -> T:
    """What `action` gives, which changes nothing and may wait for long: within `deferred()` too, a signal
    ends it at once, also one that another process got. Then all processes agree whether to go on, as in
    `check`."""
    global _deferred, _interruptible
    result: Any = None
    kept = _deferred
    try:
        _deferred, _interruptible = 0, True
        if not _wanted:
            result = action()
    except Stopped:
        logging.info("left what could be left at once")
    finally:
        _deferred, _interruptible = kept, False
    hosts.wait()  # the others may be at it for long
    check()
    return result


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run(work)`. Where a signal would raise Stopped at once, `work` is cancelled first: an
    exception amid an event loop's own code leaves that broken, and in a callback it is lost."""
    global _deferred
    result, kept = None, _deferred

    async def watched() -> T:
        task, left = asyncio.ensure_future(work), False
        while not (await asyncio.wait({task}, timeout=LOOK))[0]:
            if _wanted and not kept and not left:
                left = task.cancel()
        return task.result()

    try:
        _deferred += 1
        result = asyncio.run(watched())
    except asyncio.CancelledError:
        if not _wanted:
            raise
    finally:
        _deferred = kept
    if _wanted and not kept:
        raise Stopped(128 + _wanted)
    return cast(T, result)


def settle(tree: T) -> T:
    """`tree` once its arrays are computed; then as `check`. On one process a stop ends the wait itself;
    several have to run the same programs, and one that left would strand the others: no program should take
    longer than the grace."""
    if jax.process_count() > 1:
        jax.block_until_ready(tree)
    arrays: list[Any] = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    while not all(array.is_ready() for array in arrays) and not _wanted:
        time.sleep(0.002)
    check()
    return tree


def _handle(number: int, frame: FrameType | None) -> None:
    global _wanted
    del frame
    again, _wanted = bool(_wanted), _wanted or number
    if again and number == signal.SIGINT:  # a second Ctrl-C: somebody does not want to wait
        os._exit(128 + number)
    if not again and not _deferred:
        raise Stopped(128 + number)


def _watch(reader: int, grace: float, came: SimpleQueue[int]) -> None:
    """The thread: notice the signal, wait, and end the process if it is still there."""
    number = 0
    while number not in SIGNALS:
        number = os.read(reader, 1)[0]
    came.put(number)
    name = signal.Signals(number).name
    logging.warning("%s: stopping within %g s; the same command goes on from here", name, grace)
    time.sleep(grace)
    os.write(2, f"{name}: {grace:g} s are over; the newest finished bundle is kept\n".encode())
    os._exit(128 + number)


def _exchange(came: SimpleQueue[int]) -> None:
    """Another thread, since it waits for as long as the first process, which knows what was told, does not
    answer: tell the other processes of the signal, or hear of theirs."""
    number = 0
    while not number:
        with suppress(Empty):
            number = came.get(timeout=LISTEN)
        if not number and _interruptible and (heard := hosts.told(TOLD)):
            os.kill(os.getpid(), heard)  # it comes back through `came`
    hosts.tell(TOLD, number)
