"""The walk that collects statistics."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._jaxpr import varying
from ._products import product_of
from ._roles import Roles, roles
from ._statistics import ALWAYS, PAIRED, STATISTICS, Statistic
from ._tracked import dense, is_tracked, origins_of
from ._walk import ENTERING, Emitted, Walk

States = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Use:
    """A way in which a parameter is used; statistics of equal ones add up."""

    path: str
    roles: Roles
    loops: tuple[int, ...]


@dataclasses.dataclass
class Ledger:
    """What is emitted under which name, and why not.

    Args:
      uses: each use; its name is its number.
      multiply_adds: the most of each.
      reasons: by path why a use has no statistics.
      partly: by path why it has not all.
      unread: by path why one of its products has none, though others may.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    multiply_adds: list[int] = dataclasses.field(default_factory=list)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    partly: dict[str, str] = dataclasses.field(default_factory=dict)
    unread: dict[str, str] = dataclasses.field(default_factory=dict)

    def name(self, use: Use, multiply_adds: int) -> str:
        """Returns the name of a use."""
        if use not in self.uses:
            self.uses.append(use)
            self.multiply_adds.append(0)
        i = self.uses.index(use)
        self.multiply_adds[i] = max(self.multiply_adds[i], multiply_adds)
        return f"{i:06d}"


@dataclasses.dataclass
class Calibrating(Walk):
    """A walk that emits the statistics of inputs.

    Args:
      wanted: from a path to the names of its statistics.
      gram_rows: most rows of a gram.
      ledger: what is emitted under which name.
    """

    wanted: Any = None
    gram_rows: int = 0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    collects = True
    kernels = False
    rules = ENTERING

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        for i, x in enumerate(operands):
            by_path: dict[str, list[Any]] = {}
            for o in origins_of(x):
                by_path.setdefault(o.path, []).append(o)
            for path, origins in by_path.items():
                if why := self._read(eqn, operands, i, origins):
                    self.ledger.reasons.setdefault(path, why)
                    if not _HARMLESS.search(why):
                        self.ledger.unread.setdefault(path, why)
        return super().use(eqn, operands)

    def lose(self, x: Any, why: str) -> None:
        for o in x.origins:
            self.ledger.reasons.setdefault(o.path, why)

    def _read(self, eqn: Any, operands: Sequence[Any], i: int, origins: list[Any]) -> str:
        o = origins[0]
        names = self.wanted(o.path)
        product = product_of(eqn, i)
        if isinstance(product, str) or not names:
            return product if isinstance(product, str) else "the recipe needs none"
        other = operands[1] if product.lookup else operands[1 - i]
        if origins_of(other):
            return "it is multiplied with another parameter"
        r = _joined([roles(o, product) for o in origins])
        if isinstance(r, str):
            return r
        if product.lookup and is_tracked(operands[1]):
            return "it is indexed by a constant, which may only put it in another order"
        if product.lookup and r.gathered:
            return "it is looked up in rows that shard_map divides"
        if "gram" in names and r.rows > self.gram_rows:
            names = tuple(n for n in names if n != "gram")
            self.ledger.partly[o.path] = f"gram of {r.rows} rows: raise gram_rows"
        other = _whole(jax.lax.stop_gradient(dense(other)))
        every = {n: STATISTICS[n] for n in names} | ALWAYS
        name = self.ledger.name(Use(o.path, r, o.loops), product.multiply_adds * self.times)
        if product.lookup:
            counts, samples = product.counts(other)
            states = {n: s.of_lookup(_put(counts, r), samples) for n, s in every.items()}
        else:
            blocks = self._rows(product.inputs(other, r.kept), r)
            states = {n: s.of(blocks) for n, s in every.items()}
            self.read(name, eqn, blocks, names)
        self.emit(name, self._placed(states, o, r), o.loops)
        return ""

    def read(self, name: str, eqn: Any, blocks: list[jax.Array], names: Sequence[str]) -> None:
        """Is told the input of a use, `[*lead, samples, rows]` in blocks along the last axis."""

    def _rows(self, blocks: list[jax.Array], r: Roles) -> list[jax.Array]:
        if r.places is not None:
            blocks = [_put(jnp.concatenate(blocks, axis=-1), r)]
        if not r.gathered:
            return blocks
        x = jnp.concatenate(blocks, axis=-1)
        shape = x.shape[:-1]
        x = x.reshape(*shape, *r.in_shape)
        for axis, names in r.gathered:
            x = jax.lax.all_gather(x, names, axis=len(shape) + axis, tiled=True)
        return [x.reshape(*shape, -1)]

    def _placed(self, states: States, o: Any, r: Roles) -> States:
        """Puts states where the indices that only the data knows say they belong."""
        if not r.indices:
            return states

        def wide(zero: jax.Array, a: jax.Array) -> jax.Array:
            full = jnp.broadcast_to(zero, (*r.indices, *a.shape))
            return full.at[tuple(o.at)].set(a)

        return jax.tree.map(wide, neutral(states), states)

    def zero(self, e: Any) -> Any:
        return Emitted(neutral(e.value), e.loops)

    def merge(self, a: Any, b: Any) -> Any:
        return Emitted(merged(a.value, b.value), a.loops)

    def over_mesh(self, name: str, e: Any, axes: tuple[str, ...], typed: bool) -> Any:
        r = self.ledger.uses[int(name)].roles
        varied = frozenset().union(*map(varying, jax.tree.leaves(e.value)))
        once = [a for a in axes if a in r.copied or (typed and a not in varied)]
        # Of devices that see the same input one counts. The condition names every axis, so that
        # what it chooses varies along all of them, as the sum over them asks.
        counts = [jax.lax.axis_index(a) <= (0 if a in once else jnp.inf) for a in axes]
        mine = functools.reduce(jnp.logical_and, counts)
        none = neutral(e.value)
        states = jax.tree.map(lambda a, z: jnp.where(mine, a, z), e.value, none)
        return Emitted({n: statistic(n).over(s, axes) for n, s in states.items()}, e.loops)


