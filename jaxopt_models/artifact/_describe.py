"""What a section holds: descriptions in the index, checked before anything is read.

- ``[0, dtype, shape, stored]`` an array; ``stored`` is the type of its raw bytes, or ``""``
  for small integers, which are entropy-coded: coder and two lengths follow;
- ``[1, impl, array]`` random keys, with the description of their data;
- ``[name, [static fields], [parts]]`` a leaf; a part is ``None`` or one of these, or where
  its class declares it
- ``[2, stack, layout, table, payload]`` a mask, with the lengths of its streams, or
- ``[3, stack, coder, table, payload]`` packed codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .._encoded import Encoded, Masked
from ..codebook._clustered import Clustered
from ..quant._quantized import Quantized
from ._errors import ArtifactError
from ._masks import MaskLayout
from ._symbols import Coder

ARRAY, KEYS, MASK, CODES = 0, 1, 2, 3
BUILT_IN: dict[str, type[Encoded]] = {c.__name__: c for c in (Masked, Quantized, Clustered)}

#: Integer types that are entropy-coded: their bits and whether they are signed.
SMALL = {"bool": (1, False)} | {
    f"{sign}int{bits}": (bits, not sign) for bits in (2, 4, 8) for sign in ("", "u")
}
_MINI = {name for name in dir(ml_dtypes) if name.startswith("float") and name != "finfo"}
_FLOATS = {"float16", "float32", "float64", "bfloat16"} | _MINI
#: Types that are stored as raw little-endian bytes.
RAW = _FLOATS | {f"{sign}int{bits}" for bits in (16, 32, 64) for sign in ("", "u")}
RAW |= {"complex64", "complex128"}

_DEPTH = 8
_MOST_AXES = 32


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stream of a section: what it is, how it is coded, its bytes (``None``: the rest)."""

    part: str
    coder: str
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class Described:
    """A checked description.

    Args:
      kind: ``"dense"``, ``"keys"`` or the nesting of leaves.
      shape: shape of the tensor.
      pieces: its streams in order.
      entries: entries of all arrays that reading it allocates.
    """

    kind: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    entries: int


def class_name(cls: type) -> str:
    """Returns the name a file gives to a leaf class."""
    known = BUILT_IN.get(cls.__name__) is cls
    return cls.__name__ if known else f"{cls.__module__}:{cls.__qualname__}"


def to_tuple(value: Any) -> Any:
    """Turns the lists of a file into the tuples of static fields."""
    return tuple(map(to_tuple, value)) if isinstance(value, list) else value


def check(d: Any, types: Mapping[str, type[Encoded]]) -> Described:
    """Checks the description of a section and says what it holds.

    Args:
      d: what the index holds.
      types: leaf classes that a file may name.

    Returns:
      What it holds.

    Raises:
      ArtifactError: if it is malformed, or names a class that was not given.
    """
    try:
        return _check(d, types, masked=False, depth=0)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as e:
        if isinstance(e, ArtifactError):
            raise
        raise ArtifactError(f"a description is malformed: {d!r:.80}") from e


def _check(d: Any, types: Mapping[str, type[Encoded]], *, masked: bool, depth: int) -> Described:
    _need(type(d) is list and len(d) >= 3 and depth < _DEPTH, d)
    if type(d[0]) is str:
        return _check_leaf(d, types, depth)
    if d[0] == KEYS:
        _need(len(d) == 3 and type(d[1]) is str and d[2][0] == ARRAY, d)
        data = _check(d[2], types, masked=False, depth=depth + 1)
        pieces = tuple(dataclasses.replace(p, part="keys") for p in data.pieces)
        return Described("keys", data.shape[:-1], pieces, data.entries)
    _need(d[0] == ARRAY and type(d[1]) is str, d)
    shape = _shape(d[2])
    entries = math.prod(shape)
    if d[3] == "":
        _need(d[1] in SMALL, d)
        return Described("dense", shape, _coded("dense", d[4:], Coder), entries)
    _need(d[1] in RAW and d[3] in RAW and len(d) == 4, d)
    _need(d[3] == d[1] or (d[1] == "float32" and d[3] in ("bfloat16", "float16")), d)
    size = None if masked else entries * np.dtype(d[3]).itemsize
    return Described("dense", shape, (Piece("dense", d[3], size),), entries)


def _check_leaf(d: Any, types: Mapping[str, type[Encoded]], depth: int) -> Described:
    name, statics, parts = d
    if name not in types:
        raise ArtifactError(
            f"the file holds a leaf of class {name!r}; if you trust it, pass types=[that class]"
        )
    cls = types[name]
    _need(type(statics) is list and len(statics) == len(cls.static_names), d)
    _need(type(parts) is list and len(parts) == len(cls.part_names), d)
    fields = dict(zip(cls.static_names, map(to_tuple, statics), strict=True))
    core = _shape(list(fields["core"]))
    if "bits" in fields:
        _need(type(fields["bits"]) is int and 1 <= fields["bits"] <= 8, d)
    if "dtype_name" in fields:
        _need(fields["dtype_name"] in _FLOATS, d)
    if "out" in fields:
        out = fields["out"]
        _need(all(type(a) is int and 0 <= a < len(core) for a in out), d)
        _need(len(set(out)) == len(out), d)
    kind, pieces, entries, shape = cls.__name__, [], 0, core
    for field, part in zip(cls.part_names, parts, strict=True):
        how = cls.coded.get(field)
        if part is None:
            continue
        if how is not None:
            _need(part[0] == (MASK if how == "mask" else CODES), d)
            shape = (*_shape(part[1]), *core)
            entries += math.prod(shape)
            names = MaskLayout if how == "mask" else Coder
            pieces += _coded("index" if how == "mask" else field, part[2:], names)
            continue
        below = _check(part, types, masked=issubclass(cls, Masked), depth=depth + 1)
        entries += below.entries
        if type(part[0]) is str:
            kind, shape = f"{kind}({below.kind})", below.shape
        elif issubclass(cls, Masked):
            shape = below.shape
        renamed = (
            dataclasses.replace(p, part=field) if p.part == "dense" else p for p in below.pieces
        )
        pieces += renamed
    return Described(kind, shape, tuple(pieces), entries)


def _coded(part: str, numbers: Any, names: Any) -> tuple[Piece, Piece]:
    _need(len(numbers) == 3 and all(type(n) is int and n >= 0 for n in numbers), numbers)
    name = names(numbers[0]).name.lower()
    return Piece("code tables", name, numbers[1]), Piece(part, name, numbers[2])


def _shape(shape: Any) -> tuple[int, ...]:
    _need(type(shape) is list and len(shape) <= _MOST_AXES, shape)
    _need(all(type(n) is int and 0 <= n < 1 << 40 for n in shape), shape)
    return tuple(shape)


def _need(holds: bool, d: Any) -> None:
    if not holds:
        raise ArtifactError(f"a description is malformed: {d!r:.80}")


def sized(pieces: tuple[Piece, ...], length: int) -> Iterator[Piece]:
    """Fills in the one length that only the section knows."""
    known = sum(p.bytes for p in pieces if p.bytes is not None)
    for p in pieces:
        yield p if p.bytes is not None else dataclasses.replace(p, bytes=length - known)
