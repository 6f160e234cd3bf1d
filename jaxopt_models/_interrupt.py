"""Ctrl-C that is not lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


class Interrupt(KeyboardInterrupt):
    """Ctrl-C inside :func:`interruptible`.

    A class of its own, as Python ends a process by the signal, whatever its exit code, once a
    plain `KeyboardInterrupt` has passed through code that was run from a string.
    """


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Keeps Ctrl-C in mind, so that work stops at its next step if nothing stopped it before.

    Python raises where the signal arrives. JAX has a callback at each garbage collection, and
    what is raised in a callback is printed and dropped, which lost a third of the interrupts sent
    to a small network in training. Nothing is done where Ctrl-C is ignored, or handled by the
    caller or in another thread. Nested uses share one memory.

    Yields:
      ``check()``, to be called between two steps: raises if Ctrl-C came and was lost.
    """
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Handler):
        yield handler.check
        handler.check()
        return
    main = threading.current_thread() is threading.main_thread()
    if not main or handler is not signal.default_int_handler:
        yield lambda: None
        return
    ours = _Handler()
    signal.signal(signal.SIGINT, ours)
    try:
        yield ours.check
        ours.check()
    finally:
        signal.signal(signal.SIGINT, handler)


class _Handler:
    """Raises at once, and remembers until somebody asks."""

    def __init__(self) -> None:
        self.arrived = False

    def __call__(self, signum: int, frame: Any) -> NoReturn:
        self.arrived = True
        raise Interrupt

    def check(self) -> None:
        if self.arrived:
            self.arrived = False
            raise Interrupt
