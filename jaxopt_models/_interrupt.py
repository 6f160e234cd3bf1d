"""Ctrl-C that is not lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


class Interrupt(KeyboardInterrupt):
    """Ctrl-C that a program turns into an exit code of its own.

    Python ends a process by the signal, whatever its exit code, once a plain `KeyboardInterrupt`
    has passed through code that was run from a string.
    """


@contextlib.contextmanager
def interruptible(
    error: type[KeyboardInterrupt] = KeyboardInterrupt,
) -> Iterator[Callable[[], None]]:
    """Keeps Ctrl-C in mind, so that work stops at its next step if nothing stopped it before.

    Python raises where the signal arrives. JAX has a callback at each garbage collection, and
    what is raised in a callback is printed and dropped, which lost a third of the interrupts sent
    to a small network in training. Nothing is done in other threads than the main one, and where
    Ctrl-C is ignored or handled by the caller. Nested uses share one memory, and the class of the
    outermost.

    Args:
      error: what to raise.

    Yields:
      ``check()``, to be called between two steps: raises if Ctrl-C came and was lost. What leaves
      the block was not.
    """
    handler = signal.getsignal(signal.SIGINT)
    ours = handler if isinstance(handler, _Handler) else _Handler(error)
    main = threading.current_thread() is threading.main_thread()
    if not main or handler not in (ours, signal.default_int_handler):
        yield lambda: None
        return
    if not ours.depth:
        ours.arrived = False
        signal.signal(signal.SIGINT, ours)
    ours.depth += 1
    try:
        yield ours.check
    except KeyboardInterrupt:
        ours.arrived = False
        raise
    finally:
        ours.depth -= 1
        # An interrupt in these lines may leave the handler behind; the next use takes it up.
        if not ours.depth and signal.getsignal(signal.SIGINT) is ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Handler:
    """Raises at once, and remembers until somebody asks."""

    def __init__(self, error: type[KeyboardInterrupt]) -> None:
        self.error, self.arrived, self.depth = error, False, 0

    def __call__(self, signum: int, frame: Any) -> NoReturn:
        self.arrived = True
        raise self.error

    def check(self) -> None:
        if self.arrived:
            self.arrived = False
            raise self.error
