"""How rotated channels go through products and look-ups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .._products import product_of
from .._tracked import is_tracked
from ._flow import shape_of
from ._nodes import Node
from ._spaces import Spaces, Turn, Turns, fixes


def product(s: Spaces, node: Node) -> Turns:
    """A kernel turns its input back, and its output."""
    if not any(map(is_tracked, node.operands)):
        return _between(s, node)
    i = 0 if is_tracked(node.operands[0]) else 1
    p, t = product_of(node.eqn, i), s.live(node.operands[1 - i])
    if isinstance(p, str) or p.groups is not None or (t is not None and t.square):
        return fixes(s, node)
    met, kept = _met(s, node, p, t)
    if t is not None and met is None and kept is None:
        return fixes(s, node)
    shape = shape_of(node, i)
    free = tuple(d for d in p.free if shape[d] > 1)
    made = None
    if kept is None and free:
        made = Turn(free, s.new(math.prod(shape[d] for d in free)))
    if not s.member(node, i, [met, made]):
        for turn in filter(None, (met, made)):
            turn.space.fix(f"it meets what is no kernel ({node.label})")
        return [kept]
    if made is None:
        return [kept]
    if node.name == "conv_general_dilated":
        return [made.moved(lambda d: node.eqn.params["dimension_numbers"].out_spec[1])]
    batch = node.eqn.params["dimension_numbers"][1][0]
    ndim = len(node.outs[0].shape)
    start = len(batch) if i == 0 else ndim - len(p.free)
    return [made.moved(lambda d: start + p.free.index(d))]


def _met(s: Spaces, node: Node, p: Any, t: Turn | None) -> tuple[Turn | None, Turn | None]:
    """Returns the turn of a kernel, or that of the result, that the turn of its input makes."""
    if t is None:
        return None, None
    if node.name == "conv_general_dilated":
        spec = node.eqn.params["dimension_numbers"]
        return (
            (t.moved(lambda d: spec.rhs_spec[1]), None)
            if t.dims == spec.lhs_spec[1:2]
            else (
                None,
                None,
            )
        )
    mine, other = p.position, 1 - p.position
    contract, batch = node.eqn.params["dimension_numbers"]
    to = dict(zip((*contract[other], *batch[other]), (*contract[mine], *batch[mine]), strict=True))
    if set(t.dims) & set(contract[other]):
        if not set(t.dims) <= set(to) or not _within(s, node, other, t, batch[other]):
            return None, None
        return t.moved(to.__getitem__), None
    return None, _kept(node, other, t)


def _within(s: Spaces, node: Node, i: int, t: Turn, batch: Sequence[int]) -> bool:
    """Cuts a space into runs of the axes that are not shared; says whether they follow these."""
    inner = [d for d in t.dims if d not in batch]
    if t.dims[len(t.dims) - len(inner) :] != tuple(inner):
        return False
    if len(inner) < len(t.dims):
        t.space.within(math.prod(shape_of(node, i)[d] for d in inner))
    return True


def _kept(node: Node, i: int, t: Turn) -> Turn:
    """Returns the turn of a dot product of which an operand's turned axes are not summed over."""
    contract, batch = node.eqn.params["dimension_numbers"]
    ndim = len(shape_of(node, i))
    free = [d for d in range(ndim) if d not in contract[i] and d not in batch[i]]
    start = len(batch[i]) if i == 0 else len(node.outs[0].shape) - len(free)
    out = {d: start + k for k, d in enumerate(free)} | {d: k for k, d in enumerate(batch[i])}
    return t.moved(out.__getitem__)


def _between(s: Spaces, node: Node) -> Turns:
    """A product of two values: neither sees the turn that both have, or one hands on its own."""
    if node.name != "dot_general":
        return fixes(s, node)
    contract, batch = node.eqn.params["dimension_numbers"]
    turns = [s.live(x) for x in node.operands]
    summed = [t is not None and bool(set(t.dims) & set(contract[i])) for i, t in enumerate(turns)]
    a, b = turns
    if a is not None and b is not None and all(summed):
        to = dict(zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True))
        alike = set(a.dims) <= set(to) and tuple(to[d] for d in a.dims) == b.dims
        if not alike or a.square or b.square or not _within(s, node, 0, a, batch[0]):
            return fixes(s, node)
        a.space.join(b.space, f"vectors of several lengths are multiplied ({node.label})")
        return [None]
    if any(summed) or (a is not None and b is not None):
        return fixes(s, node)
    if a is None and b is None:
        return [None]
    i = 0 if a is not None else 1
    t = turns[i]
    assert t is not None
    return [_kept(node, i, t)] if _within(s, node, i, t, batch[i]) else fixes(s, node)


def looks_up(s: Spaces, node: Node) -> Turns:
    """A row of a table is turned as the table is."""
    dims, shape = node.eqn.params["dimension_numbers"], shape_of(node, 0)
    x, sizes = node.operands[0], node.eqn.params["slice_sizes"]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    to = dict(zip([d for d in range(len(shape)) if d not in gone], dims.offset_dims, strict=True))
    if not is_tracked(x):
        t = s.live(x)
        if t is None or any(d not in to or sizes[d] != shape[d] for d in t.dims):
            return fixes(s, node)
        return [t.moved(to.__getitem__)]
    p = product_of(node.eqn, 0)
    if isinstance(p, str):
        return fixes(s, node)
    made = Turn(tuple(p.free), s.new(math.prod(shape[d] for d in p.free)))
    if not s.member(node, 0, [made]):
        made.space.fix(f"its rows are not followed ({node.label})")
    return [made.moved(to.__getitem__)]
