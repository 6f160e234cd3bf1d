"""What a call of :func:`fit` finds, keeps in checkpoints, and returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._plot import axes_of
from .._resume import Checkpoints
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
        ax = axes_of(ax, 3.5)
        steps, lines = self.history.column("step"), []
        for name in self.history.columns[1:]:
            values = self.history.column(name)
            if name.partition("/")[0] == "loss" or name == "score":
                axes = ax.twinx() if name == "score" else ax
                lines += axes.plot(
                    steps, values, label=name, color="C3" if name == "score" else None
                )
                axes.set_ylabel(name)
        ax.set_xlabel("step")
        ax.legend(handles=lines)  # the score has axes of its own
        return ax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """All of a run that a resumed one needs; ``NaN`` in rows that are not there yet."""

    state: Any
    best: Any
    rows: np.ndarray
    sums: np.ndarray

    @property
    def step(self) -> Any:
        """The steps that are done."""
        return self.state.step


@jax.jit
def _finite(trained: Any) -> jax.Array:
    parts = [jnp.all(jnp.isfinite(x.astype(jnp.float32))) for x in jax.tree.leaves(trained)]
    return jnp.all(jnp.stack(parts))


def _score(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError):
        kind = type(found).__name__
        raise TypeError(f"fit: evaluate returned {kind}; return one number") from None


class Run:
    """What one call of :func:`fit` has found so far: rows, scores, the best state."""

    def __init__(
        self,
        state: State,
        order: list[str],
        columns: list[str],
        steps: int,
        every: int,
        evaluate: Any,
        patience: int | None,
        checkpoints: Checkpoints,
    ):
        self.order, self.columns = order, columns
        self.every, self.steps, self.evaluate, self.patience = every, steps, evaluate, patience
        self.checkpoints, self.teachers = checkpoints, state.teachers
        self.pending: list[dict[str, jax.Array]] = []
        start = Saved(
            state.moving(),
            None if evaluate is None else state.moving(),
            np.full((-(-steps // every), len(columns) + 2), np.nan),
            np.zeros(len(columns) + 1),
        )
        saved = checkpoints.restore("fit", start)
        self.rows, self.sums = np.array(saved.rows), np.array(saved.sums)
        self.best = None if self._scored() is None else saved.best
        self.state = state if saved is start else self._whole(saved.state)
        # Ctrl-C during an evaluation leaves a step without its row.
        if self.sums[-1] and self._due(int(self.state.step)):
            self._row(int(self.state.step), self.state)

    @property
    def enough(self) -> bool:
        """Whether so many scores brought nothing better that it is to stop."""
        best = self._scored()
        if self.patience is None or best is None:
            return False
        return len(self._done()) - 1 - best >= self.patience

    def each(self, done: int, state: State, found: dict[str, jax.Array]) -> bool:
        """Takes what a step found; says whether to stop."""
        self.pending.append(found)
        if not self._due(done):
            return False
        self._row(done, state)
        return self.enough

    def save(self, state: State) -> None:
        """Keeps everything, unless a metric or a parameter is not finite."""
        self._collect(int(state.step))
        if not _finite(state.trained):
            self._refuse("a trained parameter", int(state.step))
        best = state.moving() if self.best is None else self.best
        best = None if self.evaluate is None else best
        self.checkpoints.save("fit", Saved(state.moving(), best, self.rows, self.sums))

    def result(self) -> Fitted:
        """Returns what :func:`fit` returns."""
        scored = self.evaluate is not None
        # The loss first.
        at = sorted(range(len(self.columns)), key=lambda i: self.columns[i].split("/")[0] != "loss")
        rows = [
            (int(r[0]), *(float(r[1 + i]) for i in at), *([float(r[-1])] if scored else []))
            for r in self._done()
        ]
        columns = ("step", *(self.columns[i] for i in at), *(("score",) if scored else ()))
        table = Table(columns, rows, title="history")
        best = self.state if self.best is None else self._whole(self.best)
        stopped = self.enough and int(self.state.step) < self.steps
        return Fitted(self.state, best, table, stopped)

    def _due(self, done: int) -> bool:
        return done > 0 and (done % self.every == 0 or done == self.steps)

    def _row(self, done: int, state: State) -> None:
        self._collect(done)
        score = np.nan if self.evaluate is None else _score(self.evaluate(state))
        if self.evaluate is not None and not np.isfinite(score):
            raise FloatingPointError(f"fit: evaluate returned {score} after step {done}")
        at = len(self._done())
        before = self._scored()
        self.rows[at] = [done, *(self.sums[:-1] / self.sums[-1]), score]
        self.sums = np.zeros_like(self.sums)
        if self._scored() != before:
            # A copy, since the next step uses the memory of this one.
            self.best = jax.tree.map(jnp.copy, state.moving())

    def _collect(self, done: int) -> None:
        for found in jax.device_get(self.pending):
            values = [np.ravel(found[name]) for name in self.order]
            self.sums += [*np.concatenate(values), 1.0] if values else [1.0]
        self.pending = []
        for name, value in zip(self.columns, self.sums, strict=False):
            if not np.isfinite(value):
                self._refuse(name, done)

    def _refuse(self, what: str, done: int) -> None:
        raise FloatingPointError(
            f"fit: {what} was not finite in step {done} or shortly before; try a smaller rate, or "
            "optax.clip_by_global_norm before the optimizer. The last checkpoint stands"
        )

    def _done(self) -> np.ndarray:
        return self.rows[np.isfinite(self.rows[:, 0])]

    def _scored(self) -> int | None:
        scores = self._done()[:, -1]
        return int(np.nanargmax(scores)) if np.isfinite(scores).any() else None

    def _whole(self, moving: State) -> State:
        return dataclasses.replace(moving, teachers=self.teachers)
