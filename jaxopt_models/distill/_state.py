"""What training hands from step to step, and how it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._encoded import is_encoded
from .._partition import combine, partition
from .._paths import flatten, key_name
from .._training import take_state
from ._network import Network, is_module


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
    networks: Sequence[Network],
    students: Sequence[Any],
    teachers: Sequence[Any],
    optimizers: Sequence[tuple[Any, Any]],
    *,
    heads: Sequence[Any],
    memories: Sequence[Any],
    kept: dict[str, Any] | None,
    key: jax.Array | None,
    who: str,
) -> State:
    """Returns the state before the first step; the caller's arrays stay the caller's.

    Raises:
      TypeError: if a student has nothing to train, parameters are no arrays, or heads hold codes.
      ValueError: if a stateful function has no state.
    """
    trained, rest, opt = [], [], []
    for i, (network, params, head, (tx, tx_heads)) in enumerate(
        zip(networks, students, heads, optimizers, strict=True)
    ):
        if isinstance(params, State):
            raise TypeError(f"{who}: student {i} is a State; pass its parameters: state.student")
        _check_arrays(params, f"{who}: student {i}")
        t, r = partition(params, fixed=network.fixed)
        if not jax.tree.leaves(t):
            raise TypeError(
                f"{who}: student {i} has no floating parameter; pass the parameters of its function"
            )
        if network.stateful and network.fixed is None:
            _check_stateful(params, f"{who}: student {i}")
        check_floating(head, f"{who}: heads")
        trained.append((t, head))
        rest.append(r)
        opt.append((tx.init(t), tx_heads.init(head) if jax.tree.leaves(head) else None))
    for i, params in enumerate(teachers):
        _check_arrays(params, f"{who}: teacher {i}", teaches=True)
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise TypeError(f"{who}: key={key!r:.60} is no random key; pass jax.random.key(0)")
    state = State(
        tuple(trained), tuple(rest), tuple(opt), (), tuple(memories), kept or {}, key, jnp.int32(0)
    )
    # A copy, since steps give up their state and the trees belong to the caller.
    state = jax.tree.map(lambda x: strong(jnp.copy(x)), state)
    # NumPy arrays, as files give them, would be sent to the device in each step.
    masters = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), teachers)
    return dataclasses.replace(state, teachers=tuple(masters))


def strong(x: Any) -> jax.Array:
    """Returns an array of a type of its own, which Python's numbers have not.

    A step whose state went in without one, and came out with one, would be compiled twice.
    """
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x


def _check_arrays(params: Any, name: str, *, teaches: bool = False) -> None:
    """Raises a `TypeError` unless parameters are arrays; a teacher's may be Python floats."""

    def stop(x: Any) -> bool:
        return is_encoded(x) or (not teaches and is_module(x))

    for keys, x in jax.tree_util.tree_flatten_with_path(params, is_leaf=stop)[0]:
        if is_module(x):
            raise TypeError(
                f"{name} holds the module {type(x).__name__}, whose state would be lost; make a "
                "function of it: fn, params = jaxopt_models.functional(module, mutable=True), and "
                "distill.Network(fn, stateful=True)"
            )
        if not (is_encoded(x) or hasattr(x, "dtype") or (teaches and isinstance(x, float))):
            path = "/".join(map(key_name, keys))
            raise TypeError(
                f"{name}: {path} is {type(x).__name__}, and parameters are arrays; close over it "
                "in fn, or give jnp.float32(...) for a number that is trained"
            )


def check_floating(tree: Any, name: str) -> None:
    """Raises a `TypeError` unless a tree that is trained holds arrays of floats alone."""
    for x in jax.tree.leaves(tree, is_leaf=is_encoded):
        if is_encoded(x) or not jnp.issubdtype(getattr(x, "dtype", None), jnp.floating):
            got = type(x).__name__ if is_encoded(x) else getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{name} hold {got}; they are trained, and must be arrays of floats")


def check_state(state: Any, who: str) -> None:
    """Raises a `TypeError` unless it is a state, and a `ValueError` if it was given up."""
    if not isinstance(state, State):
        raise TypeError(
            f"{who}: state is {type(state).__name__}; a step takes what the scheme's init returned"
        )
    for x in jax.tree.leaves(state.moving()):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
            raise ValueError(
                f"{who}: this state was given up to an earlier step; go on with the state that "
                "step returned, or call init again"
            )


def _check_stateful(params: Any, name: str) -> None:
    leaves, _ = flatten(params)
    if not any(p.reason for p in leaves):
        paths = ", ".join(p.path for p in leaves)
        raise ValueError(
            f"{name} is stateful, but nothing in its parameters is known to be state; name it: "
            f"distill.Network(fn, stateful=True, fixed='.*/mean'). Paths are {paths}"
        )


def taken_over(network: Network, trained: Any, rest: Any, new: Any) -> Any:
    """Returns the untrained half of a student with the state that its function returned."""
    return rest if new is None else take_state(combine(trained, rest), new, fixed=network.fixed)
