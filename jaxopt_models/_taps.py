"""Values inside a program, returned beside its output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._call import Program, check_function, finish, name_of, take_apart, trace
from ._jaxpr import bodies, is_literal, scope_of
from ._paths import flatten
from ._table import Table
from ._tracked import dense, origins_of
from ._walk import Emitted, Walk

_CLOSED = ("custom_jvp_call", "custom_vjp_call")
# The scope of an equation around a body, of which it is only known that it is another one.
_OUTSIDE = "\0"


def taps(fn: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Returns ``fn`` with values from its inside beside its output.

    A name is one of

    * the path of a parameter, ``"ip1/kernel"``: what the operation that uses it returns;
    * a name scope, ``"ip1"`` or the end of a longer one: what leaves it and is read outside (if
      there is nothing of that kind, what is returned from it). linen modules, and
      `jax.named_scope`, are scopes; so are names given by `jax.ad_checkpoint.checkpoint_name`;
    * an equation, ``"dot_general:3"``: the fourth of this primitive.

    With ``"path:"``, ``"scope:"`` or ``"eqn:"`` before it a name means just that. Values can be
    differentiated, under `jit`, `vmap`, in loops and with compressed parameters. In a loop of
    known length they are stacked, an axis for each loop; in a ``while`` loop the last is kept; of
    a branch that is not taken they are zero; in ``shard_map`` there is one for each device along a
    first axis.

    Args:
      fn: function of `(params, ...)`.
      names: which values.

    Returns:
      A function of the same arguments that returns `(out, {name: value})`; a tuple where a name
      means several values. Its attribute ``table(params, *args)`` lists every name there is.

    Raises:
      ValueError: when called, if there is no such name, or two scopes end like that.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> def fn(params, x):
      ...     with jax.named_scope("hidden"):
      ...         x = jnp.maximum(x @ params["a"], 0.0)
      ...     return x @ params["b"]
      >>> params = {"a": jnp.eye(2), "b": jnp.ones((2, 1))}
      >>> out, found = jom.taps(fn, ["hidden"])(params, jnp.array([[1.0, -2.0]]))
      >>> found["hidden"]
      Array([[1., 0.]], dtype=float32)
    """
    return tapped(fn, names)


def tapped(fn: Callable[..., Any], names: Sequence[str], *, kernels: bool = True) -> Any:
    """Returns what :func:`taps` does; ``kernels`` as for ``accelerate`` and ``simulate``."""
    check_function(fn, "taps")
    names = (names,) if isinstance(names, str) else tuple(names or ())
    wrong = [n for n in names if not isinstance(n, str)]
    if wrong:
        raise TypeError(f"taps: {wrong[0]!r} is no name; give strings such as 'ip1/kernel'")

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        frame, arrays = take_apart(params, args, kwargs)
        return (kept if frame.hashable() else run)(frame, arrays)

    def run(frame: Any, arrays: list[Any]) -> tuple[Any, dict[str, Any]]:
        program = trace(fn, frame, arrays, who="taps", every=True, reached=False)
        wanted, paths = _resolve(names, program, frame.restore(arrays)[0], name_of(fn))
        walk = (Tapping if kernels else _Simulated)(wanted=wanted, paths=paths)
        out = walk.run(program.jaxpr, program.consts, program.operands)
        found: dict[str, list[Any]] = {name: [] for name in names}
        for key in sorted(walk.side):
            found[walk.order[int(key)][0]].append(walk.side[key].value)
        for name, values in found.items():
            if not values:
                raise ValueError(
                    f"taps: the parameter {name!r} meets no operation in {name_of(fn)}; "
                    "accelerate(fn).explain(params, ...) says where it goes"
                )
        return finish(program, out), {
            n: v[0] if len(v) == 1 else tuple(v) for n, v in found.items()
        }

    kept = jax.jit(run, static_argnums=0)

    def table(params: Any, *args: Any, **kwargs: Any) -> Table:
        """Lists every name there is in such a call, with shapes; shapes are enough."""
        frame, arrays = take_apart(params, args, kwargs)
        sites: list[Any] = []

        def look(arrays: list[Any]) -> None:
            program = trace(fn, frame, arrays, who="taps", every=True, reached=False)
            sites.extend(sites_of(program.jaxpr))

        jax.eval_shape(look, arrays)
        rows = [("path", p.path, list(p.value.shape)) for p in flatten(params)[0] if not p.reason]
        for scope, outs in scopes_of(sites).items():
            rows.append(("scope", scope, [list(v.aval.shape) for _, v in outs]))
        rows += [("eqn", s.label, [list(v.aval.shape) for v in s.eqn.outvars]) for s in sites]
        return Table(("kind", "name", "shape"), rows, title=f"taps {name_of(fn)}")

    call.table = table  # type: ignore[attr-defined]
    return call


