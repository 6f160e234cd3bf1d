"""Statistics of the input of every parameter."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Axes
from ._calibrating import Calibrating, Ledger, States, merged, neutral, statistic
from ._call import Frame, check_batch, check_function, name_of, no_batch, on_data, trace
from ._encoded import is_encoded
from ._options import whole
from ._paths import flatten
from ._progress import bar
from ._recipe import Rule, decide
from ._roles import Roles
from ._statistics import STATISTICS
from ._table import Table


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["states", "others"],
    meta_fields=["axes", "groups"],
)
@dataclasses.dataclass(frozen=True)
class Stats:
    """What was seen at the input of one parameter; made by :func:`calibrate`.

    Each statistic is an attribute: ``absmax``, ``l2``, ``mean`` `[*stack, *groups, rows]` with a
    row for each entry of the *in* axes, ``minmax`` with ``min`` and ``max`` of that shape,
    ``average`` with those of all rows, averaged over batches, `[*stack, *groups]`, ``gram``
    `[*stack, *groups, rows, rows]`, ``histogram`` of all rows with ``counts``
    `[*stack, *groups, 4096]` and ``edges``; and always ``count``, the number of samples, `float32`
    `[*stack, *groups]`, 0 where none was seen.

    Args:
      states: state of each statistic.
      axes: roles of the axes of the parameter.
      groups: `(axis of the core, count)` for axes along which inputs differ: the output axis of
        a grouped convolution.
      others: the same for uses in which the axes have other roles, as of a tied embedding.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn, params = lambda p, x: x @ p["w"].T, {"w": jnp.ones((3, 2))}
      >>> stats = jom.calibrate(fn, params, [(jnp.array([[1.0, -4.0]]),)], ["l2"])["w"]
      >>> stats.axes, stats.names, stats.l2, stats.count
      (Axes(out=(0,), stack=0), ('l2',), Array([1., 4.], dtype=float32), Array(1., dtype=float32))
    """

    states: dict[str, Any]
    axes: Axes
    groups: tuple[tuple[int, int], ...] = ()
    others: tuple[Stats, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the statistics that were asked for."""
        return tuple(n for n in self.states if n in STATISTICS)

    @property
    def count(self) -> jax.Array:
        """Number of samples."""
        return statistic("count").result(self.states["count"], None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.states:
            raise AttributeError(f"Stats has no {name!r}; it has {sorted(self.names)}")
        return statistic(name).result(self.states[name], self.count)


@jax.tree_util.register_pytree_with_keys_class
class Calibration(dict[str, Stats]):
    """``{path: Stats}``, a pytree; printed it is a table.

    Args:
      found: statistics by path.
      missing: parameters without, and why.
    """

    def __init__(self, found: dict[str, Stats], missing: dict[str, str]):
        super().__init__(found)
        self.missing = missing

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Takes the statistics apart from the paths, and from what is missing."""
        children = [(jax.tree_util.DictKey(path), stats) for path, stats in self.items()]
        return children, (tuple(self), tuple(self.missing.items()))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Calibration:
        """Undoes :meth:`tree_flatten_with_keys`."""
        paths, missing = static
        return cls(dict(zip(paths, children, strict=True)), dict(missing))

    def table(self) -> Table:
        """Returns a row for each parameter: its axes, samples, and statistics."""
        rows = []
        for path, s in self.items():
            roles_ = f"out {list(s.axes.out or ())}" + (
                f", {s.axes.stack} stack" * (s.axes.stack > 0)
            )
            low, high = int(jnp.min(s.count)), int(jnp.max(s.count))
            seen = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            rows.append((path, roles_, seen, ", ".join(s.names), "" if low else "not all were hit"))
        rows += [(path, "", "", "", why) for path, why in self.missing.items()]
        return Table(("path", "axes", "samples", "statistics", "note"), rows, title="calibration")

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    what: Sequence[str] | Sequence[Rule] = ("absmax",),
    *,
    gram_rows: int = 8192,
    progress: bool = False,
) -> Calibration:
    r"""Runs data through a model and collects statistics at the input of every parameter.

    A parameter that is multiplied with an input, :math:`y = x W` in any form, sees the rows of
    :math:`x`: of a convolution the patches, zero padding included; of a lookup one-hot rows.
    Several uses add up, over all iterations of loops, branches taken, and devices of a sharded
    batch; stacked layers have statistics of their own. (The condition of a ``while`` loop counts
    as often as its body.)

    Args:
      fn: function of `(params, ...)`; it is not changed, and needs no hooks.
      params: its parameters, compressed or not.
      batches: tuples of the arguments after ``params``. One compilation serves all batches of
        the same shapes.
      what: names of statistics, of ``absmax``, ``minmax``, ``average``, ``l2``, ``mean``,
        ``histogram`` and ``gram``, or a recipe, for which each parameter gets what its encoder
        needs.
      gram_rows: parameters with more rows get no ``gram``, which is `[rows, rows]`; they are
        listed in ``missing``.
      progress: show a bar, a step for each batch.

    Returns:
      ``{path: Stats}``, with the attribute ``missing``: parameters that meet no input, or have
      another use that could not be read, and why.

    Raises:
      TypeError: if a batch is no tuple, or an option has another type.
      ValueError: if there is no batch, a statistic is unknown, a parameter with ``needs`` in the
        recipe meets no input, or an input is NaN or Inf.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> stats = jom.calibrate(fn, params, [(jnp.ones((8, 3)),), (-2 * jnp.ones((8, 3)),)])
      >>> stats["a"].absmax, stats["a"].count
      (Array([2., 2., 2.], dtype=float32), Array(16., dtype=float32))
    """
    check_function(fn, "calibrate")
    gram_rows = whole(gram_rows, "calibrate: gram_rows")
    if gram_rows < 0:
        raise ValueError(f"calibrate: gram_rows={gram_rows} is a number of rows, 0 or more")
    wanted, recipe = _wanted(params, what)
    ledger = Ledger()
    kept: Any = None

    add = adding(fn, wanted, gram_rows, ledger)
    compiled = jax.jit(add, static_argnums=0, donate_argnums=2)
    total = len(batches) if hasattr(batches, "__len__") else None
    with bar("calibrate", total, show=progress) as step:
        for batch in batches:
            frame, arrays = on_data(params, check_batch(batch, "calibrate"), "calibrate")
            if kept is None:
                shapes = jax.eval_shape(functools.partial(add, frame), arrays, None)
                empty = Calibrating(wanted=wanted, gram_rows=gram_rows, ledger=ledger)
                kept = {k: empty.zero(e) for k, e in shapes.items()}
            kept = (compiled if frame.hashable() else add)(frame, arrays, kept)
            step("")
    if kept is None:
        raise no_batch("calibrate")
    return assembled(params, kept, ledger, recipe, name_of(fn))


def adding(
    fn: Callable[..., Any], wanted: Any, gram_rows: int, ledger: Ledger
) -> Callable[[Frame, list[Any], Any], Any]:
    """Returns what :func:`calibrate` does with each batch: `(frame, arrays, total) -> total`.

    Args:
      fn: the function.
      wanted: from a path to the names of its statistics.
      gram_rows: most rows of a gram.
      ledger: where uses get their names.
    """

    def add(frame: Frame, arrays: list[Any], total: Any) -> Any:
        program = trace(fn, frame, arrays, who="calibrate", every=True)
        walk = Calibrating(wanted=wanted, gram_rows=gram_rows, ledger=ledger)
        walk.run(program.jaxpr, program.consts, program.operands)
        for p in program.unreached:
            ledger.reasons.setdefault(p.path, "it is not in the program")
        if total is None:
            return walk.side
        both = dataclasses.replace(walk, side=dict(total))
        both.emit_all(walk.side)
        return both.side

    return add


def _wanted(params: Any, what: Any) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Returns the statistics of each path as a function, and what a recipe needs by path."""
    if isinstance(what, str):
        what = (what,)
    if isinstance(what, Rule) or not isinstance(what, Iterable):
        raise TypeError(f"calibrate: what={what!r}; give a list of names, or a recipe")
    what = tuple(what)
    if what and all(isinstance(w, Rule) for w in what):
        needs = {
            d.parameter.path: d.encoder.needs if d.encoder is not None else ()
            for d in decide(flatten(params)[0], what, who="calibrate")
        }
        if not any(needs.values()):
            raise ValueError(
                "calibrate: no encoder of this recipe needs statistics; name some instead, such as "
                'what=["absmax"]'
            )
        return lambda path: needs.get(path, ()), needs
    unknown = [w for w in what if not isinstance(w, str) or w not in STATISTICS]
    if unknown or not what:
        raise ValueError(
            f"calibrate: what={unknown or what!r}; give statistics of {sorted(STATISTICS)}, or a "
            "recipe"
        )
    return lambda path: what, {}


def assembled(params: Any, kept: Any, ledger: Ledger, recipe: Any, name: str) -> Calibration:
    """Makes statistics by path of what walks emitted, and raises where any are lacking."""
    found: dict[str, list[tuple[int, Stats]]] = {}
    for key, e in kept.items():
        use, multiply_adds = ledger.uses[int(key)], ledger.multiply_adds[int(key)]
        path = use.path
        if int(jnp.max(e.value["broken"], initial=0)):
            raise ValueError(
                f"calibrate: the input of {path} in {name} holds NaN or Inf; check the batches, "
                "or the layers before it"
            )
        stats = _stats(e.value, use.roles)
        same = found.setdefault(path, [])
        for i, (most, s) in enumerate(same):
            if (s.axes, s.groups, s.names) == (stats.axes, stats.groups, stats.names):
                both = dataclasses.replace(s, states=merged(s.states, stats.states))
                same[i] = (max(most, multiply_adds), both)
                break
        else:
            same.append((multiply_adds, stats))
    result, why = {}, {}
    for p in flatten(params)[0]:
        if p.reason or not (hasattr(p.value, "dtype") or is_encoded(p.value)):
            continue
        if uses := sorted(found.get(p.path, []), key=lambda u: -u[0]):
            first, *others = [s for _, s in uses]
            result[p.path] = dataclasses.replace(first, others=tuple(others))
        if p.path in ledger.partly:
            why[p.path] = ledger.partly[p.path]
        elif p.path in result and p.path in ledger.unread:
            why[p.path] = f"another use is not counted: {ledger.unread[p.path]}"
        elif p.path not in result:
            why[p.path] = ledger.reasons.get(p.path, "it meets nothing")
    lacking = [p for p, needs in recipe.items() if needs and p not in result]
    if lacking:
        raise ValueError(
            "calibrate: the recipe needs statistics that cannot be had: "
            + "; ".join(f"{p}: {why.get(p)}" for p in lacking)
        )
    return Calibration(result, why)


def _stats(states: States, r: Roles) -> Stats:
    """Brings the leading axes of a use into those of the parameter."""
    for axis, i in reversed(r.picked):
        states = jax.tree.map(lambda a, axis=axis, i=i: jnp.take(a, i, axis=axis), states)
    n = len(r.lead)
    order = [i for i in range(n) if r.stacked[i]] + [i for i in range(n) if not r.stacked[i]]
    s, size = sum(r.stacked), math.prod(r.stack)
    whole = r.where == tuple(range(size))
    places = jnp.asarray([w if w >= 0 else size for w in r.where])

    def arranged(a: jax.Array, zero: jax.Array) -> jax.Array:
        a = a.transpose(*order, *range(n, a.ndim)).reshape(len(r.where), *a.shape[s:])
        if not whole:
            full = jnp.broadcast_to(zero, (size, *a.shape[1:]))
            a = full.at[places].set(a, mode="drop")
        return a.reshape(*r.stack, *a.shape[1:])

    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[n:], a.dtype), states)
    return Stats(jax.tree.map(arranged, states, neutral(one)), r.axes, r.groups)
