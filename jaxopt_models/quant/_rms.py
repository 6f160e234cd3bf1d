"""A range as wide as values usually are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._options import number
from ._grid import bounded, large, quotient
from ._observers import Bounds, Observer, Rounding

if TYPE_CHECKING:
    from ._format import Format


@dataclasses.dataclass(frozen=True)
class RMS(Observer):
    r"""The range of so many root mean squares to both sides of zero.

    .. math:: r = t \, \sqrt{\sum_i h_i w_i^2 / \sum_i h_i}

    Nothing is searched, so it is quick enough to be found anew at each step of training. Entries
    that are pruned do not count.

    Args:
      times: the number :math:`t`; ``None`` for the largest value of a format with a symmetric
        table, so that its scale becomes the root mean square, as :class:`Normal` wants it.

    Raises:
      TypeError: if it is no number.
      ValueError: if it is not positive; when called with ``None`` for a format without a table of
        numbers, or for an input.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.Normal(bits=4)(jnp.array([[1.0], [-7.0], [5.0], [-5.0]])).scale
      Array([[5.]], dtype=float32)
    """

    times: float | None = None

    def __post_init__(self) -> None:
        if self.times is not None:
            object.__setattr__(self, "times", number(self.times, "RMS: times"))
            if self.times <= 0:
                raise ValueError(f"RMS: times={self.times!r} must be positive")

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights; see :meth:`Observer.range`."""
        weight = jnp.ones((), x.dtype) if weight is None else weight.astype(x.dtype)
        weight = jnp.broadcast_to(weight, x.shape)
        total = jnp.sum(weight, axis=-2)
        # Squares of very small and very large numbers are beyond those of float32, and so are
        # the reciprocals of the largest.
        top = jnp.max(jnp.where(weight > 0, jnp.abs(x), 0), axis=-2)
        most = jnp.where(top > 0, top, 1)[..., None, :]
        part = jnp.where(most > large(x.dtype), quotient(x, most), x / most)
        mean = jnp.sum(weight * part * part, axis=-2) / jnp.where(total > 0, total, 1)
        high = bounded(top * jnp.sqrt(mean) * self._times(fmt))
        return -high, high

    def _times(self, fmt: Format) -> float:
        table = getattr(fmt, "table", None)
        if self.times is None and not isinstance(table, tuple):
            raise ValueError(f"RMS: {fmt!r} has no table of numbers; give times=")
        return max(map(abs, table)) if self.times is None else self.times

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Returns the range of the values seen."""
        if self.times is None:
            raise ValueError("RMS: an input has no table of numbers; give times=")
        middle = (seen.edges[:-1] + seen.edges[1:]) / 2
        total = jnp.maximum(jnp.sum(seen.counts), 1)
        high = self.times * jnp.sqrt(jnp.sum(seen.counts * middle * middle) / total)
        return -high, high
