"""What calibration remembers of the input of a parameter: monoids, exact under any order.

Each statistic has a state for the samples seen, computed from a block of samples or from a lookup,
and merged by addition or maximum. So batches, iterations, branches and devices may come in any
order and number, and none at all is the neutral state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Blocks = Sequence[jax.Array]


class Statistic:
    """A statistic of inputs `[*lead, samples, rows]`, given as blocks along the last axis."""

    #: What merges two states, entry by entry.
    merge_with: ClassVar[str] = "add"
    #: The neutral value where that is the maximum.
    least: ClassVar[float] = -jnp.inf

    def of(self, blocks: Blocks) -> Any:
        """Returns the state for samples."""
        raise NotImplementedError

    def of_lookup(self, counts: jax.Array, samples: int) -> Any:
        """Returns the state for one-hot samples, of which ``counts`` have a one in each row."""
        raise NotImplementedError

    def zero(self, state: Any) -> Any:
        """Returns the neutral state of the shape of ``state``."""
        fill = 0 if self.merge_with == "add" else self.least
        return jax.tree.map(lambda a: jnp.full(a.shape, fill, a.dtype), state)

    def merge(self, a: Any, b: Any) -> Any:
        """Returns the state for the samples of both."""
        return jax.tree.map(jnp.add if self.merge_with == "add" else jnp.maximum, a, b)

    def over(self, state: Any, axes: tuple[str, ...]) -> Any:
        """Returns the state for the samples of all devices along mesh axes."""
        sum_up = jax.lax.psum if self.merge_with == "add" else jax.lax.pmax
        return jax.tree.map(lambda a: sum_up(a, axes), state)

    def result(self, state: Any, count: jax.Array) -> Any:
        """Returns the statistic."""
        return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
    r"""Exact counts beyond 32 bits, :math:`2^{20} \cdot \mathrm{high} + \mathrm{low}`.

    Counts in `float32` stand still at :math:`2^{24}`, and JAX has no 64-bit integers by default.
    """

    low: jax.Array
    high: jax.Array

    @classmethod
    def of(cls, low: jax.Array, high: Any = 0) -> Tally:
        """Makes one of counts below :math:`2^{31}`."""
        low = jnp.asarray(low, jnp.int32)
        return cls(low & 0xFFFFF, jnp.asarray(high, jnp.int32) + (low >> 20))

    def plus(self, other: Tally) -> Tally:
        """Adds entry by entry."""
        return Tally.of(self.low + other.low, self.high + other.high)

    def over(self, axes: tuple[str, ...]) -> Tally:
        """Adds over mesh axes."""
        return Tally.of(jax.lax.psum(self.low, axes), jax.lax.psum(self.high, axes))

    def total(self) -> jax.Array:
        """Returns the counts as `float32`, rounded once."""
        return self.high.astype(jnp.float32) * 2.0**20 + self.low.astype(jnp.float32)


class Count(Statistic):
    """Number of samples."""

    def of(self, blocks: Blocks) -> Tally:
        *lead, samples, _ = blocks[0].shape
        return Tally.of(jnp.full(lead, samples, jnp.int32))

    def of_lookup(self, counts: jax.Array, samples: int) -> Tally:
        return Tally.of(jnp.asarray(samples, jnp.int32))

    def merge(self, a: Tally, b: Tally) -> Tally:
        return a.plus(b)

    def over(self, state: Tally, axes: tuple[str, ...]) -> Tally:
        return state.over(axes)

    def result(self, state: Tally, count: Any) -> jax.Array:
        return state.total()


class Broken(Statistic):
    """Whether a value was NaN or Inf, 0 or 1."""

    merge_with = "max"
    least = 0

    def of(self, blocks: Blocks) -> jax.Array:
        found = [jnp.any(~jnp.isfinite(b), axis=(-1, -2)) for b in blocks]
        return functools.reduce(jnp.logical_or, found).astype(jnp.int32)

    def of_lookup(self, counts: jax.Array, samples: int) -> jax.Array:
        return jnp.zeros((), jnp.int32)


class Absmax(Statistic):
    """Largest absolute value, 0 for no sample."""

    merge_with = "max"
    least = 0

    def of(self, blocks: Blocks) -> jax.Array:
        return _each(lambda x: jnp.max(jnp.abs(x), axis=-2, initial=0), blocks)

    def of_lookup(self, counts: jax.Array, samples: int) -> jax.Array:
        return (counts > 0).astype(_float())


class Range(NamedTuple):
    """Smallest and largest value; `inf` and `-inf` for no sample."""

    min: jax.Array
    max: jax.Array


class MinMax(Statistic):
    """Smallest and largest value; the state holds that of the negative."""

    merge_with = "max"

    def of(self, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
        below = _each(lambda x: jnp.max(-x, axis=-2, initial=-jnp.inf), blocks)
        return below, _each(lambda x: jnp.max(x, axis=-2, initial=-jnp.inf), blocks)

    def of_lookup(self, counts: jax.Array, samples: int) -> tuple[jax.Array, jax.Array]:
        top = jnp.where(counts > 0, 1.0, 0.0 if samples else -jnp.inf)
        low = jnp.where(counts < samples, 0.0, -1.0 if samples else -jnp.inf)
        return low.astype(_float()), top.astype(_float())

    def result(self, state: Any, count: jax.Array) -> Range:
        return Range(-state[0], state[1])


class Average(Statistic):
    r"""Moving averages of the least and the greatest value of batches, later ones weighing more.

    .. math:: m_t = 0.9 \, m_{t-1} + 0.1 \max x_t, \qquad m = m_T / (1 - 0.9^T)

    The state holds the weight of what came before it, and the sums of the highest values and of
    the negative of the lowest; merging is associative, but keeps the order.
    """

    decay: ClassVar[float] = 0.9

    def of(self, blocks: Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole = (-2, -1)
        low = [jnp.max(-_wide(b), axis=whole, initial=0) for b in blocks]
        high = [jnp.max(_wide(b), axis=whole, initial=0) for b in blocks]
        return self._of(functools.reduce(jnp.maximum, low), functools.reduce(jnp.maximum, high))

    def of_lookup(self, counts: jax.Array, samples: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self._of(jnp.zeros((), _float()), jnp.max(counts > 0).astype(_float()))

    def _of(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        share = 1 - self.decay
        return jnp.full(low.shape, self.decay, low.dtype), share * low, share * high

    def zero(self, state: Any) -> Any:
        before, low, high = state
        return jnp.ones(before.shape, before.dtype), *(
            jnp.zeros(x.shape, x.dtype) for x in (low, high)
        )

    def merge(self, a: Any, b: Any) -> Any:
        return a[0] * b[0], a[1] * b[0] + b[1], a[2] * b[0] + b[2]

    def over(self, state: Any, axes: tuple[str, ...]) -> Any:
        # Devices hold parts of one batch, of which the range counts once.
        before, low, high = state
        return -jax.lax.pmax(-before, axes), jax.lax.pmax(low, axes), jax.lax.pmax(high, axes)

    def result(self, state: Any, count: jax.Array) -> Range:
        before, low, high = state
        seen = before < 1
        share = jnp.where(seen, 1 - before, 1)
        return Range(
            jnp.where(seen, -low / share, jnp.inf), jnp.where(seen, high / share, -jnp.inf)
        )


class L2(Statistic):
    r"""Euclidean norm over the samples, :math:`\sqrt{\sum x^2}`."""

    def of(self, blocks: Blocks) -> jax.Array:
        return _each(lambda x: _sum(jnp.square(x)), blocks)

    def of_lookup(self, counts: jax.Array, samples: int) -> jax.Array:
        return counts.astype(_float())

    def result(self, state: Any, count: jax.Array) -> jax.Array:
        return jnp.sqrt(state)


class Mean(Statistic):
    """Mean over the samples, 0 for none."""

    def of(self, blocks: Blocks) -> jax.Array:
        return _each(_sum, blocks)

    def of_lookup(self, counts: jax.Array, samples: int) -> jax.Array:
        return counts.astype(_float())

    def result(self, state: Any, count: jax.Array) -> jax.Array:
        return state / jnp.maximum(count, 1)[..., None]


class Gram(Statistic):
    r"""Products of the inputs with each other, :math:`X^\top X`; the Hessian up to a factor."""

    def of(self, blocks: Blocks) -> jax.Array:
        x = jnp.concatenate([_wide(b) for b in blocks], axis=-1)
        return jnp.einsum("...si,...sj->...ij", x, x, precision=jax.lax.Precision.HIGHEST)

    def of_lookup(self, counts: jax.Array, samples: int) -> jax.Array:
        return jnp.diag(counts.astype(_float()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bins:
    r"""Counts of values in equal bins between :math:`-2^e` and :math:`2^e`.

    The exponent :math:`e` is the smallest that takes in every value, so the bins of two batches
    are either the same or one halves the other, and merging is exact.

    Args:
      tally: counts, `[*lead, 4096]`.
      exponent: `int32` `[*lead]`.
    """

    tally: Tally
    exponent: jax.Array

    def pooled(self, axes: tuple[int, ...]) -> Bins:
        """Returns the bins of all values along leading axes."""
        if not axes:
            return self
        histogram = Histogram()
        e = jnp.max(self.exponent, axis=axes, keepdims=True)
        tally = histogram.coarser(self, jnp.broadcast_to(e, self.exponent.shape))
        low, high = (jnp.sum(x, axis=axes) for x in (tally.low, tally.high))
        return Bins(Tally.of(low, high), jnp.squeeze(e, axes))

    @property
    def counts(self) -> jax.Array:
        """Number of values in each bin, `float32` `[*lead, 4096]`."""
        return self.tally.total()

    @property
    def edges(self) -> jax.Array:
        """Edges of the bins, `[*lead, 4097]`."""
        n = self.tally.low.shape[-1]
        return jnp.ldexp(jnp.linspace(-1.0, 1.0, n + 1), self.exponent[..., None])


class Histogram(Statistic):
    """Counts of all values of a parameter's input in 4,096 bins."""

    bins: ClassVar[int] = 4096
    _lowest: ClassVar[int] = -125  # Smaller values share the two bins around zero.

    def of(self, blocks: Blocks) -> Bins:
        parts = [_wide(b).reshape(*b.shape[:-2], -1) for b in blocks]
        return self._count(jnp.concatenate(parts, axis=-1))

    def _count(self, x: jax.Array) -> Bins:
        half = self.bins // 2
        _, exponents = jnp.frexp(jnp.where(jnp.isfinite(x), x, 0))
        exponents = jnp.where(x == 0, self._lowest, exponents)
        e = jnp.max(exponents, axis=-1, initial=self._lowest).astype(jnp.int32)
        place = jnp.floor(jnp.ldexp(x, half.bit_length() - 1 - e[..., None])) + half
        place = jnp.where(jnp.isfinite(x), place, self.bins).astype(jnp.int32)

        def one(place: jax.Array) -> jax.Array:
            return jnp.zeros(self.bins, jnp.int32).at[place].add(1, mode="drop")

        for _ in range(x.ndim - 1):
            one = jax.vmap(one)
        return Bins(Tally.of(one(place)), e)

    def of_lookup(self, counts: jax.Array, samples: int) -> Bins:
        # Ones are at the start of a bin of [-2, 2), zeros in the middle one.
        ones, rows = Tally.of(jnp.sum(counts)), counts.shape[0]
        none = Tally.of(jnp.zeros(self.bins, jnp.int32))
        high, low = divmod(samples * rows, 1 << 20)
        zeros = Tally.of(low - ones.low, high - ones.high)
        middle, one = self.bins // 2, self.bins * 3 // 4
        found = jax.tree.map(lambda a, z, o: a.at[middle].add(z).at[one].add(o), none, zeros, ones)
        return Bins(found, jnp.where(jnp.sum(counts) > 0, 1, self._lowest).astype(jnp.int32))

    def zero(self, state: Bins) -> Bins:
        lowest = jnp.full(state.exponent.shape, self._lowest, jnp.int32)
        none = jnp.zeros(state.tally.low.shape, jnp.int32)
        return Bins(Tally.of(none), lowest)

    def merge(self, a: Bins, b: Bins) -> Bins:
        e = jnp.maximum(a.exponent, b.exponent)
        return Bins(self.coarser(a, e).plus(self.coarser(b, e)), e)

    def over(self, state: Bins, axes: tuple[str, ...]) -> Bins:
        e = jax.lax.pmax(state.exponent, axes)
        return Bins(self.coarser(state, e).over(axes), e)

    def coarser(self, state: Bins, e: jax.Array) -> Tally:
        """Counts in the bins of a larger exponent."""
        half = self.bins // 2
        shift = jnp.minimum(e - state.exponent, half.bit_length())

        def one(counts: jax.Array, shift: jax.Array) -> jax.Array:
            place = jnp.right_shift(jnp.arange(self.bins) - half, shift) + half
            return jnp.zeros_like(counts).at[place].add(counts)

        for _ in range(e.ndim):
            one = jax.vmap(one)
        return Tally.of(one(state.tally.low, shift), one(state.tally.high, shift))


