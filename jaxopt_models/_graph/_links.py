"""Which parameters can be multiplied along their channels without changing what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._call import name_of
from .._table import Table
from .._tracked import is_tracked
from ._fixed import paths_of, shift_of
from ._flow import KINDS, Flow, Use
from ._flow_rules import RULES
from ._nodes import Node
from ._rewrite import Traced, traced
from ._scales import Term

PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class Member:
    """A parameter of a chain.

    Args:
      path: its path.
      kind: ``"product"``, ``"lookup"``, ``"scaled"`` or ``"added"``.
      node: the operation that uses it.
      axes: its axes along which the factors differ.
      index: for each index along these the number of its channel, -1 for none.
      power: 1 where it is multiplied with the factor, -1 where it is divided.
      shift: what is added to it before it is used.
    """

    path: str
    kind: str
    node: Node
    axes: tuple[int, ...]
    index: np.ndarray
    power: int
    shift: float

    def factor(self, scale: np.ndarray, ndim: int) -> np.ndarray:
        """Returns what the parameter is multiplied with, with an axis for each of its axes."""
        wide = np.concatenate([scale, [1.0]])[self.index] ** self.power
        shape = [self.index.shape[self.axes.index(a)] if a in self.axes else 1 for a in range(ndim)]
        return wide.reshape(shape)

    def channels(self, reduce: Any, w: np.ndarray, channels: int, start: float) -> np.ndarray:
        """Reduces an array of the parameter's shape to one number for each channel."""
        others = tuple(a for a in range(w.ndim) if a not in self.axes)
        each = reduce.reduce(w, axis=others) if others else w
        found = np.full(channels + 1, start)
        reduce.at(found, self.index.ravel(), each.ravel())  # the last is for those of none
        return found[:-1]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Parameters that are multiplied together.

    Args:
      channels: number of factors, any positive numbers.
      members: what becomes of each parameter.
    """

    channels: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> list[Member]:
        """Those that make the channels."""
        made = ("product", "scaled", "lookup")
        return [m for m in self.members if m.power > 0 and m.kind in made]

    @property
    def consumers(self) -> list[Member]:
        """Kernels that take them in."""
        return [m for m in self.members if m.power < 0 and m.kind == "product"]

    def scaled(self, values: dict[str, Any], scale: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the parameters of the chain multiplied with factors `[channels]`, `float64`."""
        new: dict[str, np.ndarray] = {}
        for m in self.members:
            w = new.get(m.path, np.asarray(values[m.path], np.float64))
            new[m.path] = (w + m.shift) * m.factor(scale, w.ndim) - m.shift
        return new