# A norm of a parameter, or its part in a sum, is no input that statistics would miss.
_HARMLESS = re.compile("^(reduce_|it is added|it scales|the recipe|it is returned)")


def _joined(found: list[Roles | str]) -> Roles | str:
    """Makes one of the roles of the parts in which a parameter stands in an operand."""
    first, *others = found
    for r in others:
        if isinstance(first, str) or isinstance(r, str):
            return next(s for s in (first, r) if isinstance(s, str))
        a, b = (p.places or tuple(range(p.rows)) for p in (first, r))
        alike = dataclasses.replace(first, places=b, share=r.share) == dataclasses.replace(
            r, places=b
        )
        if not alike or any(x >= 0 and y >= 0 and x != y for x, y in zip(a, b, strict=True)):
            return "it stands in one operand several times"
        first = dataclasses.replace(
            first, places=tuple(max(x, y) for x, y in zip(a, b, strict=True))
        )
    return first


def _whole(x: jax.Array) -> jax.Array:
    # On Explicit mesh axes a sum over a divided axis has to be told what becomes of it.
    divided = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if divided else x


def statistic(name: str) -> Statistic:
    """Returns a statistic by name, those that are always kept included."""
    return {**ALWAYS, **PAIRED}.get(name) or STATISTICS[name]


def neutral(states: States) -> States:
    """Returns the states of no sample, of the same shapes."""
    return {n: statistic(n).zero(s) for n, s in states.items()}


def merged(a: States, b: States) -> States:
    """Merges the states of two uses."""
    return {n: statistic(n).merge(s, b[n]) for n, s in a.items()}


def _put(x: jax.Array, r: Roles) -> jax.Array:
    """Puts rows of an operand in the places of the parameter's; others see zero."""
    if r.places is None:
        return x
    places = jnp.asarray([p if p >= 0 else r.rows for p in r.places])
    return jnp.zeros((*x.shape[:-1], r.rows), x.dtype).at[..., places].set(x, mode="drop")
