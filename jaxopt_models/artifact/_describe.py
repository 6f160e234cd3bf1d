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
from ..quant._rotated import Rotated
from ..quant._scaled import SCALES, Scaled
from ..quant._tables import known_table, table_of
from ..quant._tabulated import Tabulated
from ..quant._with_input import WithInput
from ..quant._with_learned import WithLearnedInput
from ..quant._xnor import WithSign
from ._errors import ArtifactError, brief
from ._masks import MaskLayout
from ._symbols import Coder

ARRAY, KEYS, MASK, CODES = 0, 1, 2, 3
BUILT_IN: dict[str, type[Encoded]] = {
    c.__name__: c
    for c in (
        *(Masked, Quantized, Clustered, Tabulated, Scaled, Rotated),
        *(WithInput, WithLearnedInput, WithSign),
    )
}
#: Leaves whose ``values`` are written under a mask: their own, or one around them.
UNDER_MASK = (Masked, Scaled)

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


def statics_of(cls: type[Encoded], values: list[Any]) -> dict[str, Any]:
    """Returns the static fields by name; those at the end that are at their default are left out.

    So a class may get fields with defaults, and files written before stay readable.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    missing = cls.static_names[len(values) :]
    known = len(values) <= len(cls.static_names)
    _need(known and all(defaults[n] is not dataclasses.MISSING for n in missing), values)
    given = zip(cls.static_names, map(to_tuple, values), strict=False)
    return dict(given) | {n: defaults[n] for n in missing}


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
        return _check_leaf(d, types, masked, depth)
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


def _check_leaf(d: Any, types: Mapping[str, type[Encoded]], masked: bool, depth: int) -> Described:
    name, statics, parts, *shape = d
    if name not in types:
        raise ArtifactError(
            f"the file holds a leaf of class {brief(name)}; if you trust it, pass "
            "types=[that class]"
        )
    cls = types[name]
    _need(len(shape) == (name not in BUILT_IN), d)
    _need(type(statics) is list, d)
    _need(type(parts) is list and len(parts) == len(cls.part_names), d)
    fields = statics_of(cls, statics)
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
            inside = issubclass(cls, UNDER_MASK) and field == "values"
            under = inside and (masked or issubclass(cls, Masked))
            below[field] = _check(part, types, masked=under, depth=depth + 1)
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
    fits = _FITS.get(cls, _codes_fit)
    _need(fits(cls, fields, below), d)
    whole = below[cls.part_names[0]].shape
    dtype = fields["dtype_name"] if "dtype_name" in fields else below["values"].dtype
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
    return options and set(parts) == has and _stacked(fields, parts)


def _learned_fits(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Checks what `WithLearnedInput` asks of its parts."""
    if "values" not in parts or parts["values"].dtype not in _FLOATS:
        return False
    widths = [fields["bits"], 1 if fields["gradient_bits"] is None else fields["gradient_bits"]]
    options = all(type(n) is int and 1 <= n <= 8 for n in widths)
    options = options and fields["rule"] in ("step", "clip") and type(fields["signed"]) is bool
    needs_scale = fields["rule"] == "step" and "scale" not in parts
    return options and not needs_scale and _stacked(fields, parts)


def _sign_fits(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Checks what `WithSign` asks of its parts."""
    fits = "values" in parts and parts["values"].dtype in _FLOATS
    return fits and type(fields["scaled"]) is bool and _stacked(fields, parts)


def _stacked(fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Says whether there is one number of each other part for each stacked tensor of values."""
    core, shape = fields["core"], parts["values"].shape
    stack = shape[: len(shape) - len(core)]
    kinds = {k: "keys" if k == "key" else "dense" for k in parts}
    others = {k: part for k, part in parts.items() if k != "values"}
    fits = all(p.kind == kinds[k] and p.shape == stack for k, p in others.items())
    floats = all(p.dtype in _FLOATS for k, p in others.items() if k != "key")
    return fits and floats and shape[len(stack) :] == core


def _around_fits(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Checks what `Scaled` and `Rotated` ask of their parts."""
    core, name = fields["core"], "scale" if cls is Scaled else "signs"
    if set(parts) != {"values", name} or parts["values"].dtype not in _FLOATS:
        return False
    if not _are_axes(fields["out"], core) or fields["dtype_name"] not in _FLOATS:
        return False
    rows, shape = Matrix(core, fields["out"]).rows, parts["values"].shape
    stack, part = shape[: len(shape) - len(core)], parts[name]
    last, types = (rows, SCALES) if cls is Scaled else (-(-rows // 8), ("uint8",))
    fits = part.kind == "dense" and part.dtype in types and part.shape == (*stack, last)
    return fits and shape[len(stack) :] == core


_FITS = {
    Masked: _masked_fits,
    WithInput: _input_fits,
    WithLearnedInput: _learned_fits,
    WithSign: _sign_fits,
    **dict.fromkeys((Scaled, Rotated), _around_fits),
}


def _are_axes(out: Any, core: tuple[int, ...]) -> bool:
    fits = type(out) is tuple and all(type(a) is int and 0 <= a < len(core) for a in out)
    return fits and len(set(out)) == len(out)


def _codes_fit(cls: type, fields: dict[str, Any], parts: dict[str, Described]) -> bool:
    """Checks what `Quantized`, `Tabulated` and `Clustered` ask of their parts."""
    core, out, block = fields["core"], fields["out"], fields.get("block", 1)
    if not _are_axes(out, core) or fields["dtype_name"] not in _FLOATS:
        return False
    table = parts.get("codebook" if cls is Clustered else "scale")
    if "codes" not in parts or table is None:
        return False
    m, shape = Matrix(core, out), parts["codes"].shape
    *ahead, last = table.shape
    fits = table.kind != "keys" and table.dtype in _FLOATS and last > 0
    if block != 1:
        fits = fits and type(block) is int and block > 0 and m.out_shape[-1] % block == 0
    outputs = (*m.out_shape[:-1], m.out_shape[-1] // block) if block != 1 else m.out_shape
    fits = fits and tuple(ahead) == (*shape[: len(shape) - len(core)], *outputs)
    if cls is Clustered:
        return fits and table.kind == "dense"
    fits = fits and m.rows % last == 0
    if cls is Tabulated:
        name, bits = fields["table"], fields["bits"]
        return fits and known_table(name) and len(table_of(name).values) <= 1 << bits
    zero = parts.get("zero_point")
    numbers = _INTEGERS | {"float16"}
    return fits and (zero is None or (zero.shape == table.shape and zero.dtype in numbers))


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