class Drift(Statistic):
    r"""What a compressed model changed, :math:`\tilde X^\top (X - \tilde X)`; made of two walks."""


#: Of every input, whatever was asked for.
ALWAYS: dict[str, Statistic] = {"count": Count(), "broken": Broken()}
#: Of two models at once.
PAIRED: dict[str, Statistic] = {"drift": Drift()}
STATISTICS: dict[str, Statistic] = {
    "absmax": Absmax(),
    "minmax": MinMax(),
    "average": Average(),
    "l2": L2(),
    "mean": Mean(),
    "histogram": Histogram(),
    "gram": Gram(),
}


def _float() -> Any:
    """The type of all statistics: one for every branch, whatever it computes in."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_float())


def _each(f: Any, blocks: Blocks) -> jax.Array:
    return jnp.concatenate([f(_wide(b)) for b in blocks], axis=-1)


def _sum(x: jax.Array) -> jax.Array:
    """Sums over the samples in runs of 256, whose rounding errors do not add up."""
    *lead, n, k = x.shape
    whole = n - n % 256
    runs = x[..., :whole, :].reshape(*lead, whole // 256, 256, k)
    sums = jax.lax.optimization_barrier(runs.sum(-2)).sum(-2)
    return sums + x[..., whole:, :].sum(-2)
