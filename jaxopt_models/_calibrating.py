"""The walk that collects statistics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._jaxpr import varying
from ._products import product_of
from ._roles import Roles, roles
from ._statistics import STATISTICS
from ._tracked import dense, is_tracked
from ._walk import Emitted, Walk, enter


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
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    multiply_adds: list[int] = dataclasses.field(default_factory=list)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    partly: dict[str, str] = dataclasses.field(default_factory=dict)

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

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        for i, x in enumerate(operands):
            for o in x.origins if is_tracked(x) else ():
                why = self._read(eqn, operands, i, o)
                if why:
                    self.ledger.reasons.setdefault(o.path, why)
        return super().use(eqn, operands)

    def lose(self, x: Any, why: str) -> None:
        for o in x.origins:
            self.ledger.reasons.setdefault(o.path, why)

    def _read(self, eqn: Any, operands: Sequence[Any], i: int, o: Any) -> str:
        names = self.wanted(o.path)
        product = product_of(eqn, i)
        if isinstance(product, str) or not names:
            return product if isinstance(product, str) else "the recipe needs none"
        other = operands[1] if product.lookup else operands[1 - i]
        if is_tracked(other) and other.origins:
            return "it is multiplied with another parameter"
        r = roles(o, product)
        if isinstance(r, str):
            return r
        if "gram" in names and r.rows > self.gram_rows:
            names = tuple(n for n in names if n != "gram")
            self.ledger.partly[o.path] = f"gram of {r.rows} rows is beyond gram_rows"
        other = _whole(jax.lax.stop_gradient(dense(other)))
        if product.lookup:
            counts, samples = product.counts(other)
            full = _put(counts[..., None, :], r, 0)[..., 0, :]
            states = {n: STATISTICS[n].of_lookup(full, samples) for n in names}
            count, broken = jnp.asarray(samples, jnp.float32), jnp.zeros((), jnp.int32)
        else:
            blocks = self._rows(product.inputs(other, r.kept), r)
            states = {n: STATISTICS[n].of(blocks) for n in names}
            lead, samples = blocks[0].shape[:-2], blocks[0].shape[-2]
            count = jnp.full(lead, samples, jnp.float32)
            broken = sum(jnp.sum(~jnp.isfinite(b)) for b in blocks)
            broken = jnp.asarray(broken, jnp.int32)
        name = self.ledger.name(Use(o.path, r, o.loops), product.multiply_adds * self.times)
        self.emit(name, self._placed(states, count, broken, o, r), o.loops)
        return ""

    def _rows(self, blocks: list[jax.Array], r: Roles) -> list[jax.Array]:
        if r.places is not None:
            blocks = [_put(jnp.concatenate(blocks, axis=-1), r, 0)]
        if not r.gathered:
            return blocks
        x = jnp.concatenate(blocks, axis=-1)
        shape = x.shape[:-1]
        x = x.reshape(*shape, *r.in_shape)
        for axis, names in r.gathered:
            x = jax.lax.all_gather(x, names, axis=len(shape) + axis, tiled=True)
        return [x.reshape(*shape, -1)]

    def _placed(self, states: Any, count: Any, broken: Any, o: Any, r: Roles) -> Any:
        """Puts the state where the indices that only the data knows say it belongs."""
        if not r.indices:
            return {"states": states, "count": count, "broken": broken}
        e = {"states": states, "count": count}

        def wide(zero: jax.Array, a: jax.Array) -> jax.Array:
            full = jnp.broadcast_to(zero, (*r.indices, *a.shape))
            return full.at[tuple(o.at)].set(a)

        return {**jax.tree.map(wide, self._neutral(e), e), "broken": broken}

    def _neutral(self, value: Any) -> Any:
        states = {n: STATISTICS[n].zero(s) for n, s in value["states"].items()}
        rest = {k: jnp.zeros(value[k].shape, value[k].dtype) for k in value if k != "states"}
        return {"states": states, **rest}

    def zero(self, e: Any) -> Any:
        return Emitted(self._neutral(e.value), e.loops)

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
        value = jax.tree.map(lambda a, z: jnp.where(mine, a, z), e.value, self._neutral(e.value))
        e = Emitted(value, e.loops)
        states = {n: STATISTICS[n].over(s, axes) for n, s in e.value["states"].items()}
        rest = {k: jax.lax.psum(v, axes) for k, v in e.value.items() if k != "states"}
        return Emitted({"states": states, **rest}, e.loops)


Calibrating.rules = {
    **Walk.rules,
    # Statistics have no gradient, so bodies with derivative rules of their own may be entered.
    **dict.fromkeys(("custom_vjp_call", "custom_vjp_call_jaxpr"), enter),
    "custom_jvp_call": lambda walk, eqn, operands: (
        enter if not all(map(is_tracked, operands)) else Walk.rules["custom_jvp_call"]
    )(walk, eqn, operands),
}


def _whole(x: jax.Array) -> jax.Array:
    # On Explicit mesh axes a sum over a divided axis has to be told what becomes of it.
    divided = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if divided else x


def merged(a: Any, b: Any) -> Any:
    """Merges the states and counts of two uses."""
    states = {n: STATISTICS[n].merge(s, b["states"][n]) for n, s in a["states"].items()}
    return {"states": states, **{k: a[k] + b[k] for k in a if k != "states"}}


def _put(x: jax.Array, r: Roles, fill: float) -> jax.Array:
    """Puts rows of an operand in the places of the parameter's; others see zero."""
    if r.places is None:
        return x
    places = jnp.asarray([p if p >= 0 else r.rows for p in r.places])
    return jnp.full((*x.shape[:-1], r.rows), fill, x.dtype).at[..., places].set(x, mode="drop")
