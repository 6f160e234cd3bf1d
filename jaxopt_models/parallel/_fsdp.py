"""Fully sharded parameters: each is divided over the devices that share the data."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh, PartitionSpec

from .._divided import full_spec, mesh_axes, names_of
from .._encoded import is_encoded
from .._options import whole
from .._paths import flatten
from .._table import Table
from ._dense import dense_specs
from ._rules import Rules, bytes_each, devices_of, shortened, why_not


def fsdp(
    params: Any,
    *,
    size: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
    rules: Any = (),
    smallest: int = 1 << 16,
) -> Rules:
    r"""Divides every large parameter along its longest axis that divides.

    A device then holds one part in `k` of the parameters, their gradients and what an optimizer
    keeps of them; :func:`gathered` brings a layer together where it is used. Rules of another
    mesh axis come first, from :func:`tensor`, and are kept.

    Args:
      params: the parameters, dense or compressed; of compressed ones no group or packed word is
        cut. Shapes are enough. Of parameters with more than two axes one of the last two is
        divided where it can be: the first may be the layers of a loop.
      size: number of devices; instead of ``mesh``. Without a mesh the size of other axes is not
        known, and parameters that ``rules`` divide are divided along another axis of theirs.
      mesh: the devices.
      axis: name of the mesh axis in the rules.
      rules: how parameters are divided over other mesh axes, as for :func:`shardings`.
      smallest: parameters with fewer entries are not divided further.

    Returns:
      Rules for every parameter; ``rules.table`` says for each how it is divided or why it is not.

    Raises:
      TypeError: for a mesh, or rules, that are none.
      ValueError: if not exactly one of ``size`` and ``mesh`` is given, or ``axis`` is none of the
        mesh's or is used by ``rules``; if a rule divides nothing, or a parameter cannot be divided
        as it says.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> rules = parallel.fsdp({"a": jnp.ones((6, 4)), "b": jnp.ones(3)}, size=2, smallest=0)
      >>> rules[0], rules.table[1]["note"]
      (('a', P('data', None)), '3 does not divide by 2')

    References:
      Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
      <https://arxiv.org/abs/1910.02054>`_, 2020
    """
    count = devices_of(size, mesh, axis, "fsdp")
    smallest = whole(smallest, "fsdp: smallest", least=0)
    counts = {axis: count} if mesh is None else dict(mesh.shape)
    before = dense_specs(params, mesh, rules, who="fsdp")
    specs: dict[str, PartitionSpec] = {}
    rows, total, each = [], 0, 0
    for p in flatten(params)[0]:
        x = p.value
        if not (is_encoded(x) or hasattr(x, "dtype")):
            continue
        given = PartitionSpec(*full_spec(before[p.path], len(x.shape)))
        if axis in mesh_axes(given):
            raise ValueError(f"fsdp: rules divide {p.path} along {axis!r} already: {given}")
        if mesh_axes(given) and (why := why_not(x, given, counts)):
            raise ValueError(f"fsdp: rules divide {p.path} by {given}: {why}")
        spec, note = _divided(x, given, axis, counts, smallest)
        specs[p.path] = spec
        stored, mine = bytes_each(x, PartitionSpec(), counts), bytes_each(x, spec, counts)
        total, each = total + stored, each + mine
        shown = str(tuple(spec)) if any(spec) else ""
        rows.append((p.path, str(list(x.shape)), shown, stored, mine, note))
    columns = ("path", "shape", "divided", "bytes", "a device", "note")
    title = f"fsdp: {count} devices along {axis!r}: {each:,} of {total:,} bytes each"
    table = Table(columns, rows, title=title, data={"total": total, "each": each})
    inside = getattr(rules, "inside", {})
    return Rules([*shortened(specs), (".*", PartitionSpec())], table=table, inside=inside)


def _divided(
    x: Any, given: PartitionSpec, axis: str, counts: dict[str, int], smallest: int
) -> tuple[PartitionSpec, str]:
    """Returns a partition with one more mesh axis, or why it stays as it is."""
    if x.size < smallest:
        return given, f"fewer than smallest={smallest:,} entries"
    shape = tuple(x.shape)
    free = [d for d in range(len(shape)) if given[d] is None and shape[d] > 1]
    # Without a mesh nothing is known of the axes that are divided already.
    both = [d for d in range(len(shape)) if given[d] is not None and len(counts) > 1]
    late = [d for d in free if d >= len(shape) - 2]
    early = [d for d in free if d < len(shape) - 2]
    order = [d for group in (late, early, both) for d in sorted(group, key=lambda d: -shape[d])]
    whys = []
    for d in order:
        names = names_of(given[d])
        entry = (*names, axis) if names else axis
        spec = PartitionSpec(*given[:d], entry, *given[d + 1 :])
        why = why_not(x, spec, counts)
        if not why:
            return spec, ""
        whys.append(why)
    return given, "; ".join(dict.fromkeys(whys)) or "it has no axis to divide"
