"""What a section holds: descriptions in the index, checked before anything is read.

- ``[0, dtype, shape, stored]`` an array; ``stored`` is the type of its raw bytes, whose
  number follows for values under a mask, or ``""`` for types of at most 8 bits, which are
  entropy-coded: coder and two lengths follow;
- ``[1, impl, array]`` random keys, with the description of their data;
- ``[name, [static fields], [parts]]`` a leaf, and its shape if its class is a stranger's; a
  part is ``None`` or one of these, or where its class declares it
- ``[2, stack, layout, table, payload]`` a mask, with the lengths of its streams, or
- ``[3, stack, coder, table, payload]`` packed codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .._axes import Matrix
from .._encoded import Encoded, Masked
from ..codebook._clustered import Clustered
from ..quant._quantized import Quantized
from ..quant._with_input import WithInput
from ._errors import ArtifactError, brief
from ._masks import MaskLayout
from ._symbols import Coder

ARRAY, KEYS, MASK, CODES = 0, 1, 2, 3
BUILT_IN: dict[str, type[Encoded]] = {
    c.__name__: c for c in (Masked, Quantized, Clustered, WithInput)
}

_MINI = {n for n in dir(ml_dtypes) if n.startswith(("float4", "float6", "float8"))}
_FLOATS = {"float16", "float32", "float64", "bfloat16"} | _MINI
_INTEGERS = {f"{sign}int{bits}" for bits in (2, 4, 8, 16, 32, 64) for sign in ("", "u")}
#: Types that are entropy-coded: their bits and whether they are signed integers.
SMALL = (
    {"bool": (1, False)}
    | {f"{sign}int{bits}": (bits, not sign) for bits in (2, 4, 8) for sign in ("", "u")}
    | {name: (ml_dtypes.finfo(name).bits, False) for name in _MINI}
)
#: Types that are stored as raw little-endian bytes.
RAW = ((_FLOATS | _INTEGERS) - set(SMALL)) | {"complex64", "complex128"}

_DEPTH = 8
_MOST_AXES = 32
# Also where an axis of length 0 hides the others.
_MOST_PLACES = 1 << 48


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stream of a section: what it is, how it is coded, its bytes."""

    part: str
    coder: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Described:
    """A checked description.

    Args:
      kind: ``"dense"``, ``"keys"`` or the nesting of leaves.
      shape: shape of the tensor.
      dtype: its type; ``""`` where only the class of a stranger knows it.
      pieces: its streams in order.
      entries: entries of all arrays that reading it allocates.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    entries: int

    @property
    def parameters(self) -> int:
        """Number of floating values the tensor stands for."""
        floating = self.dtype in _FLOATS or self.dtype.startswith("complex") or not self.dtype
        return math.prod(self.shape) if floating else 0


def class_name(cls: type) -> str:
    """Returns the name a file gives to a leaf class."""
    known = BUILT_IN.get(cls.__name__) is cls
    return cls.__name__ if known else f"{cls.__module__}:{cls.__qualname__}"


def to_tuple(value: Any) -> Any:
    """Turns the lists of a file into the tuples of static fields."""
    return tuple(map(to_tuple, value)) if isinstance(value, list) else value


def check(d: Any, types: Mapping[str, type[Encoded]]) -> Described:
    """Checks the description of a section and says what it holds.

    The parts of our own leaves must fit each other; what a stranger's leaf makes of its
    parts is seen when it is read.

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
        raise ArtifactError(f"a description is malformed: {brief(d)}") from e


def _check(d: Any, types: Mapping[str, type[Encoded]], *, masked: bool, depth: int) -> Described:
    _need(type(d) is list and len(d) >= 3 and depth < _DEPTH, d)
    if type(d[0]) is str:
        return _check_leaf(d, types, depth)
    _need(type(d[0]) is int and type(d[1]) is str, d)
    if d[0] == KEYS:
        _need(len(d) == 3 and d[2][:2] == [ARRAY, "uint32"], d)
        data = _check(d[2], types, masked=False, depth=depth + 1)
        pieces = tuple(dataclasses.replace(p, part="keys") for p in data.pieces)
        return Described("keys", data.shape[:-1], "key", pieces, data.entries)
    _need(d[0] == ARRAY, d)
    shape = _shape(d[2])
    entries = math.prod(shape)
    if d[3] == "":
        _need(d[1] in SMALL, d)
        return Described("dense", shape, d[1], _coded("dense", d[4:], Coder), entries)
    _need(d[1] in RAW and d[3] in RAW and len(d) == 4 + masked, d)
    _need(d[3] == d[1] or (d[1] == "float32" and d[3] in ("bfloat16", "float16")), d)
    size = d[4] if masked else entries * np.dtype(d[3]).itemsize
    _need(type(size) is int and 0 <= size <= entries * np.dtype(d[3]).itemsize, d)
    return Described("dense", shape, d[1], (Piece("dense", d[3], size),), entries)


