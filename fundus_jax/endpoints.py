"""The servers that a client may ask: which of them are there, and which gets the next request.

The one with the fewest requests under way gets it. One that fails so often in a row is left out, and looked
for: when several are given it has to answer GET /models first, and then one request is risked. While one of
them is there, work goes on; when none is, the calls wait, and one at a time looks. Neighbour: `chat.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from absl import logging

PROBES = (0.5, 15.0)  # seconds from one look for a lost server to the next: the first; doubling up to these
POLL, TELL = 0.05, 30.0  # seconds: how often a waiting call looks, and how often the log says that one waits


class LostError(RuntimeError):
    """No server has been there for as long as the caller would wait. Nothing has to be changed: once one is
    back, the same command goes on."""


class Endpoint:
    """One server. It is lost when it failed `limit` times in a row.

    Attributes:
        under_way: requests that it has not answered yet.
        since: when it was lost (time.monotonic), 0 while it is there.
    """

    def __init__(self, address: str, limit: int) -> None:
        self.address, self.limit = address, limit
        self.under_way, self.failures, self.since = 0, 0, 0.0
        self._pause, self._probe_at, self._probing = 0.0, 0.0, False

    @property
    def lost(self) -> bool:
        """Whether it counts as lost."""
        return self.since > 0

    @property
    def due(self) -> bool:
        """Whether it is lost, and it is time to look for it again."""
        return self.lost and not self._probing and time.monotonic() >= self._probe_at

    def enter(self) -> bool:
        """A request begins; returns whether it is one that looks whether the server is back."""
        self.under_way += 1
        self._probing = self._probing or self.lost
        return self.lost

    def leave(self, probe: bool, lost: bool | None, retry_after: float = 0.0) -> None:
        """Note how a request ended, for which `enter` gave `probe`: the server was lost, was there, or (None)
        nobody knows."""
        now = time.monotonic()
        self.under_way -= 1
        if probe:
            self._probing = False
        if lost is False:
            if self.lost:
                logging.info("%s is back after %.0f s", self.address, now - self.since)
            self.failures, self.since = 0, 0.0
        elif lost:
            self.failures += 1
            if not self.lost and self.failures >= self.limit:
                logging.warning("%s failed %d times in a row; it is looked for", self.address, self.failures)
                self.since, self._pause, self._probe_at = now, PROBES[0], now + PROBES[0]
            elif self.lost and probe:
                self._pause = min(2 * self._pause, PROBES[1])
                self._probe_at = now + self._pause
            self._probe_at = max(self._probe_at, now + retry_after)


class Endpoints:
    """The servers at `addresses`; `where` is what the log calls them, `patience` the seconds that a call
    waits when all are lost."""

    def __init__(self, where: str, addresses: Sequence[str], limit: int, patience: float) -> None:
        self.all = [Endpoint(address, limit) for address in addresses]
        self.name, self.patience, self._told = f"{where} at {', '.join(addresses)}", patience, 0.0

    @property
    def lost(self) -> bool:
        """Whether no server is there."""
        return all(one.lost for one in self.all)

    def spare(self, one: Endpoint | None) -> bool:
        """Whether another server than this one is there."""
        return any(not other.lost for other in self.all if other is not one)

    async def enter(
        self, healthy: Callable[[Endpoint], Awaitable[bool]], failed: Endpoint | None = None
    ) -> tuple[Endpoint, bool]:
        """Return a server to send a request to, and whether that looks for a lost one.

        Args:
            healthy: asks a server, with a request that costs nothing, whether it is there.
            failed: where this request failed a moment ago: it goes elsewhere if it can, and looks for nobody.

        Raises LostError when all have been lost for `patience` seconds.
        """
        while True:
            there = [one for one in self.all if not one.lost]
            due = [one for one in self.all if one.due]
            if due and (failed is None or not there):
                one = random.choice(due)  # noqa: S311 - any of them
                if await self._answers(one, healthy):
                    return one, one.enter()
            elif there:
                one = min(there, key=lambda one: (one is failed, one.under_way, random.random()))  # noqa: S311
                return one, one.enter()
            else:
                self._wait()
                await asyncio.sleep(POLL)

    async def _answers(self, one: Endpoint, healthy: Callable[[Endpoint], Awaitable[bool]]) -> bool:
        """Whether a lost server is worth a request. A lone one is: there is nowhere else to send it."""
        if len(self.all) == 1:
            return True
        probe, answered = one.enter(), None
        try:
            answered = await healthy(one)
        finally:
            one.leave(probe, True if answered is False else None)
        return bool(answered)

    def _wait(self) -> None:
        """Say that a call waits; raise LostError when it has waited long enough."""
        now = time.monotonic()
        away = now - max(one.since for one in self.all)
        if away >= self.patience:
            raise LostError(f"{self.name} has been lost for {away:.0f} s")
        if now - self._told >= TELL:
            self._told = now
            logging.warning("%s is not there; waiting for it, %.0f s more", self.name, self.patience - away)
