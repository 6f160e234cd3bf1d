"""The table of what a recipe will do, and of the speed to expect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._axes import Axes
from ._call import check_args, check_function
from ._compress import compress, encode
from ._device import Limits, limits
from ._encoded import Masked, is_encoded
from ._pack import pack
from ._paths import flatten
from ._recipe import Decision, Rule, decide
from ._report import dense_bits, in_memory
from ._speed import COLUMNS, Speed, measured, speed_of
from ._table import Table


def plan(
    params: Any,
    recipe: Sequence[Rule],
    *,
    stats: Any = None,
    key: jax.Array | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    measure: bool = False,
) -> Table:
    r"""Says what a recipe would do to each parameter, without doing it.

    With ``fn`` it also says what speed to expect on the default device, once the parameters are
    packed and used through :func:`accelerate`. A use of a parameter takes at least

    .. math:: t = \max(\text{bytes} / \text{bandwidth}, \text{operations} / \text{rate})

    by limits of the device that are measured then, once in a process. Bytes are those of the
    parameter, dense or as it is packed (of a lookup, the rows that it finds), and of the input and
    the output of a product; where a parameter is rebuilt before a product, those as it is stored
    and twice those of the dense one. Entrywise operations, norms and what each call costs by
    itself are not counted, so a whole function gains less; where XLA stays far from the limits, as
    with depthwise convolutions on a CPU, it gains more.

    Args:
      params: tree of arrays or of `jax.ShapeDtypeStruct`; nothing is computed on them.
      recipe: rules, as for :func:`compress`.
      stats: as for :func:`compress`.
      key: as for :func:`compress`.
      fn: function of the parameters and ``args``.
      args: tuple of all else that it takes; shapes are enough.
      measure: compress after all, and time ``fn`` with both. Then ``params`` and ``args`` are
        arrays.

    Returns:
      A table: path, shape, axes (`in`/`out`/`stack` for each axis), encoder, bits an entry
      in memory, and why a leaf is left alone. With ``fn`` also: how often a parameter is used and
      the rows that it meets each time; the kernel that runs, or ``"rebuilt"`` and in the note why
      none does; multiply-adds; bytes and microseconds before and after; whether ``"memory"`` or
      ``"arithmetic"`` bounds them; the gain, before over after. Notes sum up, and so do
      ``data["expected"]`` and ``data["measured"]``: seconds before and after.

    Raises:
      TypeError: if ``fn`` is no function, or ``args`` no tuple.
      ValueError: for what :func:`compress` raises, NaN excepted; for ``args`` or ``measure``
        without ``fn``; if no parameter reaches the program of ``fn``; or for ``measure`` where an
        array is only a shape.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
      >>> recipe = [jom.Rule("kernel", jom.quant.Int(bits=4))]
      >>> [(row["path"], row["axes"], row["bits"]) for row in jom.plan(params, recipe)]
      [('bias', '', 32.0), ('kernel', 'in out', 4.5)]
      >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> row = jom.plan(params, recipe, fn=fn, args=(jnp.ones((1, 64)),))[1]
      >>> row["uses"], row["rows"], row["multiply-adds"], row["bytes before"]
      (1, 1, 512, 2336)

    References:
      Williams et al., `Roofline: An Insightful Visual Performance Model for Multicore
      Architectures <https://doi.org/10.1145/1498765.1498785>`_, 2009
    """
    leaves, unflatten = flatten(params)
    if not leaves:
        raise ValueError("plan: the tree has no leaves")
    args = _checked(params, fn, args, measure)
    rows, values = [], []
    before = after = 0
    for d in decide(leaves, recipe, who="plan"):
        p = d.parameter
        shape = tuple(getattr(p.value, "shape", ()))
        leaf, axes, note = p.value, "", p.reason and f"not a parameter: {p.reason}"
        if d.encoder is not None and d.rule is not None:
            given = d.rule.axes or getattr((stats or {}).get(p.path), "axes", None)
            leaf, axes = _abstract(d, stats, key), _roles(shape, given)
            if leaf.dtype != p.value.dtype:
                note = f"{p.value.dtype} is read as {leaf.dtype}: JAX_ENABLE_X64 is not set"
        elif not note:
            note = "kept dense by the recipe" if d.rule else "no rule matches"
        new = leaf.storage_bits() if is_encoded(leaf) else dense_bits(leaf)
        before, after = before + dense_bits(p.value), after + new
        size = max(1, math.prod(shape))
        rows.append((p.path, list(shape), axes, repr(d.encoder), new / size, note))
        values.append(leaf)
    columns, notes = (
        ("path", "shape", "axes", "encoder", "bits", "note"),
        [in_memory(before, after)],
    )
    if fn is None:
        return Table(columns, rows, title="plan", notes=notes)
    if measure:
        small = pack(compress(params, recipe, stats=stats, key=key))
    else:
        small = unflatten([_packed(leaf) for leaf in values])
    device = limits()
    speed = speed_of(fn, small, args, device)
    times = measured(fn, params, small, args) if measure else None
    rows = [
        (*row[:-1], *speed.cells(row[0]), _note(row[-1], speed, row[0], hidden, device))
        for row, hidden in zip(rows, [not measure and _has_mask(x) for x in values], strict=True)
    ]
    notes += [f"limits of {device}", *_sums(speed, times)]
    expected = [cost.seconds for cost in speed.total()]
    data = {"limits": dataclasses.asdict(device), "expected": expected, "measured": times}
    return Table((*columns[:-1], *COLUMNS, "note"), rows, title="plan", notes=notes, data=data)


def _checked(params: Any, fn: Any, args: Any, measure: bool) -> tuple[Any, ...]:
    """Returns the arguments of the function, or raises if what was given does not go together."""
    args = check_args(args, "plan")
    if fn is None:
        for name, value in (("args", args), ("measure", measure)):
            if value:
                raise ValueError(f"plan: {name} says nothing without a function; give fn=, too")
        return args
    check_function(fn, "plan")
    if measure:
        for where, tree in (("params", params), ("args", args)):
            for p in flatten(tree)[0]:
                kinds = (jax.ShapeDtypeStruct, jax.core.Tracer)
                if any(isinstance(part, kinds) for part in jax.tree.leaves(p.value)):
                    raise ValueError(
                        f"plan: measure=True runs fn, and {p.path!r} in {where} is "
                        f"{type(p.value).__name__}, no array; give arrays, or leave measure out"
                    )
    return args


def _abstract(d: Decision, stats: Any, key: jax.Array | None) -> Any:
    value = d.parameter.value
    if not is_encoded(value):
        value = jax.ShapeDtypeStruct(value.shape, _seen(value))

    def encoded(w: Any) -> Any:
        parameter = dataclasses.replace(d.parameter, value=w)
        return encode(dataclasses.replace(d, parameter=parameter), stats=stats, key=key, who="plan")

    return jax.eval_shape(encoded, value)


def _seen(x: Any) -> Any:
    """Returns the type that JAX gives an array: without x64 `float64` is read as `float32`."""
    return jax.dtypes.canonicalize_dtype(x.dtype)


def _packed(x: Any) -> Any:
    return jax.eval_shape(pack, x) if is_encoded(x) else x


def _roles(shape: tuple[int, ...], axes: Axes | None) -> str:
    resolved = (axes or Axes()).resolve(len(shape))
    core = ["out" if a in resolved.out else "in" for a in range(len(shape) - resolved.stack)]
    return " ".join(["stack"] * resolved.stack + core)


# ------------------------------------------------------------------ what is said of the speed


def _note(note: str, speed: Speed, path: str, hidden: bool, device: Limits) -> str:
    """Returns a note with what there is to say of the speed; ``hidden`` if a mask is not known."""
    why = speed.why.get(path, "")
    if why and device.platform == "tpu":
        why = "XLA on a TPU reads it as it is stored"
    elif why and hidden:
        why += "; which kernel there is depends on what the mask keeps: measure=True looks"
    return "; ".join(filter(None, (note, why, *speed.notes(path))))


def _has_mask(x: Any) -> bool:
    return is_encoded(x) and (isinstance(x, Masked) or any(map(_has_mask, x.parts().values())))


def _sums(speed: Speed, times: tuple[float, float] | None) -> list[str]:
    between = sum(u.multiply_adds for u in speed.uses.get(None, []))
    before, after = speed.total()
    lines = [
        f"expected: {_change(before.seconds, after.seconds)}; both with {between:,} multiply-adds "
        "between values that are no parameters",
        "not counted: entrywise operations, norms, and what each call costs by itself",
    ]
    if times:
        lines.append(f"measured: {_change(*times)}; medians of calls in turn")
    return lines


def _change(before: float, after: float) -> str:
    gain = f", {before / after:.2f} times faster" if after else ""
    return f"{_microseconds(before)} -> {_microseconds(after)} us a call{gain}"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.3g}"
