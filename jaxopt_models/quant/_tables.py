"""Tables of the values that codes mean, and the nearest of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

#: Number types by the names of their exponent and mantissa.
FLOATS = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e3m2": "float6_e3m2fn",
    "e2m3": "float6_e2m3fn",
    "e2m1": "float4_e2m1fn",
}


class Table:
    """Values by code, and how a number finds its code.

    Args:
      values: `float32` `[n]`, n at most `2^bits`; not finite where a code is not used.
      even: whether a number in the middle of two values goes to the one of even code, as floats
        are rounded; else to the lower one.
    """

    def __init__(self, values: np.ndarray, *, even: bool):
        self.values = np.where(np.isfinite(values), values, 0).astype(np.float32)
        # Of 0.0 and -0.0 the first code is used, so that pruned entries stay what they were.
        usable = [c for c in np.argsort(values, kind="stable") if np.isfinite(values[c])]
        first = [c for i, c in enumerate(usable) if i == 0 or values[c] != values[usable[i - 1]]]
        self.order = np.array(first, np.int32)
        self.sorted = self.values[self.order]
        self.top = float(np.max(np.abs(self.sorted)))
        ahead = self.sorted.astype(np.float64)
        self.middle = ((ahead[1:] + ahead[:-1]) / 2).astype(np.float32)
        # Whether a number in the middle goes up.
        self.up = (self.order[1:] % 2 == 0) if even else np.zeros(len(self.middle), bool)

    @property
    def lowest(self) -> float:
        """The least value."""
        return float(self.sorted[0])

    @property
    def highest(self) -> float:
        """The greatest value."""
        return float(self.sorted[-1])

    def nearest(self, x: jax.Array) -> jax.Array:
        """Returns the codes of the nearest values, `int32` of the shape of ``x``."""
        middle = jnp.asarray(self.middle, x.dtype)
        if len(self.middle) <= 16:
            place = jnp.zeros(x.shape, jnp.int32)
            for i in range(len(self.middle)):
                beyond = x >= middle[i] if self.up[i] else x > middle[i]
                place = place + beyond.astype(jnp.int32)
        else:
            place = jnp.searchsorted(middle, x, side="left").astype(jnp.int32)
            tie = (x == middle[jnp.minimum(place, len(self.middle) - 1)]) & jnp.asarray(
                np.append(self.up, False)
            )[place]
            place = place + tie
        return jnp.asarray(self.order)[place]


def ascending(values: tuple[float, ...]) -> bool:
    """Says whether values are 2 to 256 different ones, ascending, that `float32` can tell apart."""
    with np.errstate(over="ignore", under="ignore"):
        cast = np.array(values, np.float32)
    small = np.abs(cast) < np.finfo(np.float32).tiny  # which XLA takes for zero
    exact = bool(np.all(np.isfinite(cast))) and bool(np.all(~small | (np.array(values) == 0)))
    return 2 <= len(cast) <= 256 and exact and bool(np.all(cast[1:] > cast[:-1]))


def known_table(name: Any) -> bool:
    """Says whether a leaf may name this table; a file may hold anything."""
    if not isinstance(name, tuple):
        return isinstance(name, str) and name in FLOATS.values()
    return all(type(v) is float for v in name) and ascending(name)


@functools.cache
def table_of(name: str | tuple[float, ...]) -> Table:
    """Returns the table of a number type, or of values that a user gave."""
    if isinstance(name, tuple):
        return Table(np.array(name, np.float32), even=False)
    bits = ml_dtypes.finfo(name).bits
    codes = np.arange(2**bits, dtype=np.uint8)
    return Table(codes.view(np.dtype(name)).astype(np.float32), even=True)
