"""Leaves that store only what a mask keeps, laid out for products on a CPU."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..._encoded import leaf, static
from .._laid_out import LaidOut

#: Inputs of a unit, best first; columns of a panel, and runs of four in a word of places.
UNITS = (16, 8, 4)
PANEL, RUNS = 16, 8


@leaf
class PackedBlocks(LaidOut):
    r"""Runs of neighbouring inputs that are kept, column after column.

    .. math:: w_{u i_k + t,\, j} = s_j \, v_{k t}, \qquad b_j \le k < b_{j + 1}

    in the `[in, out]` view of the core tensor; all else is zero. See :func:`jaxopt_models.pack`.

    Args:
      values: `v`, `float32`, `bfloat16` or `int8` `[*stack, units, u]`.
      index: `i`, `uint16` `[*stack, units]`, which run of `u` inputs each unit is.
      starts: `b`, `int32` `[*stack, columns + 1]`.
      scale: `s`, `float32` `[*stack, columns]`; ``None`` where the values are no codes.
      core: shape of the core tensor.
      out: its output axes.
      dtype_name: data type of the tensor.
    """

    values: jax.Array
    index: jax.Array
    starts: jax.Array
    scale: jax.Array | None
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    dtype_name: str = static()

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the values."""
        return tuple(self.values.shape[:-2])

    def trained(self) -> tuple[str, ...]:
        """Returns the values, or the scales of codes."""
        return ("values",) if self.scale is None else ("scale",)

    def rebuild(self) -> jax.Array:
        """Puts the units of one core tensor where they were."""
        m, (units, unit) = self.matrix, self.values.shape
        # A unit beyond the last start is in no column, and is dropped.
        place = jnp.arange(units, dtype=self.starts.dtype)
        column = jnp.searchsorted(self.starts, place, side="right") - 1
        v = self.values
        if self.scale is not None:
            v = v.astype(jnp.float32) * self.scale[column][:, None]
        dense = jnp.zeros((m.rows // unit, m.columns, unit), self.dtype)
        run = self.index.astype(jnp.int32)
        dense = dense.at[run, column].set(v.astype(self.dtype), mode="drop")
        return m.unview(dense.swapaxes(1, 2).reshape(m.rows, m.columns))

    def check(self) -> list[str]:
        """Checks shapes and types, that columns start in order, and that indices are inputs."""
        m, (*stack, units, unit) = self.matrix, self.values.shape
        want = {"index": ("uint16", (units,)), "starts": ("int32", (m.columns + 1,))}
        if self.scale is not None:
            want["scale"] = ("float32", (m.columns,))
        wrong = []
        for name, (dtype, shape) in want.items():
            part = getattr(self, name)
            if part.dtype != dtype or tuple(part.shape) != (*stack, *shape):
                have = f"{part.dtype}{list(part.shape)}"
                wrong.append(f"{name} is {have}, not {dtype}{[*stack, *shape]}")
        if unit not in UNITS or m.rows % unit:
            wrong.append(f"units of {unit} for {m.rows} inputs")
        kinds = ("int8",) if self.scale is not None else ("float32", "bfloat16")
        if self.values.dtype not in kinds:
            wrong.append(f"values are {self.values.dtype}, none of {', '.join(kinds)}")
        if wrong:
            return wrong
        starts, index = np.asarray(self.starts), np.asarray(self.index)
        if np.any(np.diff(starts) < 0) or np.any(starts[..., 0]) or np.any(starts > units):
            wrong.append("starts are not ascending from 0 to the number of units")
        if np.any(index >= m.rows // unit):
            wrong.append("an index is beyond the inputs")
        if self.scale is not None and not np.all(np.isfinite(self.scale)):
            wrong.append("scale holds NaN or Inf")
        return wrong


@leaf
class PackedPairs(LaidOut):
    r"""At most two of every four inputs of each column, and which of them these are.

    In the `[in, out]` view of the core tensor 16 columns are a panel and 32 inputs, eight runs of
    four, a chunk. What is beyond the tensor, and what a run has less, is zero. See
    :func:`jaxopt_models.pack`.

    Args:
      values: `float32` or `bfloat16` `[*stack, panels, chunks, 8, 2, 16]`.
      places: `uint32` `[*stack, panels, chunks, 16]`, for each column two bits for each value of a
        chunk, in their order from the lowest up.
      core: shape of the core tensor.
      out: its output axes.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values",)
    values: jax.Array
    places: jax.Array
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the values."""
        return self.values.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the values."""
        return tuple(self.places.shape[:-3])

    def rebuild(self) -> jax.Array:
        """Puts the values of one core tensor where they were."""
        m, v = self.matrix, self.values
        shift = (2 * jnp.arange(2 * RUNS, dtype=jnp.uint32)).reshape(1, 1, RUNS, 2, 1)
        place = (self.places[:, :, None, None] >> shift) & jnp.uint32(3)
        zero = jnp.zeros((), v.dtype)
        four = [
            jnp.where(
                place[..., 0, :] == t,
                v[..., 0, :],
                jnp.where(place[..., 1, :] == t, v[..., 1, :], zero),
            )
            for t in range(4)
        ]
        panels, chunks = v.shape[:2]
        dense = jnp.stack(four, axis=3).transpose(1, 2, 3, 0, 4)
        dense = dense.reshape(chunks * RUNS * 4, panels * PANEL)
        return m.unview(dense[: m.rows, : m.columns])

    def check(self) -> list[str]:
        """Checks the shapes and types of the parts."""
        m = self.matrix
        lead = (*self.stack, -(-m.columns // PANEL), -(-m.rows // (4 * RUNS)))
        wrong = []
        if tuple(self.values.shape) != (*lead, RUNS, 2, PANEL) or m.rows % 4:
            wrong.append(f"values have shape {list(self.values.shape)} for the tensor {self.core}")
        if self.values.dtype not in (jnp.float32, jnp.bfloat16):
            wrong.append(f"values are {self.values.dtype}, not float32 or bfloat16")
        if tuple(self.places.shape) != (*lead, PANEL) or self.places.dtype != jnp.uint32:
            have = f"{self.places.dtype}{list(self.places.shape)}"
            wrong.append(f"places are {have}, not uint32{[*lead, PANEL]}")
        return wrong
