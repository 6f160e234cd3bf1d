"""The loop of every training: a bar, checkpoints, Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._progress import bar


class Ended(ValueError):
    """Batches that ended too early."""


def check_batches(batches: Any, who: str) -> None:
    """Raises a `TypeError` for one batch in the place of batches: a dict, an array, or a tuple.

    A tuple is one if its parts are arrays of other types, or of other shapes but for their length.
    """
    one = isinstance(batches, Mapping) or hasattr(batches, "dtype")
    if isinstance(batches, tuple) and all(hasattr(x, "dtype") for x in batches):
        one = len({(x.dtype, jnp.shape(x)[1:]) for x in batches}) > 1
    if one:
        kind = "array" if hasattr(batches, "dtype") else type(batches).__name__
        raise TypeError(
            f"{who}: batches are one batch, of type {kind}; give [batch], or a function of the step"
        )


class Replay:
    """An iterable as a function of the step, iterated again whenever it ends.

    Args:
      batches: the iterable; one that gives other batches each time makes no resumed run exact.
      who: the public function, for messages.

    Raises:
      TypeError: for one batch in the place of batches.
      Ended: from a call, if it ends and gives nothing when it is iterated again.
    """

    def __init__(self, batches: Iterable[Any], who: str):
        check_batches(batches, who)
        self.batches = batches
        self.who = who
        self.iterator = iter(())
        self.next = 0
        self.batch: Any = None

    def __call__(self, step: int) -> Any:
        if step < self.next - 1:
            self.iterator, self.next = iter(()), 0
        while self.next <= step:
            try:
                self.batch = next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.batches)
                try:
                    self.batch = next(self.iterator)
                except StopIteration:
                    raise Ended(
                        f"{self.who}: batches ended at step {self.next} and cannot be iterated "
                        "again; pass a list, a data loader, or a function of the step"
                    ) from None
            self.next += 1
        return self.batch


def loop(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Callable[[int], Any],
    *,
    steps: int,
    title: str,
    show: bool,
    save: Callable[[Any], None],
    save_every: int,
    text: Callable[[Any], str],
    each: Callable[[int, Any, Any], bool] = lambda done, state, found: False,
) -> Any:
    """Steps until ``state.step`` is ``steps``, or until it is told to stop.

    Args:
      step: `(state, batch) -> (state, found)`; may give up the memory of the state it gets.
      state: where to begin, with an attribute ``step``.
      batches: the batch of a step.
      steps: the last step, counted from the first of all.
      title: of the bar.
      show: whether there is one.
      save: keeps a state.
      save_every: steps between two calls of it; another follows the last step, Ctrl-C, and
        batches that end too early.
      text: what stands beside the bar, from what a step found; it waits for that.
      each: called after each step with the number done, the state and what it found; true ends
        the loop.

    Returns:
      The last state.
    """
    start = int(state.step)
    try:
        with bar(title, steps, done=start, show=show) as advance:
            for i in range(start, steps):
                state, found = step(state, batches(i))
                # First, so that an interrupt in what follows finds the step counted.
                stop = each(i + 1, state, found)
                advance(text(found) if (i + 1) % 50 == 0 else "")
                if stop or (i + 1) % save_every == 0 or i + 1 == steps:
                    save(state)
                if stop:
                    break
    except (KeyboardInterrupt, Ended):
        # Interrupted inside a step the state may be given up already; then what was saved last
        # stands.
        if not any(x.is_deleted() for x in jax.tree.leaves(state) if hasattr(x, "is_deleted")):
            save(state)
        raise
    return state
