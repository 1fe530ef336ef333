"""What the processes of a run do together: one acts for all, all agree, all see the same values.

A run is one process, or several that `launch/distributed.py` has joined: one a host, or one an accelerator.
With several, all of them call each function here, at the same point of the program; one that does not leaves
the others waiting. Only `tell` and `told` wait for nobody. With one process nothing is exchanged, but what
`on_first` runs is watched there too: what asks the others from within it would wait for ever. Neighbours:
`checkpoints`, `stop` and the loops.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src import distributed  # its store of keys, which Orbax reads there too, has no public name
from jax.experimental import multihost_utils

from fundus_jax.records import ConfigError, DataError

T = TypeVar("T")
REFUSED = os.EX_CONFIG  # 78: the exit code where the user has to change something (ConfigError, DataError)
HOUR = 3600  # seconds that the first process waits for what the others give it
DAY = 24 * 3600  # seconds that processes wait for those at work, as while the first prepares data
LARGE = 1 << 30  # bytes that `fetch` brings onto a device at once, or a row where one is larger
_waits = itertools.count()  # a barrier's name is used once; all processes count alike
_gifts = itertools.count()  # a name is used once; all processes count alike
_alone: ContextVar[bool] = ContextVar("alone", default=False)  # within `on_first`


def _all_are_here() -> None:
    """Raises RuntimeError within `on_first`, which only one process runs."""
    if _alone.get():
        raise RuntimeError("hosts.on_first ran what all processes have to call: the others would not come")


def wait() -> None:
    """Wait until all processes are here, up to a day. Not on the devices: what waits there for long is taken
    for dead."""
    _all_are_here()
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=f"wait_{next(_waits)}", timeout_ms=1000 * DAY)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def highest(value: int) -> int:
    """The largest of the processes' numbers."""
    _all_are_here()
    return (
        value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).max())
    )


def of_first(value: int) -> int:
    """The first process's number: what it sees of the files decides for all."""
    return highest(value if is_first() else np.iinfo(np.int32).min)


def tell(name: str, value: int) -> None:
    """Leave a number for the other processes, which may be anywhere. A process tells a name once; where the
    others can not be reached any more, nothing happens."""
    client = distributed.global_state.client
    if client is not None:
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{name}/{jax.process_index()}", str(value))


def told(name: str) -> int:
    """The largest number that any process has left under `name` so far; 0 where none has."""
    client = distributed.global_state.client
    if client is None:
        return 0
    try:
        found = client.key_value_dir_get(f"{name}/")
    except jax.errors.JaxRuntimeError:  # the first process, which keeps them, is gone
        return 0
    return max((int(value) for _, value in found), default=0)


def to_first(value: Any) -> list[Any]:
    """The JSON values that the processes give, by process, to the first one once all have given theirs; []
    to the others, which do not wait. Not on the devices, so a thread beside training may call it."""
    key, client = f"to_first_{next(_gifts)}", distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return [value]
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if not is_first():
        return []
    names = [f"{key}/{process}" for process in range(jax.process_count())]
    found = [json.loads(client.blocking_key_value_get(name, 1000 * HOUR)) for name in names]
    client.key_value_delete(f"{key}/")
    return found


def gather(value: Any) -> list[Any]:
    """The JSON values that the processes give, by process; a tuple comes back as a list."""
    _all_are_here()
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # each length compiles a program: few
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def deal(items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """`work(items)`, a JSON value for each item, with the items dealt out to the processes; a tuple comes
    back as a list where there are several. If it fails on one of them, every one raises (as `on_first`)."""
    _all_are_here()
    count = jax.process_count()
    mine: list[Any] = []
    failure: BaseException | None = None
    try:
        mine = work(items[jax.process_index() :: count])
    except BaseException as error:  # raised again below, once the others know
        failure = error
    wait()
    raise_everywhere(failure)
    parts = gather(mine)
    return [parts[place % count][place // count] for place in range(len(items))]


def fetch(array: Any) -> np.ndarray:
    """All of an array on every process, wherever its parts lie."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    if array.nbytes > LARGE and array.ndim > 1:  # a stack of layers: it would not fit one device
        rows = max(1, LARGE * len(array) // array.nbytes)
        whole = np.empty(array.shape, array.dtype)
        for first in range(0, len(array), rows):
            part = slice(first, first + rows) if rows > 1 else first
            whole[part] = fetch(array[part])
        return whole
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def on_first(action: Callable[[], Any]) -> None:
    """Run `action` on the first process, up to a day; nobody goes on before it has ended.

    If it fails, every process raises: the first one the error itself, the others RuntimeError, ConfigError
    where it is one or a DataError, or SystemExit where the first process was stopped by one (`stop`).
    """
    failure: BaseException | None = None
    if is_first():
        token = _alone.set(True)
        try:
            action()
        except BaseException as error:  # raised again below, once the others know
            failure = error
        finally:
            _alone.reset(token)
    wait()
    raise_everywhere(failure)


def raise_everywhere(failure: BaseException | None) -> None:
    """Raise `failure` where it happened, and tell the other processes, which raise too (as `on_first`)."""
    _all_are_here()
    code = 0 if failure is None else 1
    if isinstance(failure, ConfigError | DataError):
        code = REFUSED
    elif isinstance(failure, SystemExit) and isinstance(failure.code, int):
        code = failure.code
    if jax.process_count() > 1:
        codes = multihost_utils.process_allgather(np.int32(code))
        if failure is None and codes.any():
            worst = int(codes.max())
            if worst not in (1, REFUSED):
                raise SystemExit(worst)
            kind = ConfigError if worst == REFUSED else RuntimeError
            raise kind(f"process {np.flatnonzero(codes).tolist()} failed; the reason is in its log")
    if failure is not None:
        raise failure
