"""How the range of a grid is chosen: of weights, and of inputs from what was seen of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._options import Brief, flag, number, portion, whole
from ._entropy import BINS, entropy_range
from ._grid import quotient

if TYPE_CHECKING:
    from ._format import Format

Bounds = tuple[jax.Array, jax.Array]
Rounding = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Observer(Brief):
    """A rule that chooses the range of a grid, which always holds zero."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it wants of the inputs of a weight."""
        return ()

    @property
    def watches(self) -> str:
        """The statistic by which it chooses the range of an input."""
        return "histogram"

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights.

        Args:
          x: runs `[groups, run, columns]`.
          fmt: the format that rounds them.
          weight: importance of the entries, of a shape that broadcasts to that of ``x``; zero
            for pruned ones.

        Returns:
          Lowest and highest value, `[groups, columns]`: at most zero and at least zero.
        """
        return whole_range(x)

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Chooses the range of an input.

        Args:
          seen: the statistic :attr:`watches`, of one tensor.
          rounding: from values and a range to what the grid of that range makes of them.
          levels: number of magnitudes of the grid.

        Returns:
          Lowest and highest value.
        """
        raise NotImplementedError


def whole_range(x: jax.Array) -> Bounds:
    """Returns the least and the greatest value along the runs, and zero."""
    zero = jnp.zeros((), x.dtype)
    return jnp.minimum(jnp.min(x, axis=-2), zero), jnp.maximum(jnp.max(x, axis=-2), zero)


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """The range of what was seen: nothing is clipped.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.Int(bits=4, observer=quant.MinMax())(jnp.array([[7.0], [-1.0]])).scale
      Array([[1.]], dtype=float32)
    """

    @property
    def watches(self) -> str:
        """The least and the greatest value."""
        return "minmax"

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Returns the range of all batches."""
        return seen.min.min(), seen.max.max()


@dataclasses.dataclass(frozen=True)
class AbsMax(MinMax):
    """The range around zero up to the largest magnitude, whatever the signs."""

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights; see :meth:`Observer.range`."""
        top = jnp.max(jnp.abs(x), axis=-2)
        return -top, top

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Returns the range of all batches, made symmetric."""
        top = jnp.maximum(-seen.min.min(), seen.max.max())
        return -top, top


@dataclasses.dataclass(frozen=True)
class MovingAverage(MinMax):
    r"""The average of the ranges of batches, later ones weighing more; of inputs only.

    .. math:: m_t = 0.9 \, m_{t-1} + 0.1 \max x_t, \qquad m = m_T / (1 - 0.9^T)

    An outlier of one batch is averaged away. Of a weight, which has no batches, it is the whole
    range.
    """

    @property
    def watches(self) -> str:
        """The averages of the least and of the greatest value."""
        return "average"


@dataclasses.dataclass(frozen=True)
class Percentile(Observer):
    r"""The range that holds the given percentage of values, the same share cut off each side.

    Args:
      percent: more than 50, at most 100.

    Raises:
      TypeError: if it is no number.
      ValueError: outside that range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jnp.arange(-50.0, 51.0)[:, None]
      >>> quant.Int(bits=8, observer=quant.Percentile(99.0))(w).materialize().max()
      Array(49., dtype=float32)
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        percent = number(self.percent, "Percentile: percent")
        object.__setattr__(self, "percent", percent)
        if not 50 < percent <= 100:
            raise ValueError(f"Percentile: percent={percent!r} is not in (50, 100]")

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights; pruned entries do not count."""
        if weight is not None:
            x = jnp.where(weight > 0, x, jnp.nan)
        low, high = (jnp.nanpercentile(x, q, axis=-2) for q in (100 - self.percent, self.percent))
        return jnp.fmin(low, 0).astype(x.dtype), jnp.fmax(high, 0).astype(x.dtype)

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Returns the edges of the bins that the percentiles fall into."""
        below = jnp.cumsum(seen.counts)
        share = self.percent / 100 * below[-1]
        low = jnp.searchsorted(below, below[-1] - share, side="right")
        high = jnp.searchsorted(below, share, side="left")
        return seen.edges[low], seen.edges[high + 1]


