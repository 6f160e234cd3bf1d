"""Which bias is added to the product with a kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .._axes import Axes
from .._call import name_of
from .._deferred import LAYOUT
from .._graph import Graph, Node, paths_of, traced
from .._products import Product, product_of
from .._roles import Lines, pull, roles
from .._table import Table
from .._tracked import Origin, is_tracked
from ._sums import NotFollowed, sums_after

PRODUCTS = ("dot_general", "conv_general_dilated")
_LOOPS = ("scan", "while", "cond")
# The sums in which products with a kernel meet a bias.
Sums = dict[tuple[str, str], set[int]]


@dataclasses.dataclass(frozen=True)
class Added:
    """Entries of a bias and the outputs of a kernel that they are added to.

    Args:
      path: path of the bias.
      entries: flat indices of entries.
      outputs: the flat index, over stack and *out* axes, of the output of the kernel that each
        is added to.
      sign: whether a larger entry makes the output larger or smaller.
    """

    path: str
    entries: np.ndarray
    outputs: np.ndarray
    sign: int


@dataclasses.dataclass
class Biased:
    """A kernel and what is added to its outputs.

    Args:
      axes: roles of its axes.
      added: one for each use; each entry and each output occurs once.
      why: why it has no bias that could take a shift of its outputs, ``""`` if it has.
    """

    axes: Axes | None = None
    added: list[Added] = dataclasses.field(default_factory=list)
    why: str = ""


def biased(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> dict[str, Biased]:
    """Finds the biases of all kernels of a program.

    Args:
      graph: the program.
      shapes: shapes of its parameters by path.

    Returns:
      By path, in the order of the program.
    """
    users: dict[str, set[int]] = {}
    for node in graph.nodes:
        for x in filter(is_tracked, node.operands):
            for path in paths_of(x):
                users.setdefault(path, set()).add(id(node))
    found: dict[str, Biased] = {}
    seen: dict[str, set[int]] = {}
    sums: Sums = {}
    for node in graph.nodes:
        for i, x in enumerate(node.operands if node.name in PRODUCTS else ()):
            if not is_tracked(x):
                continue
            for path in paths_of(x) - {o.path for o in x.origins}:
                found.setdefault(path, Biased(why="it is changed before it is multiplied"))
            for o in x.origins:
                kernel = found.setdefault(o.path, Biased())
                seen.setdefault(o.path, set()).add(id(node))
                try:
                    _add(kernel, node, i, o, sums)
                except NotFollowed as why:
                    kernel.why = kernel.why or str(why)
    for path, kernel in found.items():
        kernel.why = kernel.why or _whole(kernel, shapes[path])
        if users[path] - seen[path]:
            kernel.why = kernel.why or "it is used in other ways than in products, too"
        for a in kernel.added:
            if users[a.path] - sums[path, a.path]:
                kernel.why = kernel.why or f"{a.path} is used elsewhere, too"
    return found


def _add(kernel: Biased, node: Node, i: int, o: Origin, sums: Sums) -> None:
    product = product_of(node.eqn, i)
    if isinstance(product, str):
        raise NotFollowed(product)
    r = roles(o, product)
    if isinstance(r, str):
        raise NotFollowed(r)
    if kernel.axes not in (None, r.axes):
        raise NotFollowed("its axes have several roles")
    kernel.axes = r.axes
    _check_layout(o, "it is changed before it is multiplied")
    shape = node.outs[0].shape
    for end in sums_after(node.outs[0]):
        if _loops(end.node) != _loops(node):
            raise NotFollowed("a bias is added in another loop than the product is in")
        way = Origin((), "", shape, end.hops)
        for b in end.node.operands[end.position].origins:
            _check_layout(b, f"{b.path} is changed before it is added")
            there = b.then(*end.back)
            entries, outputs = _matched(product, o, there, way, end.shape, r.axes)
            if len(entries):
                kernel.added.append(Added(b.path, entries, outputs, end.sign))
                sums.setdefault((o.path, b.path), set()).add(id(end.node))


def _check_layout(o: Origin, why: str) -> None:
    if o.lost or o.at or any(h.step.name not in LAYOUT | {"loop"} for h in o.hops):
        raise NotFollowed(why)


def _loops(node: Node) -> list[int]:
    return [id(e) for e in node.around if e.primitive.name in _LOOPS]


def _matched(
    product: Product,
    kernel: Origin,
    bias: Origin,
    way: Origin,
    shape: tuple[int, ...],
    axes: Axes,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns entries of a bias, and the outputs of a kernel that they are added to."""
    depths = sorted({*kernel.loops, *bias.loops})
    length = {}
    for o in (kernel, bias):
        taken = [h.before[0] for h in o.hops if h.step.name == "loop"]
        length |= dict(zip(o.loops, taken, strict=True))
    lines = Lines(bias, shape)
    taken = len(lines.taken)
    # Along the other axes all entries are added to alike; one stands for them.
    every = [d for d in range(len(shape)) if lines.varies(taken + d)]
    grid = np.indices([*(length[d] for d in depths), *(shape[d] for d in every)])
    grid = grid.reshape(len(grid), math.prod(grid.shape[1:]))
    loops = dict(zip(depths, grid, strict=False))
    points = [np.full(grid.shape[1], s) for s in lines.start[taken:]]
    for d, p in zip(every, grid[len(depths) :], strict=True):
        points[d] = p
    at, outside = pull(bias, [loops[d] for d in bias.loops], points)
    y, _ = pull(way, [], points)
    mine, beyond = pull(kernel, [loops[d] for d in kernel.loops], _operand(product, y))
    inside = (outside == 0) & (beyond == 0)
    entries = _flat(at, bias.shape, range(len(bias.shape)))
    outputs = _flat(mine, kernel.shape, _kept(axes))
    pairs = np.stack(np.broadcast_arrays(entries, outputs, inside)[:2])[:, inside]
    entries, outputs = np.unique(pairs, axis=1)
    return entries, outputs


