"""How the time of a function grows with its input: never how long it takes, which is the machine's affair."""

import time
from collections.abc import Callable

TIMES = 16
LINEAR = 64.0  # half way, by factors, from linear growth (16) to quadratic (256)


def growth(work: Callable[[int], object], size: int) -> float:
    """Processor seconds of `work(size)` over those of `work(size / 16)`, each the least of three runs."""

    def least(amount: int) -> float:
        seconds = []
        for _ in range(3):
            begun = time.process_time()
            work(amount)
            seconds.append(time.process_time() - begun)
        return min(seconds)

    return least(size) / least(size // TIMES)
