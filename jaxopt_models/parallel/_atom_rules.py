"""What operations do to the atoms of their operands; a rule returns the axes of each result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._deferred import ARITHMETIC, ENTRYWISE
from ._atoms import (
    CONSTANT,
    PARAMETER,
    Axis,
    Use,
    Value,
    fix,
    fresh,
    join,
    joined,
    reshaped,
    value_of,
)

Rule = Callable[[Any, Any, list[Value]], list[list[Axis]]]


def entrywise(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """One result of the shape of the operands; a sum of products is a stream."""
    axes = joined(operands, f"it is cut in several ways ({t.label(eqn)})")
    if eqn.primitive.name in ("add", "add_any") and all(v.product for v in operands):
        for axis in axes:
            for atom in axis:
                atom.root.stream = True
    return [axes]


def each(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """As many results as operands, each of the shape of its own."""
    return [v.axes for v in operands]


def broadcast(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Old axes keep their atoms, new ones get their own."""
    p = eqn.params
    axes = fresh(p["shape"])
    for i, d in enumerate(p["broadcast_dimensions"]):
        axes[d] = operands[0].axes[i] or axes[d]
    return [axes]


def reshape(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Axes are cut and put together."""
    why = f"it does not nest in a reshape ({t.label(eqn)})"
    return [reshaped(operands[0].axes, eqn.outvars[0].aval.shape, why)]


def transpose(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Axes change places."""
    return [[operands[0].axes[d] for d in eqn.params["permutation"]]]


def squeeze(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Axes of one entry go."""
    gone = set(eqn.params["dimensions"])
    return [[axis for i, axis in enumerate(operands[0].axes) if i not in gone]]


def reduce(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """What is summed up, or compared, would have to be across devices."""
    gone = set(eqn.params["axes"])
    for v in operands:
        if v.kind != CONSTANT:
            fix([v.axes[d] for d in gone if d < len(v.axes)], f"it is reduced by {t.label(eqn)}")
    kept = [axis for i, axis in enumerate(operands[0].axes) if i not in gone]
    return [kept for _ in eqn.outvars]


def along(*names: str) -> Rule:
    """Returns the rule of operations that mix the entries of the axes they name."""

    def rule(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
        named = next((eqn.params[n] for n in names if n in eqn.params), -1)
        ndim = len(operands[0].axes)
        mixed = {d % ndim for d in ((named,) if isinstance(named, int) else named)}
        return _mixed(t, eqn, operands, mixed)

    return rule


def changed(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Axes that change their length, or of which a part is taken or replaced, are mixed."""
    arrays = [(v, x.aval.shape) for v, x in zip(operands, eqn.invars, strict=True)]
    whole = [(v, s) for v, s in arrays if len(s) == len(eqn.outvars[0].aval.shape) and s]
    shapes = {s for _, s in whole} | {tuple(x.aval.shape) for x in eqn.outvars}
    mixed = {d for d in range(len(whole[0][1])) if len({s[d] for s in shapes}) > 1}
    if eqn.primitive.name == "concatenate":
        mixed |= {eqn.params["dimension"]}
    return _mixed(t, eqn, [v for v, _ in whole], mixed)


def unstack(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """The entries of one axis become results of their own."""
    d, axes = eqn.params["axis"], operands[0].axes
    fix(axes[d : d + 1], f"its entries are taken apart by {t.label(eqn)}")
    return [[*axes[:d], *axes[d + 1 :]] for _ in eqn.outvars]


def stack(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Operands lie along a new axis."""
    d, shape = eqn.params["axis"], eqn.outvars[0].aval.shape
    axes = joined(operands, f"it is cut in several ways ({t.label(eqn)})")
    new = fresh(shape[d : d + 1], f"operands lie along it ({t.label(eqn)})")
    return [[*axes[:d], *new, *axes[d:]]]


def window(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Pooling mixes the axes that its windows extend over."""
    p = eqn.params
    sizes, steps = p["window_dimensions"], p.get("window_strides", ())
    mixed = {d for d, n in enumerate(sizes) if n > 1}
    mixed |= {d for d, n in enumerate(steps) if n > 1}
    return _mixed(t, eqn, operands[:1], mixed)


def _mixed(t: Any, eqn: Any, operands: list[Value], mixed: set[int]) -> list[list[Axis]]:
    why = f"its entries are mixed by {t.label(eqn)}"
    for v in operands:
        fix([axis for d, axis in enumerate(v.axes) if d in mixed], why)
    kept = [Value([() if d in mixed else axis for d, axis in enumerate(v.axes)]) for v in operands]
    axes = joined(kept, why)
    results = []
    for v in eqn.outvars:
        new = fresh(v.aval.shape, why)
        results.append([new[d] if d in mixed else axis for d, axis in enumerate(axes)])
    return results


def dot(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Shared axes are one; those summed over make a use of a parameter, or are not divided."""
    a, b = operands
    (contract, batch), label = eqn.params["dimension_numbers"], t.label(eqn)
    why = f"it is cut in several ways ({label})"
    for pairs in (zip(*contract, strict=True), zip(*batch, strict=True)):
        for i, j in pairs:
            join(a.axes[i], b.axes[j], why)
    axes = [a.axes[i] for i in batch[0]]
    for v, mine, shared in zip(operands, contract, batch, strict=True):
        axes += [x for d, x in enumerate(v.axes) if d not in mine and d not in shared]
    summed = [[v.axes[d] for d in c] for v, c in zip(operands, contract, strict=True)]
    _product(t, eqn, operands, summed, axes)
    return [axes]


def _product(
    t: Any, eqn: Any, operands: list[Value], reduced: list[list[Axis]], axes: list[Axis]
) -> None:
    kinds = [v.kind for v in operands]
    label = t.label(eqn)
    if kinds.count(PARAMETER) != 1:
        what = "two parameters" if kinds.count(PARAMETER) else "two values"
        fix(reduced[0] + reduced[1], f"{what} are multiplied over it ({label})")
        return
    i = kinds.index(PARAMETER)
    out = value_of(eqn.outvars[0], axes, operands)
    t.uses.append(Use(label, operands[i], reduced[i], operands[1 - i], out, t.times))


def convolution(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Input channels are summed over, in groups or not; positions are mixed."""
    p, (x, w) = eqn.params, operands
    spec, groups, label = p["dimension_numbers"], p["feature_group_count"], t.label(eqn)
    if p["batch_group_count"] != 1:
        return unknown(t, eqn, operands)
    why = f"it is cut in several ways ({label})"
    fix([x.axes[d] for d in spec.lhs_spec[2:]], f"it is a position ({label})")
    fix([w.axes[d] for d in spec.rhs_spec[2:]], f"it is a position ({label})")
    taken, made, summed = (
        x.axes[spec.lhs_spec[1]],
        w.axes[spec.rhs_spec[0]],
        w.axes[spec.rhs_spec[1]],
    )
    if groups > 1:
        shape = eqn.invars[1].aval.shape
        group, taken = reshaped([taken], (groups, shape[spec.rhs_spec[1]]), why)
        sets, rest = reshaped([made], (groups, shape[spec.rhs_spec[0]] // groups), why)
        join(group, sets, why)
        made = (*sets, *rest)
    join(taken, summed, why)
    axes = fresh(eqn.outvars[0].aval.shape, f"it is a position ({label})")
    axes[spec.out_spec[0]], axes[spec.out_spec[1]] = x.axes[spec.lhs_spec[0]], made
    _product(t, eqn, operands, [[taken], [summed]], axes)
    return [axes]


def gather(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Whole rows keep their axes; what is looked up is divided in a parameter only."""
    (x, index, *_), p = operands, eqn.params
    dims, sizes, shape = p["dimension_numbers"], p["slice_sizes"], eqn.invars[0].aval.shape
    batched, label = dims.operand_batching_dims, t.label(eqn)
    gone = {*dims.collapsed_slice_dims, *batched}
    kept = [d for d in range(len(shape)) if d not in gone]
    axes = fresh(eqn.outvars[0].aval.shape, f"it is a part of an axis ({label})")
    for d, o in zip(kept, dims.offset_dims, strict=True):
        if sizes[d] == shape[d]:
            axes[o] = x.axes[d]
        else:
            fix([x.axes[d]], f"a part of it is taken ({label})")
    over = [d for d in range(len(axes)) if d not in dims.offset_dims]
    for d, axis in zip(over, index.axes[:-1], strict=True):
        axes[d] = axis
    for i, j in zip(batched, dims.start_indices_batching_dims, strict=True):
        join(x.axes[i], index.axes[j], f"it is cut in several ways ({label})")
    looked = [x.axes[d] for d in dims.collapsed_slice_dims]
    if x.kind == PARAMETER and index.kind != PARAMETER and not batched:
        out = value_of(eqn.outvars[0], axes, operands)
        t.uses.append(Use(label, x, looked, index, out, t.times, lookup=True))
    else:
        fix(looked, f"entries of it are taken ({label})")
    return [axes]


def unknown(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """Nothing is known of what is not listed."""
    why = f"it is not followed through {t.label(eqn)}"
    for v in operands:
        if v.kind != CONSTANT:
            fix(v.axes, why)
    return [fresh(getattr(v.aval, "shape", ()), why) for v in eqn.outvars]


def made(t: Any, eqn: Any, operands: list[Value]) -> list[list[Axis]]:
    """What is made of nothing, or of a random key, can be divided in any way."""
    return [fresh(v.aval.shape) for v in eqn.outvars]


#: Whether the result of an operation is a sum of products still.
KEEPS = {
    *("add", "add_any", "sub", "broadcast_in_dim", "reshape", "transpose", "squeeze", "copy"),
    *("convert_element_type", "reduce_precision", "name", "sharding_constraint"),
}

RULES: dict[str, Rule] = {
    **dict.fromkeys(ENTRYWISE | ARITHMETIC, entrywise),
    **dict.fromkeys(("erfc", "erf_inv", "tan", "asin", "acos", "atan", "sinh", "cosh"), entrywise),
    **dict.fromkeys(("asinh", "acosh", "atanh", "nextafter", "lgamma", "digamma"), entrywise),
    **dict.fromkeys(("xor", "shift_left", "shift_right_logical", "clz"), entrywise),
    **dict.fromkeys(("shift_right_arithmetic", "real", "imag", "conj", "complex"), entrywise),
    **dict.fromkeys(("optimization_barrier",), each),
    **dict.fromkeys(("iota", "random_bits", "random_wrap", "random_fold_in"), made),
    **dict.fromkeys(("random_split", "random_unwrap", "random_seed", "threefry2x32"), made),
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), reduce),
    **dict.fromkeys(("reduce_and", "reduce_or", "argmax", "argmin", "reduce"), reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), along("axis")),
    "rev": along("dimensions"),
    "sort": along("dimension"),
    "top_k": along("axis"),
    **dict.fromkeys(("slice", "dynamic_slice", "pad", "split"), changed),
    **dict.fromkeys(("dynamic_update_slice", "concatenate"), changed),
    **dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max"), window),
    "reduce_window_min": window,
    "unstack": unstack,
    "stack": stack,
    "dot_general": dot,
    "conv_general_dilated": convolution,
    "gather": gather,
}
