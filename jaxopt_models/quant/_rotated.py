"""The leaf of weights that are kept rotated, and the rotation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .._axes import Matrix
from .._bits import packed_length, unpack_bits, wide_dtype
from .._encoded import Encoded, divided, faults, leaf, rebuilt, static

# Orders of Hadamard matrices that no smaller ones make, by the prime of Paley's construction.
_PALEY = {12: 11, 20: 19, 28: 13, 36: 17}
_RADIX = 4


@leaf
class Rotated(Encoded):
    r"""A tensor of which a rotation along the inputs is kept.

    .. math:: w = R^\top v, \qquad R = \tfrac{1}{\sqrt b} \, (I \otimes H_b) \, D

    in the `[in, out]` view of the core tensor, with a Hadamard matrix :math:`H_b` of ones and
    minus ones and the signs :math:`D`. `b` divides the number of inputs: it is the largest product
    of a power of two with 1, 12, 20, 28 or 36 that does, so where it is not all of them each
    block of `b` is rotated by itself.

    Zeros of a mask would not survive a rotation, so pruned tensors are not kept so; see
    :class:`Hadamard`. An encoder that is applied to such a leaf rebuilds the tensor and encodes it
    anew.

    Args:
      values: array `[*stack, *core]`, or a leaf of that shape.
      signs: `uint8` `[*stack, ceil(rows / 8)]`, a set bit is a minus.
      core: shape of the core tensor.
      out: its output axes.
      dtype_name: data type of the tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values",)
    values: Any
    signs: jax.Array
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    dtype_name: str = static()

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor."""
        return jnp.dtype(self.dtype_name)

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the signs."""
        return tuple(self.signs.shape[:-1])

    def rebuild(self) -> jax.Array:
        """Rotates the values of one core tensor back."""
        values = rebuilt(self.values)
        m = Matrix(self.core, self.out)
        flips = unpack_bits(self.signs, m.rows)
        x = m.view(values.astype(wide_dtype(self.dtype)))
        return m.unview(rotate(x, flips, back=True)).astype(self.dtype)

    def hidden(self, keep: jax.Array) -> Rotated:
        """Returns this leaf as it is: no one code stands for an entry that a mask hides."""
        return self

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides the values as the tensor, unless that divides inputs, and the signs with none."""
        axes = [*spec, *[None] * (self.ndim - len(spec))]
        n = len(self.stack)
        if any(axes[n + a] is not None for a in range(len(self.core)) if a not in self.out):
            return None
        values = divided(self.values, spec, local)
        signs = PartitionSpec(*axes[:n], None)
        return None if values is None else dataclasses.replace(self, values=values, signs=signs)

    def check(self) -> list[str]:
        """Checks the values, and the layout of the signs."""
        wrong = faults(self.values)
        rows = Matrix(self.core, self.out).rows
        if tuple(self.values.shape) != self.shape:
            wrong.append(f"values have shape {self.values.shape}, the signs say {self.shape}")
        if self.signs.dtype != jnp.uint8 or self.signs.shape[-1] != packed_length(rows):
            have = f"{self.signs.dtype}{list(self.signs.shape)}"
            wrong.append(f"signs are {have}, not bits of {rows} inputs")
        elif rows % 8 and bool(jnp.any(self.signs[..., -1] >> (rows % 8))):
            wrong.append("signs have bits set beyond the last input")
        return wrong


def block_of(rows: int) -> tuple[int, int]:
    """Returns the two factors, one a power of two, of the largest block that divides ``rows``."""
    found = []
    for order in (1, *_PALEY):
        if rows % order == 0:
            rest = rows // order
            found.append((order * (rest & -rest), order))
    size, order = max(found)
    return size // order, order


def rotate(x: jax.Array, flips: jax.Array, *, back: bool = False) -> jax.Array:
    """Rotates along the first axis; see :class:`Rotated`.

    Args:
      x: `[rows, ...]`, at least `float32`.
      flips: booleans `[rows]`, true for a minus.
      back: undo the rotation.

    Returns:
      An array of the shape and type of ``x``.
    """
    rows = x.shape[0]
    shape = x.shape
    signs = jnp.where(flips, -1, 1).astype(x.dtype).reshape(rows, 1)
    x = x.reshape(rows, -1)
    x = x if back else x * signs
    power, order = block_of(rows)
    after = power
    if order > 1:
        x = _times(paley(order).T if back else paley(order), x, power)
    while after > 1:
        radix = min(after, _RADIX)
        after //= radix
        x = _times(_sylvester(radix), x, after)
    x = x * jnp.asarray((power * order) ** -0.5, x.dtype)
    return (x * signs if back else x).reshape(shape)


def _times(h: np.ndarray, x: jax.Array, after: int) -> jax.Array:
    """Multiplies by a small matrix of signs along an axis that ``after`` rows follow each step of.

    The sums are taken in order, so that they are the same in every program.
    """
    n = len(h)
    x = x.reshape(-1, n, after, x.shape[-1])
    signs = jnp.asarray(h, x.dtype)[None, :, :, None, None]
    total = signs[:, :, 0] * x[:, :1]
    for j in range(1, n):
        total = total + signs[:, :, j] * x[:, j : j + 1]
    return total.reshape(-1, x.shape[-1])


def _sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@functools.cache
def paley(order: int) -> np.ndarray:
    """Returns the Hadamard matrix of order 12, 20, 28 or 36 that Paley's construction gives."""
    q = _PALEY[order]
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    i = np.arange(q)
    jacobsthal = chi[(i[:, None] - i) % q]
    core = np.zeros((q + 1, q + 1))
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, chi[-1], jacobsthal
    if order == q + 1:
        return np.eye(order) + core
    unit, flip = np.array([[1, -1], [-1, -1]]), np.array([[1, 1], [1, -1]])
    return np.kron(np.eye(q + 1), unit) + np.kron(core, flip)
