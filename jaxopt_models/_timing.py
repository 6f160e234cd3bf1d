"""Times of several functions in turn, so that what slows the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, least: float = 0.004
) -> dict[str, list[float]]:
    """Returns seconds a call of each function, one figure a round.

    Args:
      functions: by name; each returns when its work is done.
      rounds: how often all are timed in turn.
      least: seconds that a figure is the mean over, where a call is shorter.
    """
    repeats = {}
    for name, run in functions.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(least / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, run in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times
