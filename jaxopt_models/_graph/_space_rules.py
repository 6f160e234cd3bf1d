"""How rotated channels go through sums, layout and loops, and which rule is whose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .._tracked import is_tracked
from ._fixed import LINEAR, is_zero
from ._flow import shape_of
from ._nodes import Node
from ._scales import runs
from ._space_products import looks_up, product
from ._spaces import Spaces, Turn, Turns, fixes


def passes(s: Spaces, node: Node) -> Turns:
    """Entry by entry, and linear."""
    if not jnp.issubdtype(node.outs[0].dtype, jnp.floating):
        return fixes(s, node)
    return [s.live(x) for x in node.operands]


def sums(s: Spaces, node: Node) -> Turns:
    """All that is added is turned alike; what is the same along the axes is not turned."""
    items = [(i, x) for i, x in enumerate(node.operands) if i or node.name != "select_n"]
    found = [t for _, x in items if (t := s.live(x)) is not None]
    if not found:
        for _, x in items:
            s.stays(x)
        return [None]
    first, *others = found
    for t in others:
        first.space.join(t.space, f"vectors of several lengths are added ({node.label})")
    if any(t.dims != first.dims or t.square for t in found):
        first.space.fix(f"it is added to something else ({node.label})")
    for i, x in items:
        if s.live(x) is not None or is_zero(x):
            continue
        needs = s.constant_along(node, i, first.dims)
        if needs is not None:
            s.stays(x)
            first.space.root.ones = True
            first.space.root.needs |= needs
        elif not is_tracked(x) or not s.member(node, i, [first]):
            first.space.fix(f"it is added to what is not turned{s.why(x)} ({node.label})")
    if node.name == "select_n" and s.constant_along(node, 0, first.dims) is None:
        first.space.fix(f"its entries are chosen one by one ({node.label})")
    return [first]


def multiplies(s: Spaces, node: Node) -> Turns:
    """A factor that is the same along the axes stays outside."""
    a, b = (s.live(x) for x in node.operands)
    if a is not None and b is not None:
        if node.name == "div" or a.dims != b.dims or a.square or b.square:
            return fixes(s, node)
        a.space.join(b.space, f"vectors of several lengths are multiplied ({node.label})")
        return [dataclasses.replace(a, square=True)]
    if (a is None and b is None) or (node.name == "div" and a is None):
        return fixes(s, node)
    i = 0 if a is None else 1
    turn = a or b
    assert turn is not None
    needs = s.constant_along(node, i, turn.dims)
    if needs is None:
        return fixes(s, node)
    s.stays(node.operands[i], but=needs)
    turn.space.root.needs |= needs
    return [turn]


def squares(s: Spaces, node: Node) -> Turns:
    """The square of a vector, to be summed up."""
    t = s.live(node.operands[0])
    if t is None or t.square or node.eqn.params.get("y", 2) != 2:
        return fixes(s, node)
    return [dataclasses.replace(t, square=True)]


def reduces(s: Spaces, node: Node) -> Turns:
    """A sum over all channels, or over other axes."""
    t, axes = s.live(node.operands[0]), node.eqn.params["axes"]
    if t is None:
        return fixes(s, node)
    if set(t.dims) <= set(axes):
        t.space.root.ones |= not t.square
        return [None]
    if set(t.dims) & set(axes):
        return fixes(s, node)
    left = [d for d in range(len(shape_of(node, 0))) if d not in axes]
    return [t.moved(left.index)]


def layout(s: Spaces, node: Node) -> Turns:
    """A change of layout that keeps the channels together."""
    t = s.live(node.operands[0])
    if t is None:
        return fixes(s, node)
    new = _LAID[node.name](node, t, node.eqn.params)
    for x in node.operands[1:]:
        s.stays(x)
    return [new] if new is not None else fixes(s, node)


def _reshape(node: Node, t: Turn, p: Any) -> Turn | None:
    before, after, dims = shape_of(node, 0), p["new_sizes"], []
    for old, new in runs(before, after):
        mine = {d for d in old if before[d] > 1}
        if mine & set(t.dims):
            if not mine <= set(t.dims) or list(t.dims) != sorted(t.dims):
                return None
            dims += [d for d in new if after[d] > 1]
    return dataclasses.replace(t, dims=tuple(dims))


def _squeeze(node: Node, t: Turn, p: Any) -> Turn:
    left = [d for d in range(len(shape_of(node, 0))) if d not in p["dimensions"]]
    return t.moved(left.index)


def _apart(sizes: str) -> Callable[[Node, Turn, Any], Turn | None]:
    """Makes the rule of what works along other axes, which have other lengths after."""

    def rule(node: Node, t: Turn, p: Any) -> Turn | None:
        shape, after = shape_of(node, 0), node.outs[0].shape
        whole = all(shape[d] == after[d] for d in t.dims)
        return t if whole and not set(p.get(sizes) or ()) & set(t.dims) else None

    return rule


_LAID: dict[str, Callable[[Node, Turn, Any], Turn | None]] = {
    "transpose": lambda n, t, p: t.moved(p["permutation"].index),
    "broadcast_in_dim": lambda n, t, p: t.moved(lambda d: p["broadcast_dimensions"][d]),
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _apart(""),
    "dynamic_slice": _apart(""),
    "rev": _apart("dimensions"),
}


def pads(s: Spaces, node: Node) -> Turns:
    """Zeros beside the vectors."""
    t = s.live(node.operands[0])
    config = node.eqn.params["padding_config"]
    if t is None or not is_zero(node.operands[1]) or any(any(config[d]) for d in t.dims):
        return fixes(s, node)
    return [t]


def concatenates(s: Spaces, node: Node) -> Turns:
    """Vectors beside vectors."""
    turned = [t for x in node.operands if (t := s.live(x)) is not None]
    if any(node.eqn.params["dimension"] in t.dims for t in turned):
        return fixes(s, node)
    return sums(s, node)


def splits(s: Spaces, node: Node) -> Turns:
    """Along another axis."""
    t = s.live(node.operands[0])
    if t is None or node.eqn.params["axis"] in t.dims:
        return fixes(s, node)
    return [t] * len(node.outs)


def updates(s: Spaces, node: Node) -> Turns:
    """Vectors written over others."""
    x, new, *_ = node.operands
    t, u = s.live(x), s.live(new)
    shape, part = node.outs[0].shape, shape_of(node, 1)
    first = u or t
    if first is None or is_tracked(new) or any(shape[d] != part[d] for d in first.dims):
        return fixes(s, node)
    if is_zero(x):
        return [first]
    return _alike(s, node, t, u, "are one value")


def _alike(s: Spaces, node: Node, t: Turn | None, u: Turn | None, what: str) -> Turns:
    """Two values that become one have to be turned in the same way."""
    if t is None or u is None or t.dims != u.dims or t.square or u.square:
        return fixes(s, node)
    t.space.join(u.space, f"vectors of several lengths {what} ({node.label})")
    return [t]


def enters(s: Spaces, node: Node) -> Turns:
    """What a loop carries is turned alike in every iteration."""
    s.stays(node.operands[0])
    return [s.live(node.operands[0])]


def leaves(s: Spaces, node: Node) -> Turns:
    """What a loop hands on is turned as what it began with."""
    start, end = node.operands
    t, u = s.live(start), s.live(end)
    if t is None and u is None:
        s.stays(end)
        return [None]
    return _alike(s, node, t, u, "are carried")


def slices(s: Spaces, node: Node) -> Turns:
    """One iteration sees what is along the first axis one by one."""
    t = s.live(node.operands[0])
    return fixes(s, node) if t is None or 0 in t.dims else [t.moved(lambda d: d - 1)]


def stacks(s: Spaces, node: Node) -> Turns:
    """What each iteration returns, along a first axis."""
    t = s.live(node.operands[0])
    return fixes(s, node) if t is None else [t.moved(lambda d: d + 1)]


SPACE_RULES: dict[str, Callable[[Spaces, Node], Turns]] = {
    **dict.fromkeys(LINEAR | {"neg", "optimization_barrier"}, passes),
    **dict.fromkeys(("add", "sub", "add_any", "select_n", "branches"), sums),
    **dict.fromkeys(("mul", "div"), multiplies),
    **dict.fromkeys(("square", "integer_pow"), squares),
    **dict.fromkeys(("dot_general", "conv_general_dilated"), product),
    **dict.fromkeys(_LAID, layout),
    "reduce_sum": reduces,
    "gather": looks_up,
    "pad": pads,
    "concatenate": concatenates,
    "split": splits,
    "dynamic_update_slice": updates,
    "loop_in": enters,
    "loop_out": leaves,
    "loop_slice": slices,
    "loop_stack": stacks,
}
