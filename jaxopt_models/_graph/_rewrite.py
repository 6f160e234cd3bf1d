"""What rewrites of parameters share: a traced call, its parameters by path, and a check."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._call import Program, check_function, name_of, on_data, trace
from .._encoded import is_encoded
from .._encoder import not_finite
from .._paths import flatten
from .._walk import Walk
from ._nodes import Graph

#: How far a rewrite may change what is returned, relative to its norm.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function with its parameters, as operations.

    Args:
      fn: the function.
      program: its program for these arguments.
      graph: the operations.
      values: every array of the parameters, by path.
      rebuild: from values by path to the tree.
    """

    fn: Callable[..., Any]
    program: Program
    graph: Graph
    values: dict[str, Any]
    rebuild: Callable[[dict[str, Any]], Any]

    @functools.cached_property
    def run(self) -> Callable[..., list[jax.Array]]:
        """The program as a function of values by path, compiled."""
        paths, arguments = list(self.values), self.program.operands[len(self.values) :]

        def run(values: dict[str, Any], arguments: list[Any]) -> list[Any]:
            operands = [*(values[p] for p in paths), *arguments]
            return Walk().run(self.program.jaxpr, self.program.consts, operands)

        compiled = jax.jit(run)
        return lambda values: compiled(values, arguments)


def values_of(params: Any) -> dict[str, Any]:
    """Returns the arrays and leaves of a tree by path."""
    return {p.path: p.value for p in flatten(params)[0] if hasattr(p.value, "shape")}


def traced(fn: Callable[..., Any], params: Any, args: Sequence[Any], who: str) -> Traced:
    """Traces a call for a rewrite, which needs dense arrays."""
    check_function(fn, who)
    frame, arrays = on_data(params, args, who)
    leaves, unflatten = flatten(params)
    compressed = [p for p in leaves if is_encoded(p.value)]
    if compressed:
        raise TypeError(
            f"{who}: {compressed[0].path} is {compressed[0].value.kind()}; rewrite the dense "
            "parameters first, then compress"
        )
    program = trace(fn, frame, arrays, who=who, every=True)
    values = values_of(params)

    def rebuild(new: dict[str, Any]) -> Any:
        return unflatten([new.get(p.path, p.value) for p in leaves])

    return Traced(fn, program, Graph(program, values), values, rebuild)


def check_finite(t: Traced, paths: Iterable[str], who: str) -> None:
    """Raises unless all parameters that a rewrite takes numbers from are finite."""
    for path in dict.fromkeys(paths):
        w = t.values[path]
        if bad := int(not_finite(w)):
            raise ValueError(
                f"{who}: {path}: {bad} of {math.prod(w.shape)} entries are NaN or Inf; repair the "
                "weights first (a diverged training run, or a mask applied as -inf)"
            )


def like(w: Any, new: np.ndarray) -> jax.Array:
    """Puts new numbers where a parameter is, in its type."""
    array = np.asarray(new).astype(w.dtype)
    return jax.device_put(array, w.sharding) if isinstance(w, jax.Array) else jnp.asarray(array)


def finished(t: Traced, changed: dict[str, np.ndarray], who: str) -> Any:
    """Returns the tree with new values, after what the program returns was compared.

    Raises:
      RuntimeError: if it is not the same.
    """
    new = t.values | {p: like(t.values[p], w) for p, w in changed.items()}
    for a, b in zip(t.run(t.values), t.run(new), strict=True):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            continue
        # Types of fewer digits than float32 lose more of them when numbers move.
        most = max(TOLERANCE, 10 * float(jnp.finfo(a.dtype).eps))
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        finite = np.isfinite(a)
        change = np.linalg.norm((b - a)[finite]) / max(np.linalg.norm(a[finite]), 1e-30)
        if not change <= most:
            raise RuntimeError(
                f"{who}: what {name_of(t.fn)} returns would change by {change:.1e} of its norm, "
                f"more than {most:.0e}; rewrite in float32, or leave layers out with only="
            )
    return t.rebuild(new)
