"""Progress of long work: a bar on a terminal or in a notebook, log lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from ._interrupt import interruptible

logger = logging.getLogger("jaxopt_models")


@contextlib.contextmanager
def bar(title: str, total: int | None, *, done: int = 0, show: bool = True) -> Iterator[Callable]:
    """Shows how far a loop has come, and lets Ctrl-C end it.

    Writes to standard error, and no control codes where that is no terminal. An interrupt that a
    callback swallowed is raised after the step in which it came, whether a bar is shown or not.

    Args:
      title: what is being done.
      total: number of steps; ``None`` if nobody knows.
      done: steps done already.
      show: ``False`` for neither bar nor log lines.

    Yields:
      ``advance(text="")``, to be called after each step; ``text`` stands beside the bar.
    """
    if not show:
        shown = contextlib.nullcontext(lambda text="": None)
    elif sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        shown = _rich_bar(title, total, done)
    else:
        shown = _log_lines(title, total, done)
    with interruptible() as check, shown as advance:

        def step(text: str = "") -> None:
            advance(text)
            check()

        yield step


@contextlib.contextmanager
def _rich_bar(title: str, total: int | None, done: int) -> Iterator[Callable]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=done, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)


@contextlib.contextmanager
def _log_lines(title: str, total: int | None, done: int) -> Iterator[Callable]:
    start, of = time.monotonic(), "" if total is None else f" of {total}"
    state = {"done": done, "next": start + 10}

    def advance(text: str = "") -> None:
        state["done"] += 1
        now = time.monotonic()
        if now >= state["next"]:
            state["next"] = now + 10
            logger.info("%s: %d%s %s", title, state["done"], of, text)

    yield advance
    logger.info("%s: %d%s in %.1f s", title, state["done"], of, time.monotonic() - start)