@dataclasses.dataclass(frozen=True)
class MSE(Observer):
    r"""The range with the least error of rounding, searched among shrunk ones.

    .. math:: \min_{f \in [\mathrm{least}, 1]} \sum_i h_i |w_i - Q_f(w_i)|^p

    The whole range is among them, so the error is never above that of :class:`MinMax`. Encoding
    again may move the values.

    Args:
      steps: number of ranges tried, evenly from the whole one down.
      least: the smallest, as a part of the whole range.
      power: the exponent :math:`p`.
      weighted: weigh each error by the mean square of the input that it is multiplied with, the
        diagonal of the Hessian; needs the statistic ``l2``. Else :math:`h_i = 1`.

    Raises:
      TypeError: for options of another type.
      ValueError: for options out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jnp.concatenate([jnp.linspace(-1, 1, 64), jnp.array([3.0])])[:, None]
      >>> error = lambda q: float(jnp.mean((w - q.materialize()) ** 2))
      >>> error(quant.Int(bits=3, observer=quant.MSE())(w)) < error(quant.Int(bits=3)(w))
      True
    """

    steps: int = 64
    _: dataclasses.KW_ONLY
    least: float = 0.2
    power: float = 2.0
    weighted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole(self.steps, "MSE: steps", least=2))
        object.__setattr__(self, "least", portion(self.least, "MSE: least"))
        object.__setattr__(self, "power", number(self.power, "MSE: power"))
        if self.power <= 0 or self.least == 0:
            raise ValueError(f"MSE: power={self.power!r}, least={self.least!r} must be positive")
        flag(self.weighted, "MSE: weighted")

    @property
    def needs(self) -> tuple[str, ...]:
        """The mean squares of inputs, where errors are weighted."""
        return ("l2",) if self.weighted else ()

    def _factors(self, dtype: Any) -> jax.Array:
        return jnp.linspace(1.0, self.least, self.steps, dtype=dtype)

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights; see :meth:`Observer.range`."""
        low, high = whole_range(x)

        def loss(f: jax.Array) -> jax.Array:
            grid = fmt.grid(low * f, high * f)
            rounded = fmt.round(x, jax.tree.map(lambda a: a[..., None, :], grid))
            error = jnp.abs(x - rounded) ** self.power
            return jnp.sum(error if weight is None else error * weight, axis=-2)

        factors = self._factors(x.dtype)
        best = factors[jnp.argmin(jax.lax.map(loss, factors), axis=0)]
        return low * best, high * best

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Searches the range with the least error of the values seen."""
        edges, counts = seen.edges, seen.counts
        middle = (edges[:-1] + edges[1:]) / 2
        hit = counts > 0
        low = jnp.minimum(jnp.min(jnp.where(hit, edges[:-1], 0)), 0)
        high = jnp.maximum(jnp.max(jnp.where(hit, edges[1:], 0)), 0)

        def loss(f: jax.Array) -> jax.Array:
            error = jnp.abs(middle - rounding(middle, low * f, high * f)) ** self.power
            return jnp.sum(error * counts)

        factors = self._factors(edges.dtype)
        best = factors[jnp.argmin(jax.lax.map(loss, factors))]
        return low * best, high * best


@dataclasses.dataclass(frozen=True)
class Entropy(Observer):
    r"""TensorRT's range: the least Kullback-Leibler divergence of the rounded histogram.

    Histograms have 2,048 bins of magnitudes; see the slides of S. Migacz, `8-bit Inference with
    TensorRT`, GTC 2017.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jnp.concatenate([jnp.linspace(-1, 1, 999), jnp.array([9.0])])[:, None]
      >>> bool(quant.Int(bits=8, observer=quant.Entropy())(w).materialize().max() < 8)
      True
    """

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights; see :meth:`Observer.range`."""
        size = jnp.abs(x)
        top = jnp.max(size, axis=-2)
        kept = jnp.ones(x.shape) if weight is None else jnp.broadcast_to(weight > 0, x.shape)

        def one(size: jax.Array, kept: jax.Array, top: jax.Array) -> jax.Array:
            width = jnp.where(top > 0, top, 1) / BINS
            place = jnp.minimum(jnp.floor(quotient(size, width)), BINS - 1).astype(jnp.int32)
            counts = jnp.zeros(BINS, jnp.float32).at[place].add(kept.astype(jnp.float32))
            return entropy_range(counts, width, fmt.magnitudes)

        one = jax.vmap(one, in_axes=-1, out_axes=-1)
        best = jax.vmap(one)(size, kept, top)
        low, high = whole_range(x)
        return jnp.maximum(low, -best), jnp.minimum(high, best)

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Chooses the range by the histogram seen, both signs folded together."""
        half = seen.counts.shape[-1] // 2
        counts = seen.counts[half:] + seen.counts[:half][::-1]
        best = entropy_range(counts, seen.edges[half + 1], levels)
        hit = seen.counts > 0
        low = jnp.min(jnp.where(hit, seen.edges[:-1], 0))
        high = jnp.max(jnp.where(hit, seen.edges[1:], 0))
        return jnp.maximum(low, -best), jnp.minimum(high, best)
