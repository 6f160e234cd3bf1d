"""Tables before and after: what a recipe will do, and what it did."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Axes
from ._bits import array_bits
from ._compress import encode
from ._encoded import Encoded, is_encoded, rebuilt
from ._paths import Parameter, flatten
from ._recipe import Decision, Rule, decide
from ._table import Table


def plan(
    params: Any,
    recipe: Sequence[Rule],
    *,
    stats: Any = None,
    key: jax.Array | None = None,
) -> Table:
    """Says what a recipe would do to each parameter, without doing it.

    Args:
      params: tree of arrays or of `jax.ShapeDtypeStruct`; nothing is computed on them.
      recipe: rules, as for :func:`compress`.
      stats: as for :func:`compress`.
      key: as for :func:`compress`.

    Returns:
      A table: path, shape, axes (`in`/`out`/`stack` for each axis), encoder, bits an entry
      in memory, and why a leaf is left alone.

    Raises:
      ValueError: for what :func:`compress` raises, NaN excepted.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
      >>> t = jom.plan(params, [jom.Rule("kernel", jom.quant.Int(bits=4))])
      >>> [(row["path"], row["axes"], row["bits"]) for row in t]
      [('bias', '', 32.0), ('kernel', 'in out', 4.5)]
    """
    leaves, _ = flatten(params)
    rows = []
    before = after = 0
    for d in decide(leaves, recipe, who="plan"):
        p = d.parameter
        shape = tuple(getattr(p.value, "shape", ()))
        old = _dense_bits(p.value)
        new, axes, note = _stored_bits(p.value), "", p.reason and f"not a parameter: {p.reason}"
        if d.encoder is not None and d.rule is not None:
            given = d.rule.axes or getattr((stats or {}).get(p.path), "axes", None)
            leaf = _abstract(d, stats, key)
            new, axes = leaf.storage_bits(), _roles(shape, given)
            if leaf.dtype != p.value.dtype:
                note = f"{p.value.dtype} is read as {leaf.dtype}: JAX_ENABLE_X64 is not set"
        elif not note:
            note = "kept dense by the recipe" if d.rule else "no rule matches"
        before, after = before + old, after + new
        size = max(1, math.prod(shape))
        rows.append((p.path, list(shape), axes, repr(d.encoder), new / size, note))
    if not rows:
        raise ValueError("plan: the tree has no leaves")
    columns = ("path", "shape", "axes", "encoder", "bits", "note")
    return Table(columns, rows, title="plan", notes=[_total(before, after)])


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


def _roles(shape: tuple[int, ...], axes: Axes | None) -> str:
    resolved = (axes or Axes()).resolve(len(shape))
    core = ["out" if a in resolved.out else "in" for a in range(len(shape) - resolved.stack)]
    return " ".join(["stack"] * resolved.stack + core)


def _dense_bits(x: Any) -> int:
    if is_encoded(x):
        return x.size * array_bits(jax.ShapeDtypeStruct((), x.dtype))
    return array_bits(x) if hasattr(x, "dtype") else 0


def _stored_bits(x: Any) -> int:
    return x.storage_bits() if is_encoded(x) else _dense_bits(x)


def report(params: Any, small: Any, *, types: Sequence[type[Encoded]] = ()) -> Table:
    r"""Says what became of each parameter: kind, bytes by part, error.

    Args:
      params: the dense tree, or ``None`` where it is gone (no errors then).
      small: the compressed tree, or the path of an artifact.
      types: your own leaf classes that a file may name.

    Returns:
      For a tree: path, kind, shape, bytes in memory by part, bits an entry, and the
      relative error :math:`\|w - \hat w\|_2 / \|w\|_2`. For a file: what it holds by
      section, in bytes that add up to its length.

    Raises:
      ValueError: if the trees differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> small = jom.compress(params, [jom.Rule("kernel", jom.quant.Int(bits=8))])
      >>> jom.report(params, small)[0]["parts"]
      'codes 16, scale 16'
    """
    if isinstance(small, (str, os.PathLike)):
        from . import artifact

        table = artifact.inspect(small, types=types)
        if params is None:
            return table
        small = artifact.load(small, types=types)
    leaves, _ = flatten(small)
    dense = {} if params is None else match_paths(params, leaves, who="report")
    rows = []
    before = after = 0
    for p in leaves:
        x = p.value
        if not hasattr(x, "dtype"):
            continue
        bits = x.bits_by_part() if is_encoded(x) else {"dense": array_bits(x)}
        total = sum(bits.values())
        before, after = before + _dense_bits(x), after + total
        rows.append(
            (
                p.path,
                x.kind() if is_encoded(x) else "dense",
                list(x.shape),
                ", ".join(f"{k} {-(-v // 8):,}" for k, v in bits.items()),
                total / max(1, math.prod(x.shape)),
                None if params is None else _error(dense[p.path], x),
                p.reason and f"not a parameter: {p.reason}",
            )
        )
    columns = ("path", "kind", "shape", "parts", "bits", "error", "note")
    return Table(columns, rows, title="report", notes=[_total(before, after)])


def _total(before: int, after: int) -> str:
    ratio = f" ({before / after:.2f}x)" if after else ""
    return f"in memory: {before / 8:,.0f} -> {after / 8:,.0f} bytes{ratio}"


def match_paths(params: Any, leaves: Sequence[Parameter], *, who: str) -> dict[str, Any]:
    """Returns the arrays of a dense tree by path, checked against the leaves of another."""
    dense = {p.path: p.value for p in flatten(params)[0]}
    here = {p.path: p.value for p in leaves}
    if set(dense) != set(here):
        only = sorted(set(dense) - set(here)), sorted(set(here) - set(dense))
        raise ValueError(
            f"{who}: the trees differ: only dense {only[0]}, only compressed {only[1]}"
        )
    for path, x in here.items():
        if hasattr(x, "shape") and tuple(x.shape) != tuple(dense[path].shape):
            raise ValueError(f"{who}: {path} is {x.shape} compressed, {dense[path].shape} dense")
    return dense


def _error(w: Any, x: Any) -> float | None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    got = jnp.asarray(rebuilt(x)).astype(jnp.float32)
    want = jnp.asarray(rebuilt(w)).astype(jnp.float32)
    norm = jnp.linalg.norm(want.reshape(-1))
    miss = jnp.linalg.norm((want - got).reshape(-1))
    return float(jnp.where(norm > 0, miss / jnp.where(norm > 0, norm, 1), miss))
