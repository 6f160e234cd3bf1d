"""The leaf of integer codes laid out for products on a CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._axes import Matrix
from .._encoded import is_encoded, leaf, static
from ._laid_out import LaidOut

#: Columns of a panel, inputs of a chunk, and inputs of a step: see `cpu.h`.
PANEL, CHUNK, STEP = 64, 32, 4
#: Widths that have a layout; others are stored in the next one.
WIDTHS = (1, 2, 3, 4, 8)


@leaf
class Packed(LaidOut):
    r"""Codes in the order in which a product reads them: of uniform steps, or of a table.

    .. math:: w = s \, (q - 2^{b-1} - z) \quad\text{or}\quad w = s \, t_q

    In the `[in, out]` view of the core tensor 64 columns are a panel and 32 inputs a chunk of it;
    what is beyond the tensor is filled up. See :func:`jaxopt_models.pack`.

    Args:
      codes: `uint8` `[*stack, panels, chunks, 256 * bits]`.
      scale: `float32` `[*stack, panels, groups, 64]`.
      zero: likewise, `z`; ``None`` where it is zero.
      sums: likewise: for each group and column the sum of the codes less offset and `z`; ``None``
        where no input has a zero point.
      table: `float32` `[*stack, 16]`, `t`, for codes of 4 bits; ``None`` for uniform steps.
      core: shape of the core tensor.
      out: its output axes.
      bits: width of a code here, 1, 2, 3, 4 or 8.
      dtype_name: data type of the tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    sums: jax.Array | None
    table: jax.Array | None
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    bits: int = static()
    dtype_name: str = static()

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the codes."""
        return tuple(self.codes.shape[:-3])

    def integers(self) -> jax.Array:
        """Unpacks the codes of one core tensor: `int32` `[in, out]`, less :attr:`offset`."""
        m = self.matrix
        return unpack(self.codes, m.rows, m.columns, self.bits) - self.offset

    @property
    def offset(self) -> int:
        """What is taken off codes."""
        return 0 if self.table is not None else 1 << (self.bits - 1)

    def meaning(self, q: jax.Array) -> jax.Array:
        """Returns what codes less their offset stand for, scale and zero left out."""
        return q.astype(jnp.float32) if self.table is None else self.table[q]

    def rebuild(self) -> jax.Array:
        """Multiplies the codes of one core tensor by their scales."""
        m = self.matrix
        q = self.meaning(self.integers())
        if self.zero is not None:
            q = q - spread(self.zero, m.rows, m.columns)
        return m.unview(q * spread(self.scale, m.rows, m.columns)).astype(self.dtype)

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides panels with the last output axis, and chunks with the first of the inputs."""
        axes = [*spec, *[None] * (self.ndim - len(spec))]
        n, m = len(self.stack), self.matrix
        divided = [a for a in range(len(self.core)) if axes[n + a] is not None]
        rows, columns = m.inner[:1], m.out[:1]
        if any(a not in (*rows, *columns) for a in divided):
            return None
        shard = Matrix(local[n:], self.out)
        by_row = any(a in rows for a in divided)
        by_column = any(a in columns for a in divided)
        groups = self.scale.shape[-2]
        if by_column and (shard.columns % PANEL or m.columns % PANEL):
            return None
        if by_row and (shard.rows % CHUNK or m.rows % CHUNK or self.sums is not None):
            return None
        if by_row and groups > 1 and shard.rows % (m.rows // groups):
            return None
        first = axes[n + rows[0]] if by_row else None
        last = axes[n + columns[0]] if by_column else None
        side = PartitionSpec(*axes[:n], last, first if groups > 1 else None, None)
        rest = {k: side for k in self.parts() if k not in ("codes", "table")}
        if self.table is not None:
            rest["table"] = PartitionSpec(*axes[:n], None)
        return dataclasses.replace(self, codes=PartitionSpec(*axes[:n], last, first, None), **rest)

    def check(self) -> list[str]:
        """Checks the shapes of all parts, and that scales are finite."""
        m, wrong = self.matrix, []
        if self.bits not in WIDTHS:
            return [f"bits={self.bits} is none of {WIDTHS}"]
        want = (*self.stack, *shape_of(m.rows, m.columns, self.bits))
        if self.codes.dtype != jnp.uint8 or tuple(self.codes.shape) != want:
            wrong.append(f"codes are {self.codes.dtype}{list(self.codes.shape)}, not uint8{want}")
        groups = self.scale.shape[-2]
        if groups < 1 or m.rows % groups or (groups > 1 and m.rows // groups % CHUNK):
            wrong.append(f"{groups} groups for {m.rows} inputs")
        for name, part in self.parts().items():
            if name == "codes":
                continue
            if name == "table":
                if (tuple(part.shape), self.bits, self.zero) != ((*self.stack, 16), 4, None):
                    wrong.append(f"a table {list(part.shape)} for codes of {self.bits} bits")
                continue
            if tuple(part.shape) != (*want[:-2], groups, PANEL) or part.dtype != jnp.float32:
                wrong.append(f"{name} is {part.dtype}{list(part.shape)} for {groups} groups")
            elif not bool(jnp.all(jnp.isfinite(part))):
                wrong.append(f"{name} holds NaN or Inf")
        return wrong


@leaf
class Layer(Packed):
    """One tensor of a stack whose codes stay where they are.

    Args:
      codes: of the whole stack, `[layers, panels, chunks, 256 * bits]`.
      scale: of this tensor, as is all else that is floating.
      index: which tensor it is, `int32` `[]`.
    """

    index: jax.Array

    @property
    def stack(self) -> tuple[int, ...]:
        """None: it is one tensor."""
        return ()

    def rebuild(self) -> jax.Array:
        """Rebuilds this tensor."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Packed)}
        codes = jax.lax.dynamic_index_in_dim(self.codes, self.index, keepdims=False)
        return Packed(**{**fields, "codes": codes}).rebuild()

    def specs(self, spec: Any, local: tuple[int, ...]) -> None:
        """Says that it is not divided: it lives inside a loop."""


def unstacked(leaf: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """Takes a stack apart so that a loop need not copy the codes of each of its tensors.

    Args:
      leaf: packed codes, or a leaf around them.

    Returns:
      What a loop runs over, and what makes one tensor of a slice of that; ``None`` for anything but
      one stack axis around packed codes.
    """
    if type(leaf) is Packed and len(leaf.stack) == 1:
        floating = {n: getattr(leaf, n) for n in ("scale", "zero", "sums", "table")}
        fixed = {n: getattr(leaf, n) for n in Packed.static_names}
        index = jnp.arange(leaf.stack[0], dtype=jnp.int32)
        return {**floating, "index": index}, lambda part: Layer(codes=leaf.codes, **part, **fixed)
    if not is_encoded(getattr(leaf, "values", None)):
        return None
    inside = unstacked(leaf.values)
    if inside is None:
        return None
    parts, open_ = inside
    rest = {n: p for n, p in leaf.parts().items() if n != "values"}

    def opened(part: Any) -> Any:
        return dataclasses.replace(leaf, values=open_(part["values"]), **part["rest"])

    return {"values": parts, "rest": rest}, opened


def shape_of(rows: int, columns: int, bits: int) -> tuple[int, int, int]:
    """Returns the shape of the packed codes of a matrix."""
    return -(-columns // PANEL), -(-rows // CHUNK), 4 * PANEL * bits


@functools.partial(jax.jit, static_argnums=1)
def pack(q: jax.Array, bits: int) -> jax.Array:
    """Lays out unsigned codes.

    Args:
      q: integers `[rows, columns]`, 0 to `2^bits - 1`.
      bits: 1, 2, 3, 4 or 8.

    Returns:
      `uint8` `[panels, chunks, 256 * bits]`; what is beyond the matrix is `2^(bits - 1)`.
    """
    rows, columns = q.shape
    panels, chunks, _ = shape_of(rows, columns, bits)
    width = ((0, chunks * CHUNK - rows), (0, panels * PANEL - columns))
    q = jnp.pad(q.astype(jnp.uint8), width, constant_values=1 << (bits - 1))
    q = q.reshape(chunks, 8, STEP, panels, 4, 16).transpose(3, 0, 1, 4, 5, 2)
    q = q.reshape(panels, chunks, 8, 4 * PANEL)
    if bits == 3:
        low, top = _share(q & 3, 2), _share(q >> 2, 1)
        return jnp.concatenate([low, top], axis=2).reshape(panels, chunks, 4 * PANEL * bits)
    return _share(q, bits).reshape(panels, chunks, 4 * PANEL * bits)


def _share(q: jax.Array, bits: int) -> jax.Array:
    """Puts neighbouring steps into one byte."""
    each = 8 // bits
    q = q.reshape(*q.shape[:2], 8 // each, each, q.shape[-1])
    place = (bits * jnp.arange(each, dtype=jnp.uint8)).reshape(1, 1, 1, each, 1)
    return jnp.sum(q << place, axis=3, dtype=jnp.uint8)


def unpack(codes: jax.Array, rows: int, columns: int, bits: int) -> jax.Array:
    """Undoes :func:`pack`: `int32` `[rows, columns]`."""
    panels, chunks, _ = codes.shape
    lines = codes.reshape(panels, chunks, bits, 4 * PANEL)
    if bits == 3:
        q = _part(lines[:, :, :2], 2) | (_part(lines[:, :, 2:], 1) << 2)
    else:
        q = _part(lines, bits)
    q = q.reshape(panels, chunks, 8, 4, 16, STEP).transpose(1, 2, 5, 0, 3, 4)
    return q.reshape(chunks * CHUNK, panels * PANEL)[:rows, :columns].astype(jnp.int32)


def _part(lines: jax.Array, bits: int) -> jax.Array:
    each = 8 // bits
    place = (bits * jnp.arange(each, dtype=jnp.uint8)).reshape(1, 1, 1, each, 1)
    q = (lines[:, :, :, None] >> place) & jnp.uint8((1 << bits) - 1)
    return q.reshape(*q.shape[:2], 8, q.shape[-1])


def to_panels(x: jax.Array) -> jax.Array:
    """Lays out what belongs to groups and columns, `[groups, columns]`: `[panels, groups, 64]`."""
    groups, columns = x.shape
    panels = -(-columns // PANEL)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, panels * PANEL - columns)))
    return x.reshape(groups, panels, PANEL).swapaxes(0, 1)


def spread(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Gives what belongs to groups, `[panels, groups, 64]`, to each entry: `[rows, columns]`."""
    panels, groups, _ = x.shape
    flat = x.swapaxes(0, 1).reshape(groups, 1, panels * PANEL)[:, :, :columns]
    each = rows // groups if groups else 0
    return jnp.broadcast_to(flat, (groups, each, columns)).reshape(rows, columns)
