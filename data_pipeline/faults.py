"""Named fault points: a test arms one and the process dies there as if by `kill -9`.

A crash test by random timing rarely lands inside a commit window of a few microseconds. Code that commits
something calls `hit("name")` between its steps; in production that is one look-up in the environment.
Armed by FUNDUS_FAULT="name:ordinal": the ordinal-th hit of that name (from 1) kills the process.
"""

import os
import signal
from collections import Counter

VARIABLE = "FUNDUS_FAULT"

_hits: Counter[str] = Counter()


def hit(name: str) -> None:
    """Die by SIGKILL if the environment arms this hit of `name`; otherwise do nothing."""
    armed = os.environ.get(VARIABLE)
    if not armed:
        return
    point, _, ordinal = armed.partition(":")
    if point != name:
        return
    _hits[name] += 1
    if _hits[name] == int(ordinal):
        os.kill(os.getpid(), signal.SIGKILL)
