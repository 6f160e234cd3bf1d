"""Where values inside a function lie."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._call import check_function, finish, name_of, take_apart, trace
from .._graph import PRODUCTS
from .._paths import flatten
from .._taps import scopes_of, sites_of
from .._tracked import dense, is_tracked, origins_of
from .._walk import Walk
from ._dense import check_spec
from ._rules import on_auto

Where = Mapping[str, PartitionSpec] | Sequence[tuple[str, PartitionSpec]]


def constrain(fn: Callable[..., Any], where: Where, *, mesh: Mesh) -> Callable[..., Any]:
    """Returns ``fn`` with values inside it placed on a mesh.

    What is computed does not change, only where: between tensor-parallel layers activations can
    be divided along the sequence (``tensor(..., sequence=1).inside`` holds the partitions), so
    that the sum behind a layer becomes a reduce-scatter, and an all-gather stands before the next.

    Values are named as in :func:`jaxopt_models.taps`: the path of a parameter (what the operation
    that uses it returns), a scope or the end of one (what leaves it), an equation
    (``"eqn:dot_general:3"``), each as a regular expression. ``"path:"``, ``"scope:"`` or
    ``"eqn:"`` before it means just that, and ``"input:"`` with the path of a parameter what it is
    multiplied with. Every value that matches is placed, by the first name that matches it.

    Args:
      fn: function of `(params, ...)`; parameters may be compressed.
      where: partitions by name. One shorter than the axes of a value leaves the last axes whole;
        `PartitionSpec.UNCONSTRAINED` leaves an axis to XLA.
      mesh: the devices, with Auto axes.

    Returns:
      A function of the same arguments.

    Raises:
      TypeError: if ``fn`` is no function, or ``where`` holds no partitions.
      ValueError: if the axes of the mesh are not Auto; when called, if a name matches nothing (the
        message lists the names), or a value has fewer axes than its partition or does not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> from jaxopt_models import parallel
      >>> def fn(params, x):
      ...     with jax.named_scope("hidden"):
      ...         x = x @ params["a"]
      ...     return x @ params["b"]
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
      >>> placed = parallel.constrain(fn, {"hidden": P(None, "model")}, mesh=mesh)
      >>> placed({"a": jnp.eye(2), "b": jnp.ones((2, 1))}, jnp.ones((1, 2)))
      Array([[2.]], dtype=float32)

    References:
      Korthikanti et al., `Reducing Activation Recomputation in Large Transformer Models
      <https://arxiv.org/abs/2205.05198>`_, 2022
    """
    check_function(fn, "constrain")
    mesh = on_auto(mesh, "constrain")
    pairs = list(where.items() if isinstance(where, Mapping) else where)
    for name, spec in pairs:
        if not isinstance(name, str) or not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"constrain: {name!r}: {spec!r} is no pair of a name and a PartitionSpec"
            )

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        frame, arrays = take_apart(params, args, kwargs)
        return (kept if frame.hashable() else run)(frame, arrays)

    def run(frame: Any, arrays: list[Any]) -> Any:
        program = trace(fn, frame, arrays, who="constrain", every=True, reached=False)
        known = [p.path for p in flatten(frame.restore(arrays)[0])[0]]
        named = _resolved(pairs, program, known, name_of(fn))
        walk = _Constraining(named=named, mesh=mesh)
        return finish(program, walk.run(program.jaxpr, program.consts, program.operands))

    kept = jax.jit(run, static_argnums=0)
    return call if pairs else fn


Named = tuple[str, PartitionSpec]


@dataclasses.dataclass
class _Names:
    """Which values are placed.

    Args:
      values: a name and its partition by the trail of an equation and the number of a result.
      paths: the same by the path of a parameter, for what an operation with it returns.
      inputs: for what it is multiplied with.
    """

    values: dict[Any, dict[int, Named]] = dataclasses.field(default_factory=dict)
    paths: dict[str, Named] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Named] = dataclasses.field(default_factory=dict)

    def value(self, trail: Any, i: int, named: Named) -> None:
        """Places a value, unless an earlier name does."""
        self.values.setdefault(trail, {}).setdefault(i, named)


def _resolved(pairs: Sequence[Named], program: Any, known: Sequence[str], fn: str) -> _Names:
    sites = sites_of(program.jaxpr)
    scopes = scopes_of(sites)
    labels = {s.label: s for s in sites}
    there = {"path": known, "scope": scopes, "eqn": labels, "input": known}
    names = _Names()
    for full, spec in pairs:
        kind, _, rest = full.partition(":")
        kinds, name = ([kind], rest) if kind in there else (["path", "scope"], full)
        found = [(k, n) for k in kinds for n in _matching(name, there[k], ends=k == "scope")]
        for k, n in found:
            if k in ("path", "input"):
                (names.paths if k == "path" else names.inputs).setdefault(n, (full, spec))
            elif k == "scope":
                for (site, i), _ in scopes[n]:
                    names.value(site.trail, i, (full, spec))
            else:
                for i in range(len(labels[n].eqn.outvars)):
                    names.value(labels[n].trail, i, (full, spec))
        if not found:
            words = {"path": "parameters", "scope": "scopes", "eqn": "equations"}
            lists = [f"{words.get(k, 'parameters')} are {sorted(there[k])}" for k in kinds]
            raise ValueError(f"constrain: {full!r} matches no value of {fn}: {'; '.join(lists)}")
    return names


def _matching(name: str, known: Any, *, ends: bool = False) -> list[str]:
    if name in known:
        return [name]
    try:
        pattern = re.compile(rf"(?:.*/)?(?:{name})" if ends else name)
    except re.error as e:
        raise ValueError(f"constrain: {name!r} is no regular expression: {e}") from None
    return [k for k in known if pattern.fullmatch(k)]


@dataclasses.dataclass
class _Constraining(Walk):
    """A walk that places values.

    Args:
      named: which.
      mesh: the devices.
    """

    named: _Names = dataclasses.field(default_factory=_Names)
    mesh: Any = None

    def wants(self, eqn: Any) -> bool:
        trail = self.trail(eqn)
        return any(t[: len(trail)] == trail and len(t) > len(trail) for t in self.named.values)

    def after(self, eqn: Any, found: list[Any]) -> None:
        for i, named in self.named.values.get(self.trail(eqn), {}).items():
            found[i] = self._placed(found[i], named)

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        paths = [o.path for x in operands for o in origins_of(x)]
        given = next((self.named.inputs[p] for p in paths if p in self.named.inputs), None)
        if given is not None and eqn.primitive.name in PRODUCTS:
            operands = [x if is_tracked(x) else self._placed(x, given) for x in operands]
        found = super().use(eqn, operands)
        made = next((self.named.paths[p] for p in paths if p in self.named.paths), None)
        return found if made is None else [self._placed(found[0], made), *found[1:]]

    def _placed(self, x: Any, named: Named) -> Any:
        name, spec = named
        value = dense(x)
        check_spec(f"constrain: {name!r}, a value", tuple(value.shape), spec, self.mesh)
        return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, spec))
