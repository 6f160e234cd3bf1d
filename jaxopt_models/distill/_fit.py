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

from .._jaxpr import constants
from .._loop import Replay, loop
from .._options import whole
from .._resume import Checkpoints, digest
from ._run import Fitted, Run
from ._state import State, check_state


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
      save_every: steps between two checkpoints; others follow the last step, Ctrl-C, and batches
        that end too early.
      progress: show a bar.
      title: of the bar.

    Returns:
      :class:`Fitted`.

    Raises:
      FloatingPointError: if a metric, a parameter or a score is not finite; the last checkpoint
        stands.
      TypeError: for a step or a state that is none, a single batch in place of batches, or an
        ``evaluate`` that is no function or returns no number.
      ValueError: for numbers out of range, patience without ``evaluate``, a checkpoint of another
        run, a file in place of its folder, or batches that end and cannot be iterated again; what
        was done until then is saved.

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
    if evaluate is not None and not callable(evaluate):
        raise TypeError(
            f"fit: evaluate is {type(evaluate).__name__}; give a function from the state to a score"
        )
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
            "constants": digest(constants(program)),
            "jax": jax.__version__,
            "metrics": " ".join(columns),
            "evaluate": str(evaluate is not None),
            "steps": str(steps),
            "every": str(every),
            "patience": str(patience),
        }
    with Checkpoints(checkpoint, identity) as checkpoints:
        run = Run(state, sorted(shapes[1]), columns, steps, every, evaluate, patience, checkpoints)
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
                text=_text,
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


def _text(found: dict[str, Any]) -> str:
    return f"loss {np.mean(found['loss']):.4f}" if "loss" in found else ""


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
