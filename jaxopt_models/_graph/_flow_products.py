"""How factors of channels go through products, look-ups, and sums over axes."""

from __future__ import annotations

import numpy as np

from .._products import Product, product_of
from .._tracked import is_tracked
from ._flow import Fields, Flow, fixes, reasons, shape_of
from ._nodes import Node
from ._scales import Term, term


def product(f: Flow, node: Node) -> Fields:
    """A dot product or convolution: the kernel takes the factors of its input away."""
    a, b = node.operands
    if not (is_tracked(a) or is_tracked(b)):
        return _between(f, node)
    i = 0 if is_tracked(a) else 1
    p = product_of(node.eqn, i)
    terms = f.field(node.operands[1 - i])
    if isinstance(p, str):
        return fixes(f, node)
    met, kept = (_met_dot if node.name == "dot_general" else _met_conv)(f, p, terms)
    shape = shape_of(node, i)
    free = [d for d in (*p.shared, *p.free) if shape[d] > 1]
    made = f.new(node.operands[i], shape, free) if "product" in f.absorbs else []
    if not made or not f.use(node, i, "product", shape, made, met):
        f.fix(met, f"it is multiplied with {reasons(node.operands[i])} ({node.label})")
        f.stays(node.operands[i], node)
        return [kept]
    to = _out_axes(p)
    return [[*kept, *(t.moved({d: to[d] for d in t.dims if d >= 0}) for t in made)]]


def _out_axes(p: Product) -> dict[int, int]:
    """Returns where the free and shared axes of a kernel are in the result."""
    if p.eqn.primitive.name != "dot_general":
        return {p.free[0]: p.eqn.params["dimension_numbers"].out_spec[1]}
    _, batch = p.eqn.params["dimension_numbers"]
    n = len(batch[0])
    to = {d: batch[p.position].index(d) for d in p.shared}
    before = 0 if p.position == 0 else len(p.eqn.outvars[0].aval.shape) - len(p.free) - n
    return to | {d: n + before + k for k, d in enumerate(p.free)}


def _met_dot(f: Flow, p: Product, terms: list[Term]) -> tuple[list[Term], list[Term]]:
    contract, batch = p.eqn.params["dimension_numbers"]
    mine, other = p.position, 1 - p.position
    to = dict(zip(contract[other], contract[mine], strict=True))
    shared = dict(zip(batch[other], batch[mine], strict=True))
    ndim = len(p.eqn.invars[other].aval.shape)
    free = [d for d in range(ndim) if d not in to and d not in shared]
    before = 0 if other == 0 else len(p.eqn.outvars[0].aval.shape) - len(batch[0]) - len(free)
    out = {d: len(batch[0]) + before + k for k, d in enumerate(free)}
    out |= {d: k for k, d in enumerate(batch[other])}
    met, kept = [], []
    for t in terms:
        if not set(t.dims) & set(to):
            kept.append(t.moved({d: out[d] for d in t.dims if d >= 0}))
        else:
            # The kernel is the same for all indices along the axes that are kept.
            alone = {d for d in t.dims if d >= 0} - set(to) - set(shared)
            met.append(f.collapsed(t, alone).moved(to | shared))
    return met, kept


def _met_conv(f: Flow, p: Product, terms: list[Term]) -> tuple[list[Term], list[Term]]:
    spec, groups = p.eqn.params["dimension_numbers"], p.eqn.params["feature_group_count"]
    channel = spec.lhs_spec[1]
    met, kept = [], []
    for t in terms:
        if all(d < 0 for d in t.dims):
            kept.append(t)
            continue
        if {d for d in t.dims if d >= 0} != {channel}:
            f.fix([t], "it differs along axes that a convolution moves over")
            continue
        outs, ins = (p.eqn.invars[1].aval.shape[a] for a in spec.rhs_spec[:2])
        at = np.arange(outs)[:, None] // (outs // groups) * ins + np.arange(ins)
        if groups == 1:
            met.append(t.moved({channel: spec.rhs_spec[1]}))
            continue
        wide = np.moveaxis(t.ids, t.dims.index(channel), -1)[..., at]
        others = [d for d in t.dims if d != channel]
        met.append(term([*others, spec.rhs_spec[0], spec.rhs_spec[1]], wide))
    return met, kept


def _between(f: Flow, node: Node) -> Fields:
    """A product of two values keeps what is not summed over."""
    if node.name != "dot_general":
        return fixes(f, node)
    kept = []
    for i, x in enumerate(node.operands):
        as_if = Product(node.eqn, 1 - i, (), (), (), None, 0)
        met, free = _met_dot(f, as_if, f.field(x))
        f.fix(met, f"it is multiplied with another value ({node.label})")
        kept += free
    f.notes[node.outs[0]] = f"it comes out of {node.label}"
    return [kept]


def looks_up(f: Flow, node: Node) -> Fields:
    """A row of a table, or whole channels of a value by index."""
    dims = node.eqn.params["dimension_numbers"]
    shape, sizes = shape_of(node, 0), node.eqn.params["slice_sizes"]
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    to = dict(zip([d for d in range(len(shape)) if d not in gone], dims.offset_dims, strict=True))
    x, index = node.operands
    f.stays(index, node)
    if is_tracked(x):
        p = product_of(node.eqn, 0)
        made = [] if isinstance(p, str) else f.new(x, shape, p.free)
        if not made or not f.use(node, 0, "lookup", shape, made):
            return fixes(f, node)
        return [[t.moved({d: to[d] for d in t.dims if d >= 0}) for t in made]]
    terms = f.field(x)
    whole = [t for t in terms if all(d < 0 or (d in to and sizes[d] == shape[d]) for d in t.dims)]
    f.fix([t for t in terms if t not in whole], f"it is indexed by data ({node.label})")
    return [[t.moved({d: to[d] for d in t.dims if d >= 0}) for t in whole]]


def reduces(f: Flow, node: Node) -> Fields:
    """A sum or extreme over axes along which the factors are the same."""
    [x] = node.operands
    axes = node.eqn.params["axes"]
    left = [d for d in range(len(shape_of(node, 0))) if d not in axes]
    terms = f.field(x)
    over = [t for t in terms if set(t.dims) & set(axes)]
    f.fix(over, f"it goes through {node.label} over its channels")
    if over:
        f.notes[node.outs[0]] = f"it comes out of {node.label}"
    if node.name in ("argmax", "argmin"):
        return [[]]
    to = {d: i for i, d in enumerate(left)}
    return [[t.moved({d: to[d] for d in t.dims if d >= 0}) for t in terms if t not in over]]


def windows(f: Flow, node: Node) -> Fields:
    """Pooling, and running sums: along other axes."""
    p = node.eqn.params
    if "window_dimensions" in p:
        moved = [d for d, n in enumerate(p["window_dimensions"]) if n > 1]
    else:
        moved = [p["axis"]]
    x = node.operands[0]
    over = [t for t in f.field(x) if set(t.dims) & set(moved)]
    f.fix(over, f"it goes through {node.label} along its channels")
    return [[t for t in f.field(x) if t not in over]]
