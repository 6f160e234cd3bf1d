"""One call of a function, taken apart into arrays and the rest, and traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ._encoded import is_encoded
from ._paths import Parameter, flatten
from ._tracked import dense, is_tracked, readers, track

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What of a call is no array: the same frame and shapes, the same program.

    It does not hold the function, which JAX would keep for ever with what it keeps by frame.

    Args:
      treedef: structure of `(params, args, kwargs)` with the parts of leaves inside.
      rest: position and value of everything that is no array.
      kinds: what `==` does not tell of these: their types, the sign of a zero.
    """

    treedef: Any
    rest: tuple[tuple[int, Any], ...]
    kinds: tuple[Any, ...]

    def restore(self, arrays: Sequence[Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Puts arrays in their places: `(params, args, kwargs)`."""
        rest, given = dict(self.rest), iter(arrays)
        n = self.treedef.num_leaves
        return self.treedef.unflatten([rest[i] if i in rest else next(given) for i in range(n)])

    def hashable(self) -> bool:
        """Says whether a program can be kept for it."""
        try:
            hash(self)
        except TypeError:
            return False
        return True


def take_apart(params: Any, args: Any, kwargs: Any) -> tuple[Frame, list[Any]]:
    """Returns the frame of a call, and its arrays."""
    values, treedef = jax.tree.flatten((params, tuple(args), dict(kwargs)))
    rest = tuple((i, v) for i, v in enumerate(values) if not isinstance(v, _ARRAYS))
    kinds = tuple((type(v), repr(v) if isinstance(v, (float, complex)) else "") for _, v in rest)
    return Frame(treedef, rest, kinds), [v for v in values if isinstance(v, _ARRAYS)]


def on_data(params: Any, args: Any, who: str) -> tuple[Frame, list[Any]]:
    """Returns what :func:`take_apart` does, of a call that needs values, not tracers."""
    frame, arrays = take_apart(params, args, {})
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        raise TypeError(f"{who} runs on data: call it outside of jit, grad and vmap")
    return frame, arrays


def check_args(args: Any, who: str) -> tuple[Any, ...]:
    """Returns the option ``args``, the tuple of the arguments after the parameters."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"{who}: args is {type(args).__name__}; give the tuple of the arguments after params: "
            "args=(x,)"
        )
    return tuple(args)


def check_batch(batch: Any, who: str) -> tuple[Any, ...]:
    """Returns a batch, the tuple of the arguments after the parameters."""
    if not isinstance(batch, tuple):
        raise TypeError(
            f"{who}: a batch is {type(batch).__name__}; give the tuple of the arguments after "
            "params: [(x,) for x in ...]"
        )
    return batch


def check_batches(batches: Iterable[Any], who: str) -> list[tuple[Any, ...]]:
    """Returns batches as a list, of which there is one at least."""
    found = [check_batch(b, who) for b in batches]
    if not found:
        raise no_batch(who)
    return found


def no_batch(who: str) -> ValueError:
    """Returns the error for batches that are none."""
    return ValueError(f"{who}: there is no batch; give at least one tuple of arguments")


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced call.

    Args:
      jaxpr, consts: the program.
      operands: what it is run on: a tracked value for each parameter, then arrays.
      out: structure of its result.
      unreached: parameters that are not in it, by path.
    """

    jaxpr: Any
    consts: Sequence[Any]
    operands: list[Any]
    out: Any
    unreached: list[Parameter]


def trace(
    fn: Callable[..., Any],
    frame: Frame,
    arrays: Sequence[Any],
    *,
    who: str,
    every: bool,
    reached: bool = True,
) -> Program:
    """Traces a call on the dense shapes of its parameters.

    Args:
      fn: the function.
      frame: what of the call is no array.
      arrays: the arrays.
      who: the public function, for messages.
      every: whether dense parameters are followed too; they are where a leaf reads its input.
      reached: whether some parameter has to be in the program.

    Returns:
      The program.

    Raises:
      ValueError: if no parameter reached it.
    """
    params, args, kwargs = frame.restore(arrays)
    every = every or bool(readers(params))
    leaves, unflatten = flatten(params)
    given = [i for i, p in enumerate(leaves) if isinstance(p.value, _ARRAYS) or is_encoded(p.value)]
    others, inputs = take_apart(None, args, kwargs)

    def of_arrays(weights: list[Any], inputs: list[Any]) -> Any:
        tree = [p.value for p in leaves]
        for i, w in zip(given, weights, strict=True):
            tree[i] = w
        _, args, kwargs = others.restore(inputs)
        return fn(unflatten(tree), *args, **kwargs)

    weights = [leaves[i].value for i in given]
    templates = [_template(w) for w in weights]
    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(templates, inputs)
    used = {id(v) for v in _used(closed.jaxpr)}
    variables = closed.jaxpr.invars[: len(given)]
    seen = [(leaves[i], id(v) in used) for i, v in zip(given, variables, strict=True)]
    parameters = [(p, reached) for p, reached in seen if not p.reason]
    followed = [found for p, found in parameters if every or is_encoded(p.value)]
    if reached and followed and not any(followed):
        raise ValueError(
            f"{who}: no parameter reached the program of {name_of(fn)}. It computes with "
            "values captured elsewhere (a closure, a module with parameters inside); use its first "
            "argument instead, as the fn of jaxopt_models.functional(model) does"
        )
    operands = [
        track(p.path, p.value) if is_encoded(p.value) or (every and not p.reason) else p.value
        for p, _ in seen
    ]
    unreached = [p for p, found in parameters if not found]
    return Program(
        closed.jaxpr, closed.consts, [*operands, *inputs], jax.tree.structure(shapes), unreached
    )


def finish(program: Program, out: list[Any]) -> Any:
    """Returns the result of a program in its structure; untouched leaves stay leaves."""

    def value(x: Any) -> Any:
        return x.value if is_tracked(x) and is_encoded(x.value) else dense(x)

    return jax.tree.unflatten(program.out, [value(x) for x in out])


def check_function(fn: Any, who: str) -> None:
    """Raises unless ``fn`` can be called."""
    if not callable(fn):
        raise TypeError(f"{who}: fn is {type(fn).__name__}; give a function of (params, ...)")


def name_of(fn: Any) -> str:
    """Returns the name of a function, for messages."""
    return getattr(fn, "__name__", type(fn).__name__)


def _template(x: Any) -> Any:
    return jax.eval_shape(lambda leaf: leaf.materialize(), x) if is_encoded(x) else x


def _used(jaxpr: Any) -> list[Any]:
    return [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
