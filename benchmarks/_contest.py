"""Functions timed in turn, each in a process of its own that is stopped while others run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

Run = Callable[[], object]
Make = Callable[[], Run]


def _serve(pipe: Connection) -> None:
    """Makes the functions that arrive, and times them when asked; runs in the child."""
    run: Run | None = None
    repeats = 1
    while True:
        make, least = pipe.recv()
        if make is None:
            assert run is not None
            run()  # brings back what other processes drove out of the caches
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            pipe.send((time.perf_counter() - start) / repeats)
            continue
        run = None
        gc.collect()
        try:
            run = make()
            run()
            start = time.perf_counter()
            run()
            repeats = max(1, int(least / max(time.perf_counter() - start, 1e-7)))
            pipe.send(None)
        except Exception as e:
            pipe.send(f"{type(e).__name__}: {e}")


class Contest:
    """Processes by name; threads that one leaves spinning do not slow down the next.

    Example:
      with Contest() as contest:
        times = contest.times({"a": functools.partial(make, 1), ...}, rounds=9)
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._children: dict[str, tuple[Any, Connection]] = {}

    def __enter__(self) -> Contest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        for process, _ in self._children.values():
            process.kill()
            process.join()
        self._children.clear()

    def times(
        self, functions: Mapping[str, Make], *, rounds: int, least: float = 0.02
    ) -> dict[str, list[float]]:
        """Returns seconds a call of each function, one figure a round.

        Args:
          functions: by name, what makes each in its process; it can be pickled, and what it makes
            returns when its work is done.
          rounds: how often all are timed in turn.
          least: seconds that a figure is the mean over, where a call is shorter.

        Raises:
          RuntimeError: if one of them cannot be made.
        """
        for name, make in functions.items():
            error = self._ask(name, make, least)
            if error is not None:
                raise RuntimeError(f"{name}: {error}")
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name in functions:
                times[name].append(self._ask(name, None, least))
        return times

    def _ask(self, name: str, make: Make | None, least: float) -> Any:
        if name not in self._children:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()  # or its end would not be seen
            self._children[name] = process, here
        process, pipe = self._children[name]
        os.kill(process.pid, signal.SIGCONT)
        pipe.send((make, least))
        try:
            return pipe.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{name}: its process ended with {process.exitcode}") from None
        finally:
            if process.is_alive():
                os.kill(process.pid, signal.SIGSTOP)


def ratio(times: Mapping[str, list[float]], name: str, over: str) -> float:
    """Returns the median of the ratios of two functions, round by round."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=True))


def median(times: Mapping[str, list[float]], name: str) -> float:
    """Returns the median of the seconds of one function."""
    return statistics.median(times[name])