def _check_leaf(d: Any, types: Mapping[str, type[Encoded]], depth: int) -> Described:
    name, statics, parts, *shape = d
    if name not in types:
        raise ArtifactError(
            f"the file holds a leaf of class {brief(name)}; if you trust it, pass "
            "types=[that class]"
        )
    cls = types[name]
    _need(len(shape) == (name not in BUILT_IN), d)
    _need(type(statics) is list and len(statics) == len(cls.static_names), d)
    _need(type(parts) is list and len(parts) == len(cls.part_names), d)
    fields = dict(zip(cls.static_names, map(to_tuple, statics), strict=True))
    core = _shape(list(fields["core"]))
    if "codes" in cls.coded.values():
        _need(type(fields["bits"]) is int and 1 <= fields["bits"] <= 8, d)
    kind, pieces, entries = cls.__name__, [], 0
    below: dict[str, Described] = {}
    for field, part in zip(cls.part_names, parts, strict=True):
        how = cls.coded.get(field)
        if part is None:
            continue
        if how is None:
            masked = issubclass(cls, Masked) and field == "values"
            below[field] = _check(part, types, masked=masked, depth=depth + 1)
            if type(part[0]) is str:
                kind = f"{kind}({below[field].kind})"
        else:
            _need(type(part) is list and part[0] == (MASK if how == "mask" else CODES), d)
            full = (*_shape(part[1]), *core)
            names = MaskLayout if how == "mask" else Coder
            coded = _coded("index" if how == "mask" else field, part[2:], names)
            below[field] = Described(how, _shape(list(full)), how, coded, math.prod(full))
        entries += below[field].entries
        pieces += (
            dataclasses.replace(p, part=field) if p.part == "dense" else p
            for p in below[field].pieces
        )
    if shape:
        return Described(kind, _shape(shape[0]), "", tuple(pieces), entries)
    fits = {Masked: _masked_fits, WithInput: _input_fits}.get(cls, _codes_fit)
    _need(fits(cls, fields, below), d)
    whole = below[cls.part_names[0]].shape
    dtype = below["values"].dtype if "values" in below else fields["dtype_name"]
    return Described(kind, whole, dtype, tuple(pieces), entries)


def _masked_fits(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    if set(parts) != {"mask", "values"} or parts["values"].kind == "keys":
        return False
    return parts["mask"].shape == parts["values"].shape


def _input_fits(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Checks what `WithInput` asks of its parts."""
    if "values" not in parts or parts["values"].dtype not in _FLOATS:
        return False
    options = type(fields["bits"]) is int and 2 <= fields["bits"] <= 8
    options = options and fields["per"] in ("row", "tensor", "static")
    options = options and type(fields["symmetric"]) is bool
    has = {"values"}
    if fields["per"] == "static":
        has |= {"scale"} if fields["symmetric"] else {"scale", "zero_point"}
    core, shape = fields["core"], parts["values"].shape
    stack = shape[: len(shape) - len(core)]
    grids = [parts[k] for k in parts if k != "values"]
    fits = all(g.kind == "dense" and g.shape == stack and g.dtype in _FLOATS for g in grids)
    return options and set(parts) == has and fits and shape[len(stack) :] == core


def _codes_fit(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Checks what `Quantized` and `Clustered` ask of their parts."""
    core, out = fields["core"], fields["out"]
    axes = type(out) is tuple and all(type(a) is int and 0 <= a < len(core) for a in out)
    if not axes or len(set(out)) != len(out) or fields["dtype_name"] not in _FLOATS:
        return False
    table = parts.get("scale" if cls is Quantized else "codebook")
    if "codes" not in parts or table is None:
        return False
    m, shape = Matrix(core, out), parts["codes"].shape
    *ahead, last = table.shape
    fits = table.kind == "dense" and table.dtype in _FLOATS and last > 0
    fits = fits and tuple(ahead) == (*shape[: len(shape) - len(core)], *m.out_shape)
    if cls is Clustered:
        return fits
    zero = parts.get("zero_point")
    fits = fits and m.rows % last == 0
    return fits and (zero is None or (zero.shape == table.shape and zero.dtype in _INTEGERS))


def _coded(part: str, numbers: Any, names: Any) -> tuple[Piece, Piece]:
    _need(len(numbers) == 3 and all(type(n) is int and n >= 0 for n in numbers), numbers)
    name = names(numbers[0]).name.lower()
    return Piece("code tables", name, numbers[1]), Piece(part, name, numbers[2])


def _shape(shape: Any) -> tuple[int, ...]:
    _need(type(shape) is list and len(shape) <= _MOST_AXES, shape)
    _need(all(type(n) is int and n >= 0 for n in shape), shape)
    _need(math.prod(max(1, n) for n in shape) < _MOST_PLACES, shape)
    return tuple(shape)


def _need(holds: bool, d: Any) -> None:
    if not holds:
        raise ArtifactError(f"a description is malformed: {brief(d)}")
