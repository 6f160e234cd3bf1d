"""The loop around any step: progress, evaluation, early stop, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._loop import Replay, loop
from .._options import whole
from .._resume import Checkpoints, digest
from .._table import Table
from ._state import State


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What :func:`fit` returns.

    Args:
      state: after the last step.
      best: the state of the best score; the last one if nothing was evaluated.
      history: a table, a row every so many steps: means of the metrics since the row before,
        and the score.
      stopped: whether it ended early.
    """

    state: State
    best: State
    history: Table
    stopped: bool

    def plot(self, *, ax: Any = None) -> Any:
        """Draws loss and score over the steps (needs the extra ``plot``).

        Args:
          ax: matplotlib axes to draw into; default: new ones.

        Returns:
          The matplotlib axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
        steps = self.history.column("step")
        for name in self.history.columns[1:]:
            values = self.history.column(name)
            if name.partition("/")[0] == "loss" or name == "score":
                axes = ax.twinx() if name == "score" else ax
                axes.plot(steps, values, label=name, color="C3" if name == "score" else None)
                axes.set_ylabel(name)
        ax.set_xlabel("step")
        ax.legend()
        return ax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """All of a run that a resumed one needs; ``NaN`` in rows that are not there yet."""

    state: Any
    best: Any
    rows: np.ndarray
    sums: np.ndarray

    @property
    def step(self) -> Any:
        """The steps that are done."""
        return self.state.step


def fit(
    step: Callable[..., Any],
    state: State,
    batches: Callable[[int], Any] | Iterable[Any] | None,
    *,
    steps: int,
    evaluate: Callable[[State], float] | None = None,
    every: int = 0,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    progress: bool = True,
    title: str = "distil",
) -> Fitted:
    """Runs a scheme's steps.

    A run that is interrupted and called again with the same arguments goes on where its last
    checkpoint left it and ends in the same parameters, bit for bit, if batches are a function of
    the step, or an iterable that gives the same ones each time. Checkpoints are Orbax's, and hold
    the state (without the teachers' parameters), the best state and the history.

    Args:
      step: of a scheme, `(state, batch) -> (state, metrics)`.
      state: from the scheme's ``init``.
      batches: function of the step (:func:`jaxopt_models.data.shuffled` makes one), or any
        iterable that can be iterated again, such as a list or a Grain data set; ``None`` for
        :func:`data_free`.
      steps: number of steps in all; a state that has done some already does the rest.
      evaluate: from the state to a score, larger is better, such as accuracy on a validation
        split. It must not keep the state, whose memory the next step uses.
      every: steps between two rows of the history, and evaluations; 0: a twentieth of all.
      patience: evaluations without a better score after which to stop; ``None`` for never.
      checkpoint: folder for checkpoints; one of another run (other parameters, teachers or
        numbers) is refused.
      save_every: steps between two checkpoints; others follow the last step, and Ctrl-C.
      progress: show a bar.
      title: of the bar.

    Returns:
      :class:`Fitted`.

    Raises:
      FloatingPointError: if a metric is not finite; the last checkpoint stands.
      ValueError: for numbers out of range, patience without ``evaluate``, a checkpoint of another
        run, or batches that end and cannot be iterated again.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda student, teacher, batch: distill.hint(student.out, teacher.out)
      >>> init, step = distill.teacher_student(fn, fn, loss, optax.sgd(0.5))
      >>> state = init({"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))})
      >>> done = distill.fit(step, state, [jnp.eye(2)], steps=20, every=10, progress=False)
      >>> done.history.column("step"), int(done.state.step)
      ([10, 20], 20)
    """
    steps = whole(steps, "fit: steps", least=1)
    every = whole(every, "fit: every", least=0) or max(1, steps // 20)
    save_every = whole(save_every, "fit: save_every", least=1)
    if patience is not None:
        patience = whole(patience, "fit: patience", least=1)
        if evaluate is None:
            raise ValueError("fit: patience= without evaluate=; give a score to be patient about")
    identity = {"state": digest(state), "steps": str(steps), "every": str(every)}
    identity["patience"] = str(patience)
    if batches is None:
        at = lambda step: None  # noqa: E731
    else:
        at = batches if callable(batches) else Replay(batches, "fit")
    with Checkpoints(checkpoint, identity) as checkpoints:
        run = _Run(step, state, at, steps, every, evaluate, patience, checkpoints)
        if not run.stopped:
            run.state = loop(
                step,
                run.state,
                at,
                steps=steps,
                title=title,
                show=progress,
                save=run.save,
                save_every=save_every,
                text=lambda found: f"loss {np.mean(found['loss']):.4f}" if found else "",
                each=run.each,
            )
    return run.result()


class _Run:
    """What one call of :func:`fit` has found so far: rows, scores, the best state."""

    def __init__(
        self,
        step: Any,
        state: State,
        batches: Callable[[int], Any],
        steps: int,
        every: int,
        evaluate: Any,
        patience: int | None,
        checkpoints: Checkpoints,
    ):
        self.every, self.steps, self.evaluate, self.patience = every, steps, evaluate, patience
        self.checkpoints, self.teachers = checkpoints, state.teachers
        shapes = jax.eval_shape(step, state, batches(min(int(state.step), steps - 1)))[1]
        # The loss first; of several students one column each.
        self.order = sorted(shapes, key=lambda name: (name != "loss", name))
        self.columns = [
            f"{name}/{i}" if shapes[name].shape else name
            for name in self.order
            for i in range(math.prod(shapes[name].shape))
        ]
        self.pending: list[dict[str, jax.Array]] = []
        empty = np.full((-(-steps // every), len(self.columns) + 2), np.nan)
        start = _Saved(
            state.moving(),
            None if evaluate is None else state.moving(),
            empty,
            np.zeros(len(self.columns) + 1),
        )
        saved = checkpoints.restore("fit", start)
        self.rows, self.sums = np.array(saved.rows), np.array(saved.sums)
        self.best = None if self._scored() is None else saved.best
        self.state = state if saved is start else self._whole(saved.state)

    @property
    def stopped(self) -> bool:
        """Whether so many scores brought nothing better that it is to stop."""
        best = self._scored()
        if self.patience is None or best is None:
            return False
        return len(self._done()) - 1 - best >= self.patience

    def each(self, done: int, state: State, found: dict[str, jax.Array]) -> bool:
        """Takes what a step found; says whether to stop."""
        self.pending.append(found)
        if done % self.every and done != self.steps:
            return False
        self._collect(done)
        means, self.sums = self.sums[:-1] / self.sums[-1], np.zeros_like(self.sums)
        at, before = len(self._done()), self._scored()
        score = np.nan if self.evaluate is None else float(self.evaluate(state))
        self.rows[at] = [done, *means, score]
        if self._scored() == at and before != at:
            # A copy, since the next step uses the memory of this one.
            self.best = jax.tree.map(jnp.copy, state.moving())
        return self.stopped

    def save(self, state: State) -> None:
        """Keeps everything, unless a metric is not finite."""
        self._collect(int(state.step))
        best = state.moving() if self.best is None else self.best
        best = None if self.evaluate is None else best
        self.checkpoints.save("fit", _Saved(state.moving(), best, self.rows, self.sums))

    def result(self) -> Fitted:
        """Returns what :func:`fit` returns."""
        scored = self.evaluate is not None
        rows = [(int(r[0]), *map(float, r[1 : None if scored else -1])) for r in self._done()]
        columns = ("step", *self.columns, *(("score",) if scored else ()))
        table = Table(columns, rows, title="history")
        best = self.state if self.best is None else self._whole(self.best)
        return Fitted(self.state, best, table, self.stopped)

    def _collect(self, done: int) -> None:
        for found in jax.device_get(self.pending):
            values = [np.ravel(found[name]) for name in self.order]
            self.sums += [*np.concatenate(values), 1.0] if values else [1.0]
        self.pending = []
        if wrong := [
            n for n, v in zip(self.columns, self.sums, strict=False) if not np.isfinite(v)
        ]:
            raise FloatingPointError(
                f"fit: {wrong[0]} was not finite before step {done}; try a smaller rate, or "
                "optax.clip_by_global_norm before the optimizer. The last checkpoint stands"
            )

    def _done(self) -> np.ndarray:
        return self.rows[np.isfinite(self.rows[:, 0])]

    def _scored(self) -> int | None:
        scores = self._done()[:, -1]
        return int(np.nanargmax(scores)) if np.isfinite(scores).any() else None

    def _whole(self, moving: State) -> State:
        return dataclasses.replace(moving, teachers=self.teachers)
