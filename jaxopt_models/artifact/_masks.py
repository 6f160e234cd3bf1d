"""Masks: which entries of a tensor are kept, in the fewest bytes."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from . import _lines, _symbols
from ._errors import ArtifactError
from ._varint import read_varint, write_varint

_ALPHABETS = (15, 31, 63, 127, 255)
# Lines cost some 40 us each, so they must be few or long.
_FEW_LINES = 512
_LONG_LINE = 32
_LEAST_LINES = 8
_LEAST_ENTRIES = 256


class MaskLayout(enum.IntEnum):
    """How a mask is stored; the value is what a file holds."""

    CONSTANT = 0
    BITMAP = 1
    GAPS = 2
    LINES = 3


@dataclasses.dataclass(frozen=True)
class MaskStream:
    """A coded mask; its shape is kept by its owner."""

    layout: MaskLayout
    table: bytes
    payload: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of table and payload together."""
        return len(self.table) + len(self.payload)


def encode_mask(
    keep: ArrayLike, *, layouts: tuple[MaskLayout, ...] = tuple(MaskLayout)
) -> MaskStream:
    """Codes a mask with the smallest of several layouts.

    The mask is seen as a matrix of ``shape[-1]`` columns. ``CONSTANT`` holds masks that
    keep all or nothing, ``BITMAP`` one bit an entry, ``GAPS`` the numbers of dropped
    entries before each kept one, along rows or along columns, where the symbol ``M``
    (15 to 255) means ``M`` more dropped entries and no kept one, and ``LINES`` every
    entry with its chance under a model that learns how kept entries concentrate in rows,
    columns and neighbours. A mask that keeps more than half is coded by what it drops.

    Args:
      keep: booleans, shape `[..., n]` or `[]`.
      layouts: the layouts to try. Where none of them can hold the mask, an error.

    Returns:
      The :class:`MaskStream` of fewest bytes, table included.

    Raises:
      TypeError: if ``keep`` is not boolean.
      ValueError: if none of the layouts can hold the mask.

    Example:
      >>> import numpy as np
      >>> from jaxopt_models.artifact import decode_mask, encode_mask
      >>> keep = np.random.default_rng(0).random((64, 100)) < 0.05
      >>> mask = encode_mask(keep)
      >>> mask.layout.name, mask.nbytes < 260
      ('LINES', True)
      >>> back = decode_mask(mask.layout, mask.table, mask.payload, (64, 100))
      >>> bool((back == keep).all())
      True
    """
    keep = np.asarray(keep)
    if keep.dtype != np.bool_:
        raise TypeError(f"keep must be boolean, got {keep.dtype}")
    flat = keep.reshape(-1)
    kept = int(np.count_nonzero(flat))
    if kept in (0, keep.size):
        if MaskLayout.CONSTANT not in layouts:
            raise ValueError(f"only MaskLayout.CONSTANT holds a mask that keeps {kept} entries")
        return MaskStream(MaskLayout.CONSTANT, b"\1" if kept else b"\0", b"")
    # Codes the rarer of the two.
    inverted = 2 * kept > keep.size
    views = _views(keep != inverted, keep.shape)
    found: list[MaskStream] = []
    if MaskLayout.GAPS in layouts:
        found += [_encode_gaps(view, k | inverted << 1) for k, view in views.items()]
    if MaskLayout.LINES in layouts:
        suited = [k for k, view in views.items() if _suits_lines(view.shape)]
        if suited:
            which, params = _lines.tune([views[k] for k in suited])
            table, payload = _lines.encode(views[suited[which]], params)
            head = bytes([suited[which] | inverted << 1])
            found.append(MaskStream(MaskLayout.LINES, head + table, payload))
    if MaskLayout.BITMAP in layouts:
        found.append(MaskStream(MaskLayout.BITMAP, b"", np.packbits(flat).tobytes()))
    if not found:
        names = [layout.name for layout in layouts]
        raise ValueError(f"none of {names} can hold a mask of shape {keep.shape}; allow more")
    return min(found, key=lambda m: (m.nbytes, m.layout))


