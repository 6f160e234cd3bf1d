"""Batch normalization in a program: where a running mean is subtracted, and what follows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._graph import LINEAR, Graph, Node, Ref, Value, evaluate, paths_of
from .._tracked import Deferred, Tracked, is_tracked

# None of these changes the order of entries.
_LAID = LINEAR | {"reshape", "broadcast_in_dim", "squeeze"}


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """A normalization by statistics that are parameters.

    Args:
      mean: path of what is subtracted.
      var: path of what it is divided by the root of.
      eps: what is added to the variance.
      scales: paths of what it is multiplied with, one or none.
      biases: paths of what is added in the end, one or none.
      nodes: its operations, the subtraction first.
      channels: axes of its input along which the statistics differ.
      loops: depths of the loops that slice the statistics.
      why: why no more is known, if that is so.
    """

    mean: str
    var: str
    eps: float
    scales: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    channels: tuple[int, ...] = ()
    loops: tuple[int, ...] = ()
    why: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """All of its parameters."""
        return tuple(p for p in (self.mean, self.var, *self.scales, *self.biases) if p)

    @property
    def input(self) -> Value:
        """What is normalized."""
        return self.nodes[0].operands[0]

    @property
    def products(self) -> list[Node]:
        """The operations that scale."""
        return [n for n in self.nodes if n.name in ("mul", "div")]

    def factor(self, values: dict[str, Any]) -> np.ndarray:
        """Returns what the input is multiplied with, `[*loops, channels]`."""

        def of(values: dict[str, Any]) -> list[jax.Array]:
            found = [evaluate(_operand(n), values) for n in self.products]
            return [jnp.reshape(x, -1) for x in found]

        for _ in self.loops:
            of = jax.vmap(of)
        with jax.ensure_compile_time_eval():
            found = of({p: values[p] for p in (self.var, *self.scales)})
        total = np.ones(())
        for node, x in zip(self.products, found, strict=True):
            x = np.asarray(x, np.float64)
            total = total * x if node.name == "mul" else total / x
        return total


def _operand(node: Node) -> Tracked:
    return next(x for x in node.operands if is_tracked(x))


def norms(graph: Graph) -> list[Norm]:
    """Finds every normalization by a running mean and variance, in the order of the program."""
    found = []
    for node in graph.nodes:
        if node.name in ("mul", "div") and sum(map(is_tracked, node.operands)) == 1:
            root = _root(_operand(node))
            if root is not None:
                found.append(_norm(node, *root))
    return found


def _norm(node: Node, var: str, eps: float) -> Norm:
    before, scales = _before(node)
    if not before:
        why = "no running mean is subtracted before it is divided by the deviation"
        return Norm("", var, eps, why=why)
    first = before[0]
    scales += sorted(paths_of(_operand(node)) - {var})
    after, biases = _after(node, scales)
    nodes = (*before, node, *after)
    [origin] = _operand(first).origins
    shapes = {tuple(n.eqn.invars[n.operands.index(_operand(n))].aval.shape) for n in nodes}
    shape = first.eqn.invars[1].aval.shape
    channels = tuple(d for d, n in enumerate(shape) if n > 1)
    why = ""
    if len(scales) > 1:
        why = f"it is scaled by several parameters: {', '.join(scales)}"
    elif len(shapes) > 1 or math.prod(shape) != math.prod(origin.shape[len(origin.loops) :]):
        why = "its parameters are used in several shapes"
    return Norm(
        plain(_operand(first)) or "",
        var,
        eps,
        tuple(scales),
        tuple(biases),
        nodes,
        channels,
        origin.loops,
        why,
    )


def _before(node: Node) -> tuple[list[Node], list[str]]:
    """Returns the operations from the subtraction of the mean to this one, and what scales."""
    nodes: list[Node] = []
    scales: list[str] = []
    x = next(x for x in node.operands if not is_tracked(x))
    while x.made is not None and len(x.readers) == 1:
        made = x.made
        if made.name in LINEAR:
            x = made.operands[0]
            continue
        tracked = [x for x in made.operands if is_tracked(x)]
        path = plain(tracked[0]) if len(tracked) == 1 else None
        if path and made.name == "sub" and is_tracked(made.operands[1]):
            return [made, *nodes], scales
        if not path or made.name != "mul" or scales:
            break
        nodes, scales = [made], [path]
        x = next(x for x in made.operands if not is_tracked(x))
    return [], []


def _after(node: Node, scales: list[str]) -> tuple[list[Node], list[str]]:
    """Returns the operations that follow, and the bias; a scale is added to those known."""
    nodes: list[Node] = []
    while True:
        readers = node.outs[0].readers
        if len(readers) != 1:
            return nodes, []
        [node] = readers
        if node.name in LINEAR:
            continue
        tracked = [x for x in node.operands if is_tracked(x)]
        path = plain(tracked[0]) if len(tracked) == 1 else None
        if path and node.name == "add":
            return [*nodes, node], [path]
        if not path or node.name != "mul" or scales:
            return nodes, []
        nodes.append(node)
        scales.append(path)


def _root(x: Tracked) -> tuple[str, float] | None:
    """Finds the root of a variance and a constant in what hangs on parameters."""
    todo, seen = [x.value], set()
    while todo:
        v = todo.pop()
        if not isinstance(v, Deferred) or id(v) in seen:
            continue
        seen.add(id(v))
        if v.step.name in ("rsqrt", "sqrt") or _is_root(v):
            inner = _strip(v.operands[0])
            if isinstance(inner, Ref):
                return inner.path, 0.0
            if isinstance(inner, Deferred) and inner.step.name == "add":
                a, b = map(_strip, inner.operands)
                path, eps = (a, b) if isinstance(a, Ref) else (b, a)
                if isinstance(path, Ref) and not paths_of(eps):
                    with jax.ensure_compile_time_eval():
                        return path.path, float(jnp.max(evaluate(eps, {})))
        todo += v.operands
    return None


def _is_root(v: Deferred) -> bool:
    return v.step.name == "pow" and np.ndim(v.operands[1]) == 0 and abs(v.operands[1]) == 0.5


def _strip(v: Any) -> Any:
    """Follows a change of layout or type back, and a lower bound."""
    while isinstance(v, Deferred):
        if v.step.name in _LAID:
            v = v.operands[0]
        elif v.step.name == "max" and any(not paths_of(o) for o in v.operands):
            v = next(o for o in v.operands if paths_of(o))
        else:
            break
    return v


def plain(x: Tracked) -> str | None:
    """Returns the path of a parameter that is used as it is, in whatever layout."""
    v = x.value
    while isinstance(v, Deferred) and v.step.name in _LAID:
        v = v.operands[0]
    return v.path if isinstance(v, Ref) and len(x.origins) == 1 else None
