"""What training hands from step to step, and how it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._encoded import is_encoded
from .._partition import combine, partition
from .._training import take_state


class Scheme(NamedTuple):
    """A way to train, as two functions.

    Args:
      init: from parameters to the :class:`State` before the first step.
      step: `(state, batch) -> (state, metrics)`, compiled once. Metrics are scalars by name; of
        several students, arrays `[K]`. The state that goes in is given up (its memory is used for
        the one that comes out), but for the teachers' parameters.
    """

    init: Callable[..., State]
    step: Callable[..., tuple[State, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step needs and changes, and the teachers' parameters.

    Args:
      trained: for each student ``(parameters, heads)``, of the parameters what may be trained.
      rest: for each student the rest of its parameters: codes, masks, batch statistics, counters.
      opt: the optimizer's state, for each student that of its parameters and of its heads.
      teachers: the teachers' parameters, which no step changes.
      memories: what each student's loss keeps.
      kept: what the scheme keeps besides, by name: averages, judges, generators.
      key: the random key of the whole training.
      step: number of steps done.
    """

    trained: tuple[Any, ...]
    rest: tuple[Any, ...]
    opt: tuple[Any, ...]
    teachers: tuple[Any, ...]
    memories: tuple[Any, ...]
    kept: dict[str, Any]
    key: jax.Array
    step: jax.Array

    @property
    def students(self) -> tuple[Any, ...]:
        """The parameters of all students, in the form they came in."""
        return tuple(combine(t, r) for (t, _), r in zip(self.trained, self.rest, strict=True))

    @property
    def student(self) -> Any:
        """The parameters of the student; of the first where there are several."""
        return self.students[0]

    @property
    def heads(self) -> Any:
        """The heads of the (first) student."""
        return self.trained[0][1]

    @property
    def memory(self) -> Any:
        """What the loss of the (first) student keeps."""
        return self.memories[0]

    def moving(self) -> State:
        """The same without the teachers: what is donated, and saved in checkpoints."""
        return dataclasses.replace(self, teachers=())


def begin(
    students: Sequence[Any],
    teachers: Sequence[Any],
    optimizers: Sequence[tuple[Any, Any]],
    *,
    heads: Sequence[Any],
    memories: Sequence[Any],
    kept: dict[str, Any] | None = None,
    key: jax.Array | None = None,
    who: str,
) -> State:
    """Returns the state before the first step; the caller's arrays stay the caller's.

    Raises:
      TypeError: if a student has nothing to train, or heads hold codes.
    """
    trained, rest, opt = [], [], []
    for i, (params, head, (tx, tx_heads)) in enumerate(
        zip(students, heads, optimizers, strict=True)
    ):
        t, r = partition(params)
        if not jax.tree.leaves(t):
            raise TypeError(
                f"{who}: student {i} has no floating parameter; pass the parameters of its function"
            )
        wrong = [x for x in jax.tree.leaves(head, is_leaf=is_encoded) if not _is_floating(x)]
        if wrong:
            raise TypeError(
                f"{who}: heads hold {getattr(wrong[0], 'dtype', type(wrong[0]).__name__)}; heads "
                "are trained, and are arrays of floats"
            )
        trained.append((t, head))
        rest.append(r)
        opt.append((tx.init(t), tx_heads.init(head) if jax.tree.leaves(head) else None))
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise TypeError(f"{who}: key={key!r:.60} is no random key; pass jax.random.key(0)")
    state = State(
        tuple(trained), tuple(rest), tuple(opt), (), tuple(memories), kept or {}, key, jnp.int32(0)
    )
    # A copy, since steps give up their state and the trees belong to the caller.
    state = jax.tree.map(jnp.copy, state)
    return dataclasses.replace(state, teachers=tuple(teachers))


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and not is_encoded(x) and jnp.issubdtype(x.dtype, jnp.floating)


def taken_over(trained: Any, rest: Any, new: Any) -> Any:
    """Returns the untrained half of a student with the state that its function returned."""
    return rest if new is None else take_state(combine(trained, rest), new)