def _kept(axes: Axes) -> list[int]:
    """Returns the axes of a kernel that its outputs have."""
    return [*range(axes.stack), *(axes.out or ())]


def _flat(at: list[np.ndarray], shape: tuple[int, ...], kept: Iterable[int]) -> np.ndarray:
    index = np.zeros(1, np.int64)
    for a in kept:
        index = index * shape[a] + at[a]
    return index


def _operand(product: Product, y: list[np.ndarray]) -> list[np.ndarray]:
    """Returns positions in a kernel's operand for positions in the product."""
    p, i = product.eqn.params, product.position
    shape = product.eqn.invars[i].aval.shape
    nothing = np.zeros_like(y[0]) if y else np.zeros(1, np.int64)
    at = [nothing] * len(shape)
    if product.eqn.primitive.name == "conv_general_dilated":
        spec = p["dimension_numbers"]
        at[spec.rhs_spec[0]] = y[spec.out_spec[1]]
        return at
    _, batch = p["dimension_numbers"]
    for d, a in enumerate(batch[i]):
        at[a] = y[d]
    start = len(batch[i])
    if i == 1:
        other = product.eqn.invars[0].aval.shape
        start += len(other) - len(batch[0]) - len(p["dimension_numbers"][0][0])
    for d, a in enumerate(product.free):
        at[a] = y[start + d]
    return at


def _whole(kernel: Biased, shape: tuple[int, ...]) -> str:
    """Joins what several uses found; says what keeps biases from taking any shift of outputs."""
    if kernel.axes is None:
        return "its axes are not known"
    pairs: dict[tuple[str, int], tuple[int, int]] = {}
    for a in kernel.added:
        for entry, output in zip(a.entries.tolist(), a.outputs.tolist(), strict=True):
            if pairs.setdefault((a.path, entry), (output, a.sign)) != (output, a.sign):
                return f"an entry of {a.path} is added to several of its outputs"
    outputs = math.prod(shape[a] for a in _kept(kernel.axes))
    if sorted(output for output, _ in pairs.values()) != list(range(outputs)):
        return "its outputs have no bias each"
    by_path: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for (path, entry), (output, sign) in pairs.items():
        by_path.setdefault((path, sign), []).append((entry, output))
    kernel.added = [
        Added(path, *np.asarray(found).T, sign) for (path, sign), found in by_path.items()
    ]
    return ""


def biases(fn: Callable[..., Any], params: Any, *args: Any) -> Table:
    """Lists every kernel of a function and the bias that :func:`correct_bias` would change.

    A bias is a parameter, or a running mean, that is added to the product with a kernel, or taken
    from it, before anything else happens to it than a change of layout or a sum with other values.

    Args:
      fn: function of `(params, ...)`.
      params: its dense parameters.
      *args: its other arguments.

    Returns:
      A row for each kernel: its path, that of the bias, the number of outputs, or why it has no
      bias that could take a shift of each output.

    Raises:
      TypeError: if a parameter is compressed, or under a JAX transformation.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]
      >>> params = {"a": jnp.ones((3, 4)), "bias": jnp.ones(4), "b": jnp.ones((4, 2))}
      >>> table = jom.quant.biases(fn, params, jnp.ones(3))
      >>> [(row["kernel"], row["bias"], row["note"]) for row in table]
      [('a', 'bias', ''), ('b', '', 'it has no bias: its product is returned')]
    """
    t = traced(fn, params, args, "biases")
    rows = []
    for path, kernel in biased(t.graph, {p: v.shape for p, v in t.values.items()}).items():
        paths = dict.fromkeys(a.path for a in kernel.added if not kernel.why)
        n = sum(len(a.outputs) for a in kernel.added) if paths else None
        rows.append((path, ", ".join(paths), n, kernel.why))
    return Table(("kernel", "bias", "outputs", "note"), rows, title=f"biases of {name_of(fn)}")
