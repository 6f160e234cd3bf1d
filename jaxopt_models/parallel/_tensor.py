"""Tensor parallelism: which axis of which parameter is divided, found in the program itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from .._call import check_function, name_of
from .._options import whole
from .._table import Table
from ._atom_walk import Followed, axes_of, axis_of
from ._atoms import Use, Value, flat
from ._rules import Rules, bytes_each, devices_of, shortened
from ._spaces import Space, chosen, gathers, made_by, refused, spaces_of


def tensor(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    size: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    smallest: int = 1 << 16,
    sequence: int | None = None,
) -> Rules:
    r"""Finds how the parameters of a function are divided so that products are computed apart.

    The program of ``fn`` is traced, and axes that are one and the same are found: the heads of an
    attention, the hidden units of a feed-forward layer, the channels between two convolutions
    with their batch norm, the state of an LSTM, the words of a table. Such a space of size `n`
    is divided over `k` devices where nothing between needs all of it:

    .. math:: y = f(x A) B = \sum_{i=1}^{k} f(x A_{:,i}) B_{i,:}

    What makes it (`A`) is divided by columns, its bias too, what takes it in (`B`) by rows, and
    the only transfer is the sum, Megatron's layout. A space is left whole that a norm reduces,
    that is returned, that does not divide, or that meets another in one array. Of those that
    meet, the set with the most bytes is divided; streams that layers add to come last. A kernel
    from a space to itself (a recurrent one) is divided by columns, its input gathered. A table
    that is looked up is divided by features, its lookups gathered, or else by rows, its lookups
    summed; pass ``rules.inside`` to :func:`constrain` to keep the first from spreading.

    Args:
      fn: function of `(params, ...)`, as :func:`jaxopt_models.functional` returns it.
      params: its parameters, dense or compressed; of compressed ones no group or packed word is
        cut. Shapes are enough.
      *args: its other arguments; shapes are enough.
      size: number of devices that divide a space; instead of ``mesh``.
      mesh: the devices.
      axis: name of the mesh axis in the rules.
      smallest: spaces and tables with fewer entries are not divided.
      sequence: an axis of activations, 1 in `[B, T, width]`, that is divided between the layers:
        each sum becomes a reduce-scatter and an all-gather stands before the next layer divided by
        columns, of the same bytes, and what is between is computed and kept once.

    Returns:
      Rules for every parameter, the last one for all that stay whole. ``rules.table`` says for
      each parameter how it is divided or why it is not, ``rules.collectives`` which transfers a
      call needs (on a CPU XLA does a reduce-scatter as an all-reduce), ``rules.inside`` what
      :func:`constrain` should pin.

    Raises:
      TypeError: if ``fn`` is no function, or for a mesh that is none.
      ValueError: if not exactly one of ``size`` and ``mesh`` is given, ``axis`` is none of the
        mesh's, or no activation that travels has the axis ``sequence``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.ones((1, 8)), "down": jnp.ones((8, 4))}
      >>> rules = parallel.tensor(fn, params, jnp.ones((2, 4)), size=2, smallest=0)
      >>> for rule in rules: print(rule)
      ('bias', P(None, 'model'))
      ('down', P('model', None))
      ('up', P(None, 'model'))
      ('.*', P())
      >>> rules.collectives[0]["kind"]
      'all-reduce'

    References:
      Shoeybi et al., `Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
      Parallelism <https://arxiv.org/abs/1909.08053>`_, 2019
      Korthikanti et al., `Reducing Activation Recomputation in Large Transformer Models
      <https://arxiv.org/abs/2205.05198>`_, 2022
    """
    check_function(fn, "tensor")
    size = devices_of(size, mesh, axis, "tensor")
    smallest = whole(smallest, "tensor: smallest", least=0)
    axes = axes_of(fn, params, args, who="tensor")
    spaces = spaces_of(axes, axis, size)
    features = _features(axes, axis, size)
    for space in spaces:
        # A gather sends half of what a sum does, and needs no mask.
        if (
            space.uses
            and all(u.lookup for u in space.uses)
            and _only_looked_up(axes, space, features)
        ):
            space.atom.fix("the features of its table are divided instead")
    taken = chosen(spaces, smallest)
    divided: dict[int, tuple[int, str]] = {}
    notes: dict[int, str] = {}
    kinds: dict[Use, str] = {}
    for space in taken:
        made = set(made_by(axes, space))
        for i, d in space.members.items():
            x = axes.parameters[i].value
            if why := refused(x, d, axis, size):
                notes[i] = f"axis {d}: {why}"
            else:
                divided[i] = d, "made apart" if i in made else "summed over devices"
        kinds |= {u: "all-gather" if gathers(u, space) else "all-reduce" for u in space.uses}
    inside = {}
    for i, d in features.items():
        if i not in divided and axes.parameters[i].value.size >= smallest:
            divided[i] = d, "features, gathered after each lookup"
            inside |= _whole_lookups(axes, i, kinds)
    if sequence is not None:
        along = whole(sequence, "tensor: sequence", least=0)
        between = _along_sequence(axes, taken, kinds, axis, along)
        if not between:
            raise ValueError(
                f"tensor: sequence={along} divides nothing: there is no lookup, sum or gather of "
                f"an array with axis {along} before its last; give the axis of the positions, 1 in "
                "[B, T, width], and a smallest= that lets parameters be divided"
            )
        inside |= between
    table = _table(axes, divided, notes, axis, size, name_of(fn))
    specs = {p.path: _spec(p.value, divided.get(i), axis) for i, p in enumerate(axes.parameters)}
    columns = ("operation", "kind", "parameter", "bytes", "times")
    transfers = _transfers([(u, kinds[u]) for u in axes.uses if u in kinds])
    collectives = Table(columns, transfers, title=f"transfers of {name_of(fn)} over {axis!r}")
    return Rules(
        [*shortened(specs), (".*", PartitionSpec())],
        table=table,
        collectives=collectives,
        inside=inside,
    )


def _transfers(uses: Sequence[tuple[Use, str]]) -> list[tuple[Any, ...]]:
    """Returns a row for each; a value that several products read is gathered once."""
    rows: dict[int, list[Any]] = {}
    for use, kind in uses:
        reads = kind == "all-gather" and not use.lookup
        moved = use.given if reads else use.out
        paths = ", ".join(sorted(use.kernel.paths))
        row = rows.setdefault(id(moved), [use.label, kind, "", moved.bytes, use.times])
        row[2] += (", " if row[2] else "") + paths
    return list(map(tuple, rows.values()))


def _uses(axes: Followed, i: int) -> list[Use]:
    return [u for u in axes.uses if axes.parameters[i].path in u.kernel.paths]


def _features(axes: Followed, name: str, size: int) -> dict[int, int]:
    """Returns tables that are looked up, and which of their other axes can be divided."""
    found = {}
    for i, (p, value) in enumerate(zip(axes.parameters, axes.values, strict=True)):
        uses = _uses(axes, i)
        rows = {d for u in uses if u.lookup for d in axis_of(value, u.reduced)}
        can = [
            d
            for d in range(len(p.value.shape))
            if rows
            and d not in rows
            and p.value.shape[d] > 1
            and not refused(p.value, d, name, size)
            and all(u.lookup or axis_of(value, u.reduced) == [d] for u in uses)
        ]
        if can:
            found[i] = max(can, key=lambda d: p.value.shape[d])
    return found


def _whole_lookups(axes: Followed, i: int, kinds: dict[Use, str]) -> dict[str, PartitionSpec]:
    """Notes what a table that is divided by features sends, and where its lookups are whole."""
    uses = _uses(axes, i)
    kinds |= {u: "all-gather" if u.lookup else "all-reduce" for u in uses}
    ndim = next(len(u.out.axes) for u in uses if u.lookup)
    free = [PartitionSpec.UNCONSTRAINED] * (ndim - 1)
    return {f"path:{axes.parameters[i].path}": PartitionSpec(*free, None)}


def _only_looked_up(axes: Followed, space: Space, features: dict[int, int]) -> bool:
    """Says whether a space is the rows of tables that features can divide, and of nothing else."""
    tables = all(i in features and all(u.lookup for u in _uses(axes, i)) for i in space.members)
    return tables and bool(space.uses) and all(u.lookup for u in space.uses)


def _along_sequence(
    axes: Followed,
    taken: Sequence[Space],
    kinds: dict[Use, str],
    name: str,
    axis: int,
) -> dict[str, PartitionSpec]:
    """Divides what is summed along an axis, and brings together what products by columns read."""
    free = PartitionSpec.UNCONSTRAINED
    atoms = {space.atom for space in taken}
    found = {}
    for use in axes.uses:
        path, ndim = next(iter(use.kernel.paths), ""), len(use.out.axes)
        outer = {flat(a)[0] for a in use.kernel.axes if a}
        if len(use.kernel.paths) != 1 or not axis < ndim - 1:
            continue
        if use.lookup:  # or the lookup itself would be divided, and its indices sent
            found[f"path:{path}"] = PartitionSpec(*[free] * axis, *[None] * (ndim - axis))
        elif kinds.get(use) == "all-reduce":
            spec = [free] * axis + [name] + [free] * (ndim - axis - 2) + [None]
            found[f"path:{path}"] = PartitionSpec(*spec)
            kinds[use] = "reduce-scatter"
        elif outer & atoms and axis < len(use.given.axes) - 1:
            rest = len(use.given.axes) - axis - 1
            found[f"input:{path}"] = PartitionSpec(*[free] * axis, None, *[free] * rest)
            kinds[use] = "all-gather"
    return found


def _spec(x: Any, found: tuple[int, str] | None, name: str) -> PartitionSpec:
    if found is None:
        return PartitionSpec()
    return PartitionSpec(*[name if d == found[0] else None for d in range(len(x.shape))])


def _table(
    axes: Followed,
    divided: dict[int, tuple[int, str]],
    notes: dict[int, str],
    name: str,
    size: int,
    fn: str,
) -> Table:
    rows, total, each = [], 0, 0
    for i, (p, value) in enumerate(zip(axes.parameters, axes.values, strict=True)):
        found = divided.get(i)
        note = found[1] if found else notes.get(i) or _because(p.value, value)
        spec = _spec(p.value, found, name)
        stored, mine = (bytes_each(p.value, s, {name: size}) for s in (PartitionSpec(), spec))
        total, each = total + stored, each + mine
        rows.append((p.path, str(list(p.value.shape)), _shown(spec), stored, mine, note))
    columns = ("path", "shape", "divided", "bytes", "a device", "note")
    title = f"{fn}: {size} devices along {name!r} hold {each:,} of {total:,} bytes each"
    return Table(columns, rows, title=title, data={"total": total, "each": each})


def _because(x: Any, value: Value) -> str:
    """Says why no axis of a parameter is divided, each reason once."""
    by_why: dict[str, list[str]] = {}
    for d, axis in enumerate(value.axes):
        atoms = flat(axis)
        for atom in atoms:
            part = f", its {atom.size}" if len(atoms) > 1 else ""
            by_why.setdefault(atom.why, []).append(f"axis {d} of {x.shape[d]}{part}")
    found = [f"{' and '.join(where)}: {why}" for why, where in by_why.items() if why]
    return "; ".join(found) or "it has no axis to divide"


def _shown(spec: PartitionSpec) -> str:
    return str(tuple(spec)) if any(spec) else ""
