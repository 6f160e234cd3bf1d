"""The loop around any step: progress, evaluation, early stop, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._loop import Replay, loop
from .._options import whole
from .._resume import Checkpoints, digest
from .._table import Table
from ._state import State, check_state


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
      evaluate: from the state to a finite score, larger is better, such as accuracy on a
        validation split. It must not keep the state, whose memory the next step uses.
      every: steps between two rows of the history, and evaluations; 0: a twentieth of all.
      patience: evaluations without a better score after which to stop; ``None`` for never.
      checkpoint: folder for checkpoints; one of another run (other parameters, teachers, numbers,
        program or version of JAX) is refused. That batches are the same is up to the caller.
      save_every: steps between two checkpoints; others follow the last step, and Ctrl-C.
      progress: show a bar.
      title: of the bar.

    Returns:
      :class:`Fitted`.

    Raises:
      FloatingPointError: if a metric, a parameter or a score is not finite; the last checkpoint
        stands.
      TypeError: for a step or a state that is none.
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
    if not callable(step):
        raise TypeError(f"fit: step is {type(step).__name__}; pass the step of a scheme")
    check_state(state, "fit")
    if batches is None:
        at = lambda step: None  # noqa: E731
    else:
        at = _once(batches if callable(batches) else Replay(batches, "fit"))
    # A copy, since steps give up their state, and fit may be called again after Ctrl-C.
    state = dataclasses.replace(jax.tree.map(jnp.copy, state.moving()), teachers=state.teachers)
    first = at(min(int(state.step), steps - 1))
    program, shapes = jax.make_jaxpr(step, return_shape=True)(state, first)
    columns = _columns(shapes[1])
    identity = {}
    if checkpoint is not None:
        identity = {
            "state": digest(state),
            "program": _checksum(program),
            "jax": jax.__version__,
            "metrics": " ".join(columns),
            "evaluate": str(evaluate is not None),
            "steps": str(steps),
            "every": str(every),
            "patience": str(patience),
        }
    with Checkpoints(checkpoint, identity) as checkpoints:
        run = _Run(state, sorted(shapes[1]), columns, steps, every, evaluate, patience, checkpoints)
        if not run.enough:
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


def _once(batches: Callable[[int], Any]) -> Callable[[int], Any]:
    """Returns batches of which the last one is kept: its shapes are looked at before its step."""
    kept: dict[int, Any] = {}

    def at(step: int) -> Any:
        if step not in kept:
            batch = batches(step)
            kept.clear()
            kept[step] = batch
        return kept[step]

    return at


def _columns(shapes: dict[str, Any]) -> list[str]:
    """Returns the names of all numbers of the metrics; of several students one each."""
    return [
        f"{name}/{i}" if shapes[name].shape else name
        for name in sorted(shapes)
        for i in range(math.prod(shapes[name].shape))
    ]


def _checksum(program: Any) -> str:
    # Functions are printed with their addresses, which are others in each process.
    text = re.sub(r"0x[0-9a-f]+", "", str(program))
    return f"{zlib.crc32(text.encode()):08x}"


@jax.jit
def _finite(trained: Any) -> jax.Array:
    parts = [jnp.all(jnp.isfinite(x.astype(jnp.float32))) for x in jax.tree.leaves(trained)]
    return jnp.all(jnp.stack(parts))


class _Run:
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
        start = _Saved(
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
        self.checkpoints.save("fit", _Saved(state.moving(), best, self.rows, self.sums))

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
        score = np.nan if self.evaluate is None else float(self.evaluate(state))
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
