"""How factors of channels go through changes of layout, and in and out of loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._tracked import is_tracked
from ._fixed import is_infinite, is_zero
from ._flow import Fields, Flow, fixes, shape_of
from ._nodes import Node
from ._scales import Term, reshaped, term


def layout(f: Flow, node: Node) -> Fields:
    """A change of layout of one value."""
    x, p, found = node.operands[0], node.eqn.params, []
    for t in f.field(x):
        new = LAID[node.name](node, t, p)
        if new is None:
            f.fix([t], f"it goes through {node.label} along its channels")
        else:
            found.append(new)
    for y in node.operands[1:]:
        f.stays(y, node)
    return [found]


def _squeeze(node: Node, t: Term, p: Any) -> Term:
    left = [d for d in range(len(shape_of(node, 0))) if d not in p["dimensions"]]
    return t.moved({d: left.index(d) for d in t.dims if d >= 0})


def _reverse(node: Node, t: Term, p: Any) -> Term:
    for d in set(p["dimensions"]) & set(t.dims):
        t = t.cut(d, np.arange(shape_of(node, 0)[d])[::-1])
    return t


def _slice(node: Node, t: Term, p: Any) -> Term:
    strides = p["strides"] or (1,) * len(p["start_indices"])
    for d in [d for d in t.dims if d >= 0]:
        t = t.cut(d, np.arange(p["start_indices"][d], p["limit_indices"][d], strides[d]))
    return t


def _dynamic_slice(node: Node, t: Term, p: Any) -> Term | None:
    shape = shape_of(node, 0)
    return t if all(d < 0 or p["slice_sizes"][d] == shape[d] for d in t.dims) else None


LAID: dict[str, Callable[[Node, Term, Any], Term | None]] = {
    "transpose": lambda n, t, p: t.moved({o: i for i, o in enumerate(p["permutation"])}),
    "reshape": lambda n, t, p: reshaped(t, shape_of(n, 0), p["new_sizes"]),
    "broadcast_in_dim": lambda n, t, p: t.moved(dict(enumerate(p["broadcast_dimensions"]))),
    "squeeze": _squeeze,
    "rev": _reverse,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}


def pads(f: Flow, node: Node) -> Fields:
    """Padding with zeros; between channels their factors are free."""
    x, fill = node.operands
    if not (is_tracked(fill) and (is_zero(fill) or is_infinite(fill))):
        return fixes(f, node)
    f.stays(x, node)
    found = []
    for t in f.field(x):
        for d in [d for d in t.dims if d >= 0]:
            low, high, inner = node.eqn.params["padding_config"][d]
            if low < 0 or high < 0 or inner:
                f.fix([t], f"it goes through {node.label} along its channels")
                break
            ends = [list(t.ids.shape) for _ in range(2)]
            ends[0][t.dims.index(d)], ends[1][t.dims.index(d)] = low, high
            parts = [f.pool.new(ends[0]), t.ids, f.pool.new(ends[1])]
            t = term(t.dims, np.concatenate(parts, t.dims.index(d)))
        else:
            found.append(t)
    return [found]


def concatenates(f: Flow, node: Node) -> Fields:
    """Side by side: channels next to channels, or the same channels more often."""
    d, out = node.eqn.params["dimension"], node.outs[0].shape
    fields = []
    for i, x in enumerate(node.operands):
        if is_tracked(x):
            made = f.new(x, shape_of(node, i), range(len(out)))
            if is_zero(x):
                made = [term([d], f.pool.new([shape_of(node, i)[d]]))]
            elif not made or not f.use(node, i, "added", shape_of(node, i), made):
                made = []
                f.stays(x, node)
            fields.append(made)
        else:
            fields.append(f.field(x))
    if any(len(t) > 1 for t in fields):
        for t in fields:
            f.fix(t, f"it is put beside other values ({node.label})")
        return [[]]
    dims = sorted({d, *(e for t in fields for one in t for e in one.dims)})
    sizes = {
        e: n for t in fields for one in t for e, n in zip(one.dims, one.ids.shape, strict=True)
    }
    parts = []
    for i, t in enumerate(fields):
        shape = [shape_of(node, i)[d] if e == d else sizes[e] for e in dims]
        ids = t[0].over(dims) if t else np.zeros((), np.int64)
        parts.append(np.broadcast_to(ids, shape))
    whole = term(dims, np.concatenate(parts, dims.index(d)))
    if d in whole.dims and not any(d in one.dims for t in fields for one in t):
        # Nothing differs along this axis: what is put beside each other has the same factors.
        axis = whole.dims.index(d)
        f.pool.same(whole.ids, whole.ids.take([0], axis), f"it is put beside others ({node.label})")
        whole = term(whole.dims, whole.ids.take([0], axis))
    return [[whole] if f.pool.of(whole.ids).any() else []]


def splits(f: Flow, node: Node) -> Fields:
    """Parts along an axis."""
    axis, sizes = node.eqn.params["axis"], node.eqn.params["sizes"]
    [x], found, start = node.operands, [], 0
    for _, n in zip(node.outs, sizes, strict=True):
        part = np.arange(start, start + n)
        found.append([t.cut(axis, part) if axis in t.dims else t for t in f.field(x)])
        start += n
    return found


def updates(f: Flow, node: Node) -> Fields:
    """A part of a value is written over: both need the same factors."""
    x, new, *_ = node.operands
    if is_tracked(x) and not is_zero(x):
        return fixes(f, node)
    terms = f.field(new) if is_tracked(x) else f.field(x)
    shape, part = node.outs[0].shape, shape_of(node, 1)
    if is_tracked(new) or any(d >= 0 and shape[d] != part[d] for t in terms for d in t.dims):
        return fixes(f, node)
    if not is_tracked(x):
        f.equal(terms, f.field(new), f"it is written over ({node.label})")
    return [terms]


def enters(f: Flow, node: Node) -> Fields:
    """What a loop carries has the same factors in every iteration."""
    [x] = node.operands
    f.stays(x, node)
    return [f.field(x)]


def leaves(f: Flow, node: Node) -> Fields:
    """What a loop hands on has the factors it began with."""
    start, end = node.operands
    if is_tracked(end):
        f.stays(end, node)
        f.fix(f.field(start), f"it is carried by {node.label} and overwritten")
        return [[]]
    f.equal(f.field(start), f.field(end), f"it is carried by {node.label}, which changes it")
    return [f.field(start)]


def slices(f: Flow, node: Node) -> Fields:
    """One iteration of a loop sees one entry along the first axis."""
    [x] = node.operands
    loop = -node.depth - 1
    return [[t.moved({d: d - 1 if d else loop for d in t.dims if d >= 0}) for t in f.field(x)]]


def stacks(f: Flow, node: Node) -> Fields:
    """What each iteration returns, along a first axis."""
    [x] = node.operands
    f.stays(x, node)
    loop = -node.depth - 1
    to = {d: d + 1 for d in range(len(node.outs[0].shape))} | {loop: 0}
    return [[t.moved({d: to[d] for d in t.dims if d in to}) for t in f.field(x)]]