def decode_mask(layout: int, table: bytes, payload: bytes, shape: Sequence[int]) -> np.ndarray:
    """Reads a mask back, and refuses what :func:`encode_mask` cannot write.

    What the mask needs at least is compared with the payload before anything is
    allocated. Only a constant has no payload: the owner of the mask bounds its shape.

    Args:
      layout: a :class:`MaskLayout` or its number.
      table: the table of the mask.
      payload: the payload of the mask.
      shape: shape of the mask.

    Returns:
      `bool` of ``shape``.

    Raises:
      ArtifactError: if anything is not as :func:`encode_mask` would have written it.
    """
    shape = tuple(shape)
    size = math.prod(shape)
    if layout == MaskLayout.CONSTANT:
        if payload or table not in (b"\0", b"\1") or (table == b"\1" and not size):
            raise ArtifactError("a constant mask is neither all nor nothing")
        return np.full(shape, table == b"\1")
    if layout == MaskLayout.BITMAP:
        return _decode_bitmap(table, payload, size).reshape(shape)
    if layout not in (MaskLayout.GAPS, MaskLayout.LINES):
        raise ArtifactError(f"a mask has the unknown layout {layout!r}")
    if not table or table[0] & ~(31 if layout == MaskLayout.GAPS else 3):
        raise ArtifactError("a mask has an unknown table")
    columns = shape[-1] if shape else 1
    rows = size // columns if columns else 0
    flipped, inverted = table[0] & 1, table[0] >> 1 & 1
    if flipped and min(rows, columns) < 2:
        raise ArtifactError("a mask of one line is coded along the other axis")
    if flipped:
        rows, columns = columns, rows
    if layout == MaskLayout.GAPS:
        mask = _decode_gaps(table, payload, size).reshape(rows, columns)
    elif not _suits_lines((rows, columns)):
        raise ArtifactError(f"a mask of shape {shape} is not coded by lines")
    else:
        mask = _lines.decode(table[1:], payload, rows, columns)
    return ((mask.T if flipped else mask) != inverted).reshape(shape)


def _views(mask: np.ndarray, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """The mask as a matrix, and transposed where that is something else."""
    rows = mask.reshape(-1, shape[-1] if shape else 1)
    if min(rows.shape) < 2:
        return {0: rows}
    return {0: rows, 1: np.ascontiguousarray(rows.T)}


def _suits_lines(shape: tuple[int, ...]) -> bool:
    lines, places = shape
    if lines < _LEAST_LINES or lines * places < _LEAST_ENTRIES:
        return False
    return lines <= _FEW_LINES or places >= _LONG_LINE


def _encode_gaps(view: np.ndarray, flags: int) -> MaskStream:
    gaps = np.diff(np.flatnonzero(view), prepend=-1) - 1
    most = int(gaps.max())
    choices = [k for k, m in enumerate(_ALPHABETS) if k == 0 or m <= 2 * most]
    k = min(choices, key=lambda k: _gap_cost(gaps, _ALPHABETS[k]))
    escapes = gaps // _ALPHABETS[k]
    symbols = np.full(len(gaps) + int(escapes.sum()), _ALPHABETS[k], np.uint8)
    symbols[np.cumsum(escapes + 1) - 1] = gaps % _ALPHABETS[k]
    coded = _symbols.encode(symbols, _ALPHABETS[k] + 1)
    head = bytes([flags | k << 2]) + write_varint(len(symbols))
    return MaskStream(MaskLayout.GAPS, head + bytes([coded.coder]) + coded.table, coded.payload)


def _gap_cost(gaps: np.ndarray, m: int) -> float:
    """Bits of the gaps at their entropy, and of learning the frequencies."""
    counts = np.bincount(gaps % m, minlength=m + 1)
    counts[m] = (gaps // m).sum()
    counts = counts[counts > 0]
    n = counts.sum()
    return float(-(counts * np.log2(counts / n)).sum() + len(counts) * math.log2(n) / 2)


def read_gaps(table: bytes, payload: bytes, size: int) -> tuple[np.ndarray, int, bytes]:
    """Reads the symbols of a mask of gaps; also returns their coder and its table."""
    choice = table[0] >> 2
    if choice >= len(_ALPHABETS):
        raise ArtifactError("a mask has an unknown table")
    m = _ALPHABETS[choice]
    count, end = read_varint(table, 1)
    # Every symbol moves on by an entry at least.
    if not 0 < count <= size or end >= len(table):
        raise ArtifactError(f"a mask of {size} entries claims {count} gaps")
    coder, inner = table[end], table[end + 1 :]
    return _symbols.decode(coder, inner, payload, count, m + 1), coder, inner


def _decode_gaps(table: bytes, payload: bytes, size: int) -> np.ndarray:
    symbols, _, _ = read_gaps(table, payload, size)
    m = _ALPHABETS[table[0] >> 2]
    if symbols[-1] == m:
        raise ArtifactError("a mask ends with a gap and no entry")
    kept = symbols != m
    places = np.cumsum(symbols.astype(np.int64) + kept)[kept] - 1
    if places[-1] >= size:
        raise ArtifactError(f"a mask keeps entry {places[-1]} of {size}")
    mask = np.zeros(size, bool)
    mask[places] = True
    return mask


def _decode_bitmap(table: bytes, payload: bytes, size: int) -> np.ndarray:
    if table or not size or len(payload) != -(-size // 8):
        raise ArtifactError(f"{len(payload)} bytes are no bitmap of {size} entries")
    if payload[-1] & (1 << -size % 8) - 1:
        raise ArtifactError("the bits after a bitmap are not zero")
    return np.unpackbits(np.frombuffer(payload, np.uint8), count=size).astype(bool)
