"""The leaf of signs laid out for products on a CPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ..._axes import Matrix
from ..._encoded import is_encoded, leaf, static
from ...quant import Tabulated
from ...quant._tables import table_of
from ...quant._xnor import WithSign
from .._laid_out import LaidOut

#: Columns of a panel, and signs of a word: see `cpu.h`.
PANEL, WORD = 64, 32
#: Inputs that lie next to each other, below which a word would be mostly empty.
LEAST = 8


@leaf
class PackedSigns(LaidOut):
    r"""Signs in the order in which a product with signs reads them.

    .. math:: w = \pm s

    In the `[in, out]` view of the core tensor 64 columns are a panel, and 32 inputs along the last
    input axis a word for each column, the first in the lowest bit; a set bit is plus one. What is
    beyond the axis or the columns is not set. See :func:`jaxopt_models.pack`.

    Args:
      signs: `uint32` `[*stack, panels, words, 64]`.
      scale: `float32` `[*stack, panels, 64]`.
      core: shape of the core tensor.
      out: its output axes.
      dtype_name: data type of the tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    signs: jax.Array
    scale: jax.Array
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    dtype_name: str = static()

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the signs."""
        return tuple(self.signs.shape[:-3])

    @property
    def runs(self) -> tuple[int, int]:
        """How many runs of inputs there are along the last input axis, and their length."""
        return runs_of(self.matrix)

    def rebuild(self) -> jax.Array:
        """Gives the scales of one core tensor their signs."""
        m = self.matrix
        scale = self.scale.reshape(1, -1)[:, : m.columns]
        return m.unview(jnp.where(unpack(self.signs, m), scale, -scale)).astype(self.dtype)

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides panels with the first output axis; inputs are not divided."""
        axes = [*spec, *[None] * (self.ndim - len(spec))]
        n, m = len(self.stack), self.matrix
        divided = [a for a in range(len(self.core)) if axes[n + a] is not None]
        if any(a not in m.out[:1] for a in divided):
            return None
        if divided and (Matrix(local[n:], self.out).columns % PANEL or m.columns % PANEL):
            return None
        lead = (*axes[:n], axes[n + divided[0]] if divided else None)
        return dataclasses.replace(
            self, signs=PartitionSpec(*lead, None, None), scale=PartitionSpec(*lead, None)
        )

    def check(self) -> list[str]:
        """Checks the shapes, that scales are finite, and that nothing beyond the tensor is set."""
        want, wrong = (*self.stack, *shape_of(self.matrix)), []
        if self.signs.dtype != jnp.uint32 or tuple(self.signs.shape) != want:
            have = f"{self.signs.dtype}{list(self.signs.shape)}"
            wrong.append(f"signs are {have}, not uint32{list(want)}")
        elif np.any(np.asarray(self.signs) & ~np.asarray(_inside(self.matrix))):
            wrong.append("signs are set beyond the tensor")
        side = (*want[:-2], PANEL)
        if self.scale.dtype != jnp.float32 or tuple(self.scale.shape) != side:
            have = f"{self.scale.dtype}{list(self.scale.shape)}"
            wrong.append(f"scale is {have}, not float32{list(side)}")
        elif not bool(jnp.all(jnp.isfinite(self.scale))):
            wrong.append("scale holds NaN or Inf")
        return wrong


def runs_of(m: Matrix) -> tuple[int, int]:
    """Returns how many runs of inputs there are along the last input axis, and their length."""
    return math.prod(m.in_shape[:-1]), math.prod(m.in_shape[-1:])


def shape_of(m: Matrix) -> tuple[int, int, int]:
    """Returns the shape of the packed signs of a matrix."""
    count, length = runs_of(m)
    return -(-m.columns // PANEL), count * -(-length // WORD), PANEL


def pack(positive: jax.Array, m: Matrix) -> jax.Array:
    """Lays out booleans.

    Args:
      positive: `[rows, columns]`.
      m: the matrix they belong to.

    Returns:
      `uint32` `[panels, words, 64]`.
    """
    count, length = runs_of(m)
    panels, words, _ = shape_of(m)
    each = -(-length // WORD)
    bits = positive.reshape(count, length, m.columns).astype(jnp.uint32)
    width = ((0, 0), (0, each * WORD - length), (0, panels * PANEL - m.columns))
    bits = jnp.pad(bits, width).reshape(count, each, WORD, panels, PANEL)
    place = jnp.arange(WORD, dtype=jnp.uint32).reshape(1, 1, WORD, 1, 1)
    found = jnp.sum(bits << place, axis=2, dtype=jnp.uint32)
    return found.transpose(2, 0, 1, 3).reshape(panels, words, PANEL)


def unpack(signs: jax.Array, m: Matrix) -> jax.Array:
    """Undoes :func:`pack`: booleans `[rows, columns]`."""
    count, length = runs_of(m)
    panels = signs.shape[0]
    place = jnp.arange(WORD, dtype=jnp.uint32).reshape(1, 1, WORD, 1)
    bits = (signs[:, :, None] >> place) & jnp.uint32(1)
    bits = bits.transpose(1, 2, 0, 3).reshape(count, -(-length // WORD) * WORD, panels * PANEL)
    return bits[:, :length, : m.columns].reshape(m.rows, m.columns).astype(bool)


def _inside(m: Matrix) -> jax.Array:
    return pack(jnp.ones((m.rows, m.columns), bool), m)


def why_not(reader: WithSign) -> str:
    """Says why a leaf has no layout for products of signs, ``""`` if it has one."""
    inner = reader.values
    if isinstance(inner, PackedSigns):
        return "it is packed"
    if not isinstance(inner, Tabulated) or tuple(table_of(inner.table).values) != (-1, 1):
        kind = inner.kind() if is_encoded(inner) else "dense values"
        return f"its input counts by its sign, and there is no layout for {kind} with that"
    if is_encoded(inner.scale) and inner.scale.stack != inner.stack:
        return "its scales are stacked otherwise"
    if inner.dtype not in (jnp.float32, jnp.bfloat16):
        return f"there is no layout for tensors of {inner.dtype}"
    m = Matrix(inner.core, inner.out)
    if not m.rows or not m.columns:
        return "it has no entry"
    if inner.scale.shape[-1] != 1:
        return "its inputs have scales in groups"
    count, length = runs_of(m)
    if count > 1 and length < LEAST:
        return f"its last input axis has only {length} entries"
    return ""


def laid_out(reader: WithSign) -> WithSign:
    """Lays out a leaf for which :func:`why_not` has no reason."""
    run = _one
    for _ in reader.stack:
        run = jax.vmap(run)
    return dataclasses.replace(reader, values=run(reader.values))


@jax.jit
def _one(leaf: Tabulated) -> PackedSigns:
    """Lays out one core tensor."""
    m = Matrix(leaf.core, leaf.out)
    scale = leaf.scales().astype(jnp.float32)
    scale = (jnp.repeat(scale, leaf.block, axis=-2) if leaf.block > 1 else scale).reshape(-1)
    panels = shape_of(m)[0]
    scale = jnp.pad(scale, (0, panels * PANEL - m.columns)).reshape(panels, PANEL)
    signs = pack(m.view(leaf.integers()) > 0, m)
    return PackedSigns(signs, scale, tuple(leaf.core), tuple(leaf.out), leaf.dtype_name)