@dataclasses.dataclass(frozen=True)
class _Site:
    """An equation somewhere in a program.

    Args:
      eqn: the equation.
      trail: the equations around it, and itself, by identity.
      label: its name as an equation.
      leaving: by scope which of its outputs leave that scope.
      returned: those that no equation reads.
    """

    eqn: Any
    trail: tuple[int, ...]
    label: str
    leaving: dict[str, list[int]]
    returned: frozenset[int] = frozenset()


def sites_of(
    jaxpr: Any,
    around: tuple[Any, ...] = (),
    counts: dict[str, int] | None = None,
    only_returned: Sequence[bool] | None = None,
) -> list[_Site]:
    """Lists the equations of a program.

    Args:
      jaxpr: of the program, or of a body in it.
      around: the equations around it.
      counts: how many there were of each primitive.
      only_returned: of a body, which outputs no equation around it reads.
    """
    counts = {} if counts is None else counts
    outer = scope_of(*around)
    scopes = [scope_of(*around, e) for e in jaxpr.eqns]
    readers: dict[Any, list[str | None]] = {}
    for e, scope in zip(jaxpr.eqns, scopes, strict=True):
        for v in e.invars:
            if not is_literal(v):
                readers.setdefault(v, []).append(scope)
    final = [True] * len(jaxpr.outvars) if only_returned is None else only_returned
    for v, last in zip(jaxpr.outvars, final, strict=True):
        if not is_literal(v):
            readers.setdefault(v, []).append(None if last else _OUTSIDE)
    found = []
    for e, scope in zip(jaxpr.eqns, scopes, strict=True):
        name = e.primitive.name
        n = counts[name] = counts.get(name, -1) + 1
        leaving: dict[str, list[int]] = {}
        for i, v in enumerate(e.outvars):
            for s in _prefixes(scope):
                if (outer + "/").startswith(s + "/"):
                    continue  # The scope goes on outside; what leaves it is seen there.
                if any(not _inside(r, s) for r in readers.get(v, [])):
                    leaving.setdefault(s, []).append(i)
        if name == "name":
            leaving.setdefault(e.params["name"], []).append(0)
        trail = tuple(id(a) for a in (*around, e))
        returned = frozenset(
            i for i, v in enumerate(e.outvars) if set(readers.get(v, ())) == {None}
        )
        found.append(_Site(e, trail, f"{name}:{n}", leaving, returned))
        if name not in _CLOSED:
            for body in bodies(e):
                # In a loop, and where a body's outputs are others, everything counts as read.
                last = [False] * len(body.outvars)
                if name not in ("scan", "while") and len(body.outvars) == len(e.outvars):
                    last = [i in returned for i in range(len(e.outvars))]
                found += sites_of(body, (*around, e), counts, last)
    return found


def _inside(reader: str | None, scope: str) -> bool:
    return reader not in (None, _OUTSIDE) and (reader + "/").startswith(scope + "/")


def _prefixes(scope: str) -> list[str]:
    parts = scope.split("/") if scope else []
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def scopes_of(sites: list[_Site]) -> dict[str, list[tuple[tuple[_Site, int], Any]]]:
    found: dict[str, list[Any]] = {}
    for s in sites:
        for scope, outs in s.leaving.items():
            found.setdefault(scope, []).extend(((s, i), s.eqn.outvars[i]) for i in outs)
    # New batch statistics leave a layer beside what the next one reads, for the caller alone.
    for scope, outs in found.items():
        read = [out for out in outs if out[0][1] not in out[0][0].returned]
        found[scope] = read or outs
    return found


