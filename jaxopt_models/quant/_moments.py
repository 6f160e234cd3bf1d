"""Moments of what batch normalization sees, collected while batches are run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._call import Frame, name_of, on_data, take_apart, trace
from .._graph import Graph, values_of
from .._tracked import is_tracked
from .._walk import ENTERING, Emitted, Walk
from ._norms import Norm, norms

WHO = "reestimate_batchnorm"
# Paths of the mean and the variance of a norm.
Key = tuple[str, str]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean, and sum of squared distances from the mean; `[*loops, *channels]` each."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    def plus(self, other: Moments) -> Moments:
        """Returns the moments of both."""
        count = self.count + other.count
        part = other.count / (count + (count == 0))
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.count * part
        return Moments(count, self.mean + apart * part, squares)

    @property
    def variance(self) -> jax.Array:
        """Mean of the squared distances."""
        return self.squares / (self.count + (self.count == 0))


@dataclasses.dataclass
class Measuring(Walk):
    """A walk that emits the moments of what is normalized.

    Args:
      sites: norms by the trail of the operation that subtracts the mean, with their numbers.
      turns: whether every norm goes on with its input less its mean, divided by its deviation.
    """

    sites: dict[tuple[int, ...], tuple[int, Norm]] = dataclasses.field(default_factory=dict)
    turns: bool = False
    collects = True
    rules = ENTERING

    def wants(self, eqn: Any) -> bool:
        trail = self.trail(eqn)
        return any(t[: len(trail)] == trail for t in self.sites)

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        site = self.sites.get(self.trail(eqn))
        if site is None:
            return super().use(eqn, operands)
        number, norm = site
        x, mean = operands
        axes = tuple(a for a in range(x.ndim) if a not in norm.channels)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        center = jnp.mean(wide, axis=axes, keepdims=True)
        squares = jnp.sum((wide - center) ** 2, axis=axes, keepdims=True)
        count = jnp.full(center.shape, math.prod(x.shape[a] for a in axes), wide.dtype)
        found = [jnp.squeeze(v, axes) for v in (count, center, squares)]
        scans = [i + 1 for i, e in enumerate(self.loops) if e.primitive.name == "scan"]
        self.emit(f"{number:06d}", Moments(*found), tuple(scans[d - 1] for d in norm.loops))
        if self.turns:
            wide = (wide - center) * jax.lax.rsqrt(squares / count + norm.eps)
            x = wide.astype(x.dtype)
        return super().use(eqn, [x, mean])

    def zero(self, e: Any) -> Any:
        return Emitted(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), e.value), e.loops)

    def merge(self, a: Any, b: Any) -> Any:
        return Emitted(a.value.plus(b.value), a.loops)

    def over_mesh(self, name: str, e: Any, axes: tuple[str, ...], typed: bool) -> Any:
        m = e.value
        count = jax.lax.psum(m.count, axes)
        mean = jax.lax.psum(m.mean * m.count, axes) / jnp.maximum(count, 1)
        squares = jax.lax.psum(m.squares + m.count * (m.mean - mean) ** 2, axes)
        return Emitted(Moments(count, mean, squares), e.loops)


class Run:
    """Runs batches through a function, compiled once for each form of its parameters."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.norms: list[Norm] = []
        self.eps: dict[Key, float] = {}
        self.compiled = jax.jit(self._measure, static_argnums=0)

    def __call__(
        self, params: Any, batch: tuple[Any, ...], stats: dict[str, Any] | None
    ) -> dict[Key, Moments]:
        """Returns the moments of every norm's input, normalized with statistics if given."""
        frame, arrays = on_data(params, batch, WHO)
        found = (self.compiled if frame.hashable() else self._measure)(frame, arrays, stats)
        side: dict[Key, Moments] = {}
        for i, n in enumerate(self.norms):
            m = jax.tree.map(lambda a: np.asarray(a, np.float64), found[f"{i:06d}"])
            if not (np.all(np.isfinite(m.mean)) and np.all(np.isfinite(m.squares))):
                raise ValueError(f"{WHO}: what is normalized by {n.mean} is NaN or Inf")
            key = (n.mean, n.var)
            side[key] = side[key].plus(m) if key in side else m
        return side

    def prepare(self, params: Any, batch: tuple[Any, ...]) -> None:
        """Finds the norms, if they are not known yet."""
        if not self.norms:
            frame, arrays = take_apart(params, batch, {})
            self.find(trace(self.fn, frame, arrays, who=WHO, every=True), values_of(params))

    def _measure(self, frame: Frame, arrays: list[Any], stats: Any) -> dict[str, Any]:
        params, _, _ = frame.restore(arrays)
        program = trace(self.fn, frame, arrays, who=WHO, every=True)
        values = values_of(params)
        self.find(program, values)
        walk = Measuring(
            sites={n.nodes[0].trail: (i, n) for i, n in enumerate(self.norms)},
            turns=stats is not None,
        )
        operands = list(program.operands)
        for i, path in enumerate(values):
            if path in (stats or {}):
                x = operands[i]
                operands[i] = (
                    dataclasses.replace(x, value=stats[path]) if is_tracked(x) else stats[path]
                )
        walk.run(program.jaxpr, program.consts, operands)
        return {k: e.value for k, e in walk.side.items()}

    def find(self, program: Any, values: dict[str, Any]) -> None:
        """Finds the norms of a program."""
        found = norms(Graph(program, values))
        if not found:
            raise ValueError(
                f"{WHO}: {name_of(self.fn)} has no normalization by running statistics; is it in "
                "inference mode, and do params hold the statistics (the whole linen variables)?"
            )
        if any(n.why for n in found):
            [why, *_] = [f"{n.var}: {n.why}" for n in found if n.why]
            raise ValueError(f"{WHO}: the statistics of a norm cannot be told: {why}")
        self.norms = found
        self.eps = {(n.mean, n.var): n.eps for n in found}
