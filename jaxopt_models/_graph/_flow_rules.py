"""How factors of channels go through entrywise operations, and which rule is whose."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from .._tracked import is_tracked
from ._fixed import is_infinite, is_zero
from ._flow import Fields, Flow, fixes, reasons, shape_of
from ._flow_layout import (
    LAID,
    concatenates,
    enters,
    layout,
    leaves,
    pads,
    slices,
    splits,
    stacks,
    updates,
)
from ._flow_products import looks_up, product, reduces, windows
from ._nodes import Node
from ._scales import Term, term


def passes(f: Flow, node: Node) -> Fields:
    """Entry by entry, and positive factors stay."""
    if not jnp.issubdtype(node.outs[0].dtype, jnp.floating):
        return fixes(f, node)
    found = []
    for x in node.operands:
        f.stays(x, node)
        found.append(f.field(x))
    return found


def forgets(f: Flow, node: Node) -> Fields:
    """The result is the same for all positive factors."""
    for x in node.operands:
        f.stays(x, node)
    return [[] for _ in node.outs]


def joins(f: Flow, node: Node) -> Fields:
    """All operands need the same factors; those of parameters follow."""
    verb = _VERBS.get(node.name, "compared with" if node.name in COMPARE else "added to")
    first = node.name == "select_n"
    items = [(i, x) for i, x in enumerate(node.operands) if i or not first]
    values = [x for _, x in items if not is_tracked(x)]
    fields = [f.field(x) for x in values]
    joined = next((t for t in fields if t), [])
    for t in fields:
        if t is not joined:
            f.equal(joined, t, f"it is {verb} a value with other factors ({node.label})")
    for i, x in items:
        if not is_tracked(x) or is_zero(x) or (is_infinite(x) and node.name in _ORDER):
            continue
        if not f.use(node, i, "added", _shape(node, i), joined):
            f.fix(joined, f"it is {verb} {reasons(x)} ({node.label})")
    if first:
        f.stays(node.operands[0], node)
    live = [t for t in joined if f.pool.of(t.ids).any()]
    return [[]] if node.name in COMPARE else [live]


def _shape(node: Node, i: int) -> tuple[int, ...]:
    if node.name == "branches":
        return node.outs[0].shape
    return shape_of(node, i)


def multiplies(f: Flow, node: Node) -> Fields:
    """Factors of two values multiply; a parameter makes up the difference."""
    a, b = node.operands
    if not (is_tracked(a) or is_tracked(b)):
        return [[*f.field(a), *f.field(b)]]
    i = 0 if is_tracked(a) else 1
    return [_scaled(f, node, i, f.field(node.operands[1 - i]))]


def divides(f: Flow, node: Node) -> Fields:
    """As a product; a value that divides has no factors."""
    a, b = node.operands
    if not is_tracked(b):
        f.fix(f.field(b), f"it divides ({node.label})")
    if is_tracked(a):
        return [_scaled(f, node, 0, [])]
    if is_tracked(b):
        return [_scaled(f, node, 1, f.field(a))]
    return [f.field(a)]


def _scaled(f: Flow, node: Node, i: int, terms: list[Term]) -> list[Term]:
    x, shape = node.operands[i], shape_of(node, i)
    if id(node) in f.takes:
        dims = [d for d, n in enumerate(shape) if n > 1]
        inside = [t for t in terms if {d for d in t.dims if d >= 0} <= set(dims)]
        made = [term(dims, f.pool.new([shape[d] for d in dims]))]
        f.taken[id(node)] = (made, inside)
        f.stays(x, node)
        return [*(t for t in terms if t not in inside), *made]
    if node.name == "div" and i == 1:
        f.stays(x, node)
        return terms
    made = f.new(x, shape, range(len(shape))) if "scaled" in f.absorbs else []
    inside = [t for t in terms if made and set(t.dims) <= set(made[0].dims)]
    if made and f.use(node, i, "scaled", shape, made, inside):
        return [*(t for t in terms if t not in inside), *made]
    f.stays(x, node)
    return terms


_VERBS = {
    **dict.fromkeys(("select_n", "branches"), "chosen beside"),
    **dict.fromkeys(("max", "min", "clamp"), "clipped by"),
}
COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
_ORDER = COMPARE | {"max", "min", "select_n", "clamp"}
_UNARY = {
    *("neg", "abs", "convert_element_type", "copy", "stop_gradient", "reduce_precision", "name"),
    *("pvary", "sharding_constraint", "optimization_barrier", "copy_p"),
}
_SUMS = {"reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin"}
_WINDOWS = {
    *("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
    *("cumsum", "cummax", "cummin"),
}
RULES: dict[str, Callable[[Flow, Node], Fields]] = {
    **dict.fromkeys(_UNARY, passes),
    **dict.fromkeys(("sign", "is_finite", "and", "or", "not", "xor"), forgets),
    **dict.fromkeys(COMPARE | {"add", "sub", "add_any", "max", "min", "clamp"}, joins),
    **dict.fromkeys(("select_n", "branches"), joins),
    **dict.fromkeys(_SUMS, reduces),
    **dict.fromkeys(_WINDOWS, windows),
    **dict.fromkeys(LAID, layout),
    **dict.fromkeys(("dot_general", "conv_general_dilated"), product),
    "mul": multiplies,
    "div": divides,
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