class Links:
    """The chains of a program.

    Args:
      t: the traced call.
      absorbs: kinds of uses that may make up a difference of factors.
      takes: operations in which whatever is multiplied makes one up.
    """

    def __init__(self, t: Traced, *, absorbs: Sequence[str] = KINDS, takes: Sequence[Node] = ()):
        self.traced = t
        self.flow = Flow(t.graph, RULES, absorbs=absorbs, takes=takes)
        self.rank, self.number, self.sizes = self._grouped()
        members: list[list[Member]] = [[] for _ in self.sizes]
        for use in self.flow.uses:
            for power, terms in ((1, use.times), (-1, use.over)):
                for t_ in terms:
                    for k, member in self._members(use, t_, power):
                        members[k].append(member)
        pairs = zip(self.sizes, members, strict=True)
        self.chains = [Chain(n, tuple(m)) for n, m in pairs]

    def _grouped(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Returns the chain of each factor, its number there, and the number in each chain."""
        flow = self.flow
        same = flow.pool.label.copy()
        terms = [t for u in flow.uses for t in (*u.times, *u.over)]
        terms += [t for pair in flow.taken.values() for ts in pair for t in ts]
        for t in terms:
            found = np.unique(same[flow.pool.of(t.ids)])
            found = found[found > 0]
            if len(found) > 1:
                same[np.isin(same, found)] = found[0]
        rank = np.full(len(same), -1)
        number = np.full(len(same), -1)
        sizes: list[int] = []
        real = np.unique(flow.pool.label[flow.pool.label > 0])
        used = np.unique(np.concatenate([flow.pool.of(t.ids).ravel() for t in terms] or [real[:0]]))
        for k in np.unique(same[real]):
            mine = real[(same[real] == k) & np.isin(real, used)]
            if len(mine):
                rank[mine], number[mine] = len(sizes), np.arange(len(mine))
                sizes.append(len(mine))
        return rank, number, sizes

    def _members(self, use: Use, t: Term, power: int) -> list[tuple[int, Member]]:
        labels = self.flow.pool.of(t.ids)
        chains = np.unique(self.rank[labels[labels > 0]])
        if not len(chains):
            return []
        o, lines = use.origin, use.lines
        assert o is not None
        dims = [_line_of(o, lines, d) for d in t.dims]
        axes = sorted(set().union(*(lines.varies(d) for d in dims)))
        sizes = [o.shape[a] for a in axes]
        flat = lines.grid(dims, axes, tuple(sizes))
        found = []
        for k in chains:
            index = np.full(int(np.prod(sizes)), -1)
            mine = (self.rank[labels] == k) & (labels > 0)
            inside = flat >= 0
            chosen = np.where(mine, self.number[labels], -1).ravel()
            index[flat[inside]] = chosen[inside]
            member = Member(
                use.path, use.kind, use.node, tuple(axes), index.reshape(sizes), power, shift_of(o)
            )
            found.append((int(k), member))
        return found

    def chains_of(self, path: str) -> list[Chain]:
        """Returns the chains in which a parameter takes channels in."""
        return [c for c in self.chains if any(m.path == path for m in c.consumers)]

    def consumers(self) -> dict[str, tuple[list[Chain], str]]:
        """Returns, for each parameter of a product, its chains, or why it has none."""
        found: dict[str, tuple[list[Chain], str]] = {}
        for node in self.traced.graph.nodes:
            if node.name not in PRODUCTS or not any(map(is_tracked, node.operands)):
                continue
            i = next(i for i, x in enumerate(node.operands) if is_tracked(x))
            x = node.operands[i]
            for path in sorted({o.path for o in x.origins} or paths_of(x)):
                chains = [c for c in self.chains_of(path) if c.producers]
                found.setdefault(path, (chains, "" if chains else self._why(node, i, path)))
        return found

    def _why(self, node: Node, i: int, path: str) -> str:
        flow, x = self.flow, node.operands[1 - i]
        if not flow.lines(node.operands[i], tuple(node.eqn.invars[i].aval.shape)):
            return "its axes are not followed to the product"
        return f"its input cannot be scaled: {flow.why(x) or 'it hangs on no parameter'}"

    def table(self) -> Table:
        """Returns a row for each parameter that takes channels in."""
        rows = []
        for path, (chains, why) in self.consumers().items():
            for c in chains:
                made = {m.path: None for m in c.producers}
                others = {m.path: None for m in c.members if m.path not in made and m.path != path}
                rows.append((path, ", ".join(made), c.channels, ", ".join(others), ""))
            if why:
                rows.append((path, "", None, "", why))
        columns = ("consumer", "from", "channels", "with", "note")
        return Table(columns, rows, title=f"links {name_of(self.traced.fn)}")


def _line_of(o: Any, lines: Any, d: int) -> int:
    if d >= 0:
        return len(lines.taken) + d
    return lines.loops[o.loops.index(-d)]


def links(fn: Callable[..., Any], params: Any, *args: Any) -> Table:
    """Lists which parameters can be scaled along their channels without changing ``fn``.

    A layer that makes channels (a kernel, the scale of a norm, an embedding) may be multiplied
    with any positive number for each of them, if every layer that takes them in is divided by
    it, and only what commutes with that is between: nothing, bias, ReLU and leaky ReLU, pooling,
    a change of layout, masks, the sum of an attention over positions.

    Args:
      fn: function of `(params, ...)`.
      params: its dense parameters.
      *args: its other arguments.

    Returns:
      A row for each kernel that takes channels in: what makes them, how many there are, what else
      has to be multiplied or divided, or why they cannot be scaled.

    Raises:
      TypeError: under a JAX transformation.
      ValueError: if no parameter reaches the program.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jnp.tanh(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
      >>> table = jom.quant.links(fn, params, jnp.ones((1, 3)))
      >>> [(row["consumer"], row["from"], row["channels"]) for row in table]
      [('a', '', None), ('b', 'a', 4), ('c', '', None)]
      >>> table[2]["note"]
      'its input cannot be scaled: it comes out of tanh'
    """
    return Links(traced(fn, params, args, "links")).table()