def _resolve(
    names: Sequence[str], program: Program, params: Any, fn: str
) -> tuple[dict[tuple[int, ...], list[tuple[str, int]]], dict[str, list[str]]]:
    """Returns outputs of equations by trail, and parameters by path, with the names for them."""
    sites = sites_of(program.jaxpr)
    scopes = scopes_of(sites)
    known = {p.path for p in flatten(params)[0]}
    labels = {s.label: s for s in sites}
    wanted: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    paths: dict[str, list[str]] = {}
    for full in names:
        kind, _, rest = full.partition(":")
        kind, name = (kind, rest) if kind in ("path", "scope", "eqn") else ("", full)
        if kind in ("", "path") and name in known:
            paths.setdefault(name, []).append(full)
            continue
        if kind in ("", "scope"):
            ending = [s for s in scopes if ("/" + s).endswith("/" + name)]
            exact = [name] if name in scopes else ending
            if len(exact) > 1:
                raise ValueError(f"taps: {full!r} ends several scopes of {fn}: {exact}; say which")
            if exact:
                for (site, i), _ in scopes[exact[0]]:
                    wanted.setdefault(site.trail, []).append((full, i))
                continue
        if kind in ("", "eqn") and name in labels:
            site = labels[name]
            for i in range(len(site.eqn.outvars)):
                wanted.setdefault(site.trail, []).append((full, i))
            continue
        there = {"path": sorted(known), "scope": sorted(scopes), "eqn": sorted(labels)}
        kinds = {"path": "parameters", "scope": "scopes", "eqn": "equations"}
        lists = [f"{kinds[k]} are {there[k]}" for k in ([kind] if kind else ["path", "scope"])]
        raise ValueError(
            f"taps: {full!r} is no {'such name' if kind else 'parameter, scope or equation'} of "
            f"{fn}: {'; '.join(lists)}. taps(fn, []).table(params, *args) lists everything"
        )
    return wanted, paths


@dataclasses.dataclass
class Tapping(Walk):
    """A walk that emits values.

    Args:
      wanted: by trail the names and numbers of outputs.
      paths: names by the path of a parameter.
      order: name, and what it stands for, of each value emitted.
    """

    wanted: dict[Any, Any] = dataclasses.field(default_factory=dict)
    paths: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    order: list[Any] = dataclasses.field(default_factory=list)
    collects = True

    def wants(self, eqn: Any) -> bool:
        trail = self.trail(eqn)
        return any(t[: len(trail)] == trail and len(t) > len(trail) for t in self.wanted)

    def after(self, eqn: Any, found: list[Any]) -> None:
        for name, i in self.wanted.get(self.trail(eqn), ()):
            self._tap(name, (self.trail(eqn), i), found[i])

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        found = super().use(eqn, operands)
        for x in operands:
            for o in origins_of(x):
                for name in self.paths.get(o.path, ()):
                    self._tap(name, (self.trail(eqn), 0), found[0])
        return found

    def _tap(self, name: str, what: Any, value: Any) -> None:
        if (name, what) not in self.order:
            self.order.append((name, what))
        scans = [i + 1 for i, e in enumerate(self.loops) if e.primitive.name == "scan"]
        self.emit(f"{self.order.index((name, what)):06d}", dense(value), tuple(scans))

    def zero(self, e: Any) -> Any:
        return Emitted(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), e.value), e.loops)

    def merge(self, a: Any, b: Any) -> Any:
        return b

    def over_mesh(self, name: str, e: Any, axes: tuple[str, ...], typed: bool) -> Any:
        return Emitted(jax.tree.map(lambda a: a[None], e.value), e.loops)

    def mesh_spec(self, axes: tuple[str, ...]) -> Any:
        return jax.sharding.PartitionSpec(axes)


class _Simulated(Tapping):
    """The same without kernels."""

    kernels = False
