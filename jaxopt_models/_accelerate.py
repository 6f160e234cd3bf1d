"""A function of dense parameters as one of compressed parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from ._call import Frame, check_function, finish, take_apart, trace
from ._encoded import is_encoded
from ._explain import explain
from ._table import Table
from ._walk import Walk


def accelerate(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fn`` with a first argument that may hold compressed parameters.

    Each compressed parameter is rebuilt where it is used and nowhere before, layer by layer
    in a loop over stacked layers; ``fn`` itself is not changed. Without compressed
    parameters the result is ``fn(params, ...)``, the very same program.

    Arrays among the arguments are traced, all else (numbers, strings, flags) is part of the
    program, as under `jax.jit` with static arguments: a call with the same structure, shapes and
    rest runs the program kept from before, also outside of `jax.jit`. So call ``accelerate(fn)``
    once, not inside a loop; and as with `jax.jit`, what ``fn`` changes in its arguments (the
    statistics of an nnx module, random counters) is lost: take ``fn`` from
    :func:`functional` with ``mutable=True``, which returns it.

    Args:
      fn: function of parameters (a pytree) and anything else.

    Returns:
      A function of the same arguments. Compressed parameters that ``fn`` returns untouched
      come back compressed. Its attribute ``explain(params, *args)`` is a table of what each
      parameter meets and what runs there.

    Raises:
      ValueError: when called, if no compressed parameter reached the program: ``fn`` computes
        with values it captured.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"w": jnp.eye(3)}
      >>> small = jom.compress(params, [jom.Rule("w", jom.quant.Int(bits=8))])
      >>> jom.accelerate(lambda p, x: x @ p["w"])(small, jnp.arange(3.0))
      Array([0., 1., 2.], dtype=float32)
    """
    return _wrapped(fn, "accelerate", Accelerating)


def simulate(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fn`` as :func:`accelerate` does, with no kernel but their plain references.

    It defines what a tree of compressed parameters computes, inputs rounded as
    :class:`jaxopt_models.quant.WithInput` says included, and is differentiable: before a loss,
    ``simulate(fn)(params, x)`` trains with quantized activations. Without such leaves it is
    ``fn(materialize(params), x)``.

    Args:
      fn: function of parameters (a pytree) and anything else.

    Returns:
      A function of the same arguments.

    Raises:
      ValueError: when called, if no compressed parameter reached the program.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> both = jom.chain(jom.quant.Int(bits=8), jom.quant.Input(bits=8))
      >>> small = jom.compress({"w": jnp.eye(2)}, [jom.Rule("w", both)])
      >>> jom.simulate(lambda p, x: x @ p["w"])(small, jnp.array([[127.0, 0.3]]))
      Array([[127.,   0.]], dtype=float32)
    """
    return _wrapped(fn, "simulate", Simulating)


class Accelerating(Walk):
    """A walk whose kernels compute a bias and an activation function, too."""

    fuses = True


class Simulating(Walk):
    """A walk without kernels."""

    kernels = False


def _wrapped(fn: Callable[..., Any], who: str, walk: type[Walk]) -> Callable[..., Any]:
    check_function(fn, who)

    def run(frame: Frame, arrays: list[Any]) -> Any:
        program = trace(fn, frame, arrays, who=who, every=False)
        return finish(program, walk().run(program.jaxpr, program.consts, program.operands))

    kept = jax.jit(run, static_argnums=0)

    first = next(iter(inspect.signature(fn).parameters), "params")

    def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return args if args or first not in kwargs else (kwargs.pop(first),)

    @functools.wraps(fn)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        params, *args = taken(args, kwargs)
        if not any(map(is_encoded, jax.tree.leaves(params, is_leaf=is_encoded))):
            return fn(params, *args, **kwargs)
        frame, arrays = take_apart(params, args, kwargs)
        return (kept if frame.hashable() else run)(frame, arrays)

    def explained(*args: Any, **kwargs: Any) -> Table:
        """Tables what each parameter meets in a call with such arguments; shapes are enough.

        Columns: path, operation, axes, shapes of the parameter, the other operand and the
        result, how often it runs, multiply-adds of all runs, what runs, and why no kernel does.
        """
        params, *args = taken(args, kwargs)
        return explain(fn, params, args, kwargs, kernels=walk.kernels)

    explained.__name__ = explained.__qualname__ = "explain"
    accelerated.explain = explained  # type: ignore[attr-defined]
    return accelerated
