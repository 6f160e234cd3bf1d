"""Tensors as sections: what an array or a compressed leaf writes, and how it is read back.

A section is the concatenation of streams; its description (`_describe.py`) says what they
are. Under a mask only kept codes and values are written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._encoded import Encoded, is_encoded
from .._latent import Latent
from ._describe import (
    ARRAY,
    BUILT_IN,
    CODES,
    KEYS,
    MASK,
    RAW,
    SMALL,
    UNDER_MASK,
    class_name,
    statics_of,
)
from ._errors import ArtifactError
from ._masks import MaskLayout, decode_mask, encode_mask
from ._packing import pack_codes, pack_mask, to_jax, unpack_codes, unpack_mask
from ._symbols import Coder, decode, encode


class SectionWriter:
    """Collects the streams of one tensor.

    Args:
      dense: type in which `float32` arrays, and values under a mask, are stored.
      coding: whether codes and masks are entropy-coded; else they take the width they have.
    """

    def __init__(self, dense: str | None = None, *, coding: bool = True) -> None:
        self.chunks: list[bytes | memoryview] = []
        self.dense, self.coding = dense, coding

    def tensor(self, x: Any) -> list[Any]:
        """Writes a whole tensor and returns its description."""
        return self.leaf(x, dense=self.dense)

    def leaf(
        self, x: Any, keep: np.ndarray | None = None, *, dense: str | None = None
    ) -> list[Any]:
        """Writes an array or a compressed leaf and returns its description."""
        if not is_encoded(x):
            return self.array(x, keep, dense=dense)
        cls = type(x)
        if isinstance(x, Latent):
            raise TypeError(
                f"it is in training for {x.encoder}; a file holds what compress(tree, recipe) "
                "makes of it, a checkpoint of orbax the tree as it is"
            )
        statics = [_plain_static(v) for v in _statics(x)]
        outer = keep
        parts: list[Any] = []
        for name in cls.part_names:
            part, how = getattr(x, name), cls.coded.get(name)
            if part is None and how is not None:
                raise TypeError(
                    f"a {cls.__name__} without {name} is half a leaf; combine(...) the halves of "
                    "partition first"
                )
            if part is None:
                parts.append(None)
            elif how == "mask":
                keep = unpack_mask(part, x.core, x.shape)
                parts.append(self._mask(keep, x))
            elif how == "codes":
                parts.append(self._codes(part, x, outer))
            elif isinstance(x, UNDER_MASK) and name == "values":
                parts.append(self.leaf(part, keep, dense=self.dense))
            else:
                parts.append(self.leaf(part))
        description = [class_name(cls), statics, parts]
        return description if BUILT_IN.get(cls.__name__) is cls else [*description, list(x.shape)]

    def array(
        self, x: Any, keep: np.ndarray | None = None, *, dense: str | None = None
    ) -> list[Any]:
        """Writes a dense array, or under ``keep`` only its kept entries."""
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return [KEYS, str(jax.random.key_impl(x)), self.array(jax.random.key_data(x))]
        x = np.asarray(x)
        name, shape = x.dtype.name, list(x.shape)
        x = x.reshape(-1) if keep is None else x[keep]
        if name in SMALL:
            bits, signed = SMALL[name]
            x = x.astype(np.int8) if signed and bits < 8 else np.ascontiguousarray(x)
            return [ARRAY, name, shape, "", *self._symbols(x.view(np.uint8), bits, signed)]
        if name not in RAW:
            raise TypeError(f"a file cannot hold arrays of {name}")
        if dense is not None and name == "float32":
            x = narrow(x, dense)
        stored = x.dtype.name
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
        self.chunks.append(memoryview(x.view(np.uint8)))
        return [ARRAY, name, shape, stored] + ([] if keep is None else [x.nbytes])

    def _symbols(self, codes: np.ndarray, bits: int, signed: bool) -> list[int]:
        """Codes bytes, of which the lowest ``bits`` bits are looked at."""
        mask = np.uint8((1 << bits) - 1)
        return self.stream((codes ^ np.uint8(1 << bits - 1) if signed else codes) & mask, bits)

    def stream(self, symbols: np.ndarray, bits: int) -> list[int]:
        """Writes symbols, codes from their least value on, and returns coder and lengths."""
        plain = (Coder.PLAIN,) if symbols.size else (Coder.CONSTANT,)
        s = encode(symbols, 1 << bits, coders=tuple(Coder) if self.coding else plain)
        self.chunks += [s.table, s.payload]
        return [int(s.coder), len(s.table), len(s.payload)]

    def _mask(self, keep: np.ndarray, x: Encoded) -> list[Any]:
        plain = (MaskLayout.CONSTANT, MaskLayout.BITMAP)
        m = encode_mask(keep, layouts=tuple(MaskLayout) if self.coding else plain)
        self.chunks += [m.table, m.payload]
        return [MASK, list(x.stack), int(m.layout), len(m.table), len(m.payload)]

    def _codes(self, packed: Any, x: Any, keep: np.ndarray | None) -> list[Any]:
        codes = unpack_codes(packed, x.core, x.shape, bits=x.bits, signed=x.signed).view(np.uint8)
        codes = codes.reshape(-1) if keep is None else codes[keep]
        return [CODES, list(x.stack), *self._symbols(codes, x.bits, x.signed)]


class SectionReader:
    """Takes the streams of one tensor apart; the data may be hostile.

    Args:
      data: the section.
      types: leaf classes by their names in the file.
    """

    def __init__(self, data: bytes, types: Mapping[str, type[Encoded]]) -> None:
        self.data, self.at, self.types = memoryview(data), 0, types

    def tensor(self, description: Any) -> Any:
        """Reads a whole section. What comes from it goes to JAX when all of it was read."""
        x = self.leaf(description)
        if self.at != len(self.data):
            raise ArtifactError(f"{len(self.data) - self.at} bytes are left in a section")
        x = jax.tree.map(lambda a: to_jax(a) if isinstance(a, np.ndarray) else a, x)
        for leaf, shape in _strangers(x, description):
            _check_stranger(leaf, tuple(shape))
        return x

    def leaf(self, d: Any, keep: np.ndarray | None = None) -> Any:
        """Reads an array or a leaf."""
        if isinstance(d[0], str):
            return self._encoded(d, keep)
        if d[0] == KEYS:
            return jax.random.wrap_key_data(jnp.asarray(self.array(d[2])), impl=d[1])
        return self.array(d, keep)

    def array(self, d: Any, keep: np.ndarray | None = None) -> np.ndarray:
        """Reads a dense array; under ``keep`` the entries that are not kept are zero bytes."""
        _, name, shape, stored, *rest = d
        count = math.prod(shape) if keep is None else int(np.count_nonzero(keep))
        if keep is not None and list(keep.shape) != shape:
            raise ArtifactError(f"values of shape {shape} under a mask of {list(keep.shape)}")
        if stored == "":
            bits, signed = SMALL[name]
            flat = self.symbols("dense", rest, count, 1 << bits)
            flat = _lower(flat, bits).astype(name) if signed else flat.view(name)
        else:
            dtype = np.dtype(stored).newbyteorder("<")
            if rest and rest[0] != count * dtype.itemsize:
                raise ArtifactError(f"{rest[0]} bytes of {stored} for {count} kept values")
            flat = np.frombuffer(self._take(count * dtype.itemsize), dtype).astype(name)
        return _spread(flat, keep, shape)

    def _encoded(self, d: Any, outer: np.ndarray | None) -> Encoded:
        name, statics, parts, *_ = d
        cls = self.types[name]
        fields = statics_of(cls, statics)
        keep = outer
        values: dict[str, Any] = {}
        for field, part in zip(cls.part_names, parts, strict=True):
            how = cls.coded.get(field)
            if part is None:
                values[field] = None
            elif how == "mask":
                keep = self.mask(part, (*part[1], *fields["core"]))
                values[field] = pack_mask(keep, fields["core"])
            elif how == "codes":
                # Whether codes are signed may hang on another part, as on the zero point.
                blank = dict.fromkeys(cls.part_names) | {
                    f: 0 for f, p in zip(cls.part_names, parts, strict=True) if p is not None
                }
                signed = cls(**blank, **fields).signed
                values[field] = self._codes(field, part, fields, signed, outer)
            else:
                under = issubclass(cls, UNDER_MASK) and field == "values"
                values[field] = self.leaf(part, keep if under else None)
        return cls(**values, **fields)

    def mask(self, d: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a mask."""
        layout, table, payload = d[2:]
        return decode_mask(layout, bytes(self._take(table)), bytes(self._take(payload)), shape)

    def symbols(self, part: str, lengths: list[int], count: int, alphabet: int) -> np.ndarray:
        """Reads a stream of ``part``."""
        coder, table, payload = lengths
        return decode(coder, bytes(self._take(table)), bytes(self._take(payload)), count, alphabet)

    def _codes(
        self, field: str, d: Any, fields: dict[str, Any], signed: bool, keep: np.ndarray | None
    ) -> np.ndarray:
        bits, shape = fields["bits"], (*d[1], *fields["core"])
        if keep is not None and keep.shape != shape:
            raise ArtifactError(f"codes of shape {shape} under a mask of {keep.shape}")
        count = math.prod(shape) if keep is None else int(np.count_nonzero(keep))
        flat = self.symbols(field, d[2:], count, 1 << bits)
        codes = _spread(_lower(flat, bits) if signed else flat, keep, shape)
        return pack_codes(codes, fields["core"], bits=bits, signed=signed)

    def _take(self, n: int) -> memoryview:
        left = len(self.data) - self.at
        if not 0 <= n <= left:
            raise ArtifactError(f"a stream of {n} bytes in a section with {left} left")
        self.at += n
        return self.data[self.at - n : self.at]


def narrow(x: np.ndarray, dense: str) -> np.ndarray:
    """Returns an array in a type of 16 bits, or raises if that cannot hold it."""
    with np.errstate(all="ignore"):
        narrow = x.astype(np.dtype(dense))
    if not np.array_equal(np.isfinite(narrow), np.isfinite(x)):
        raise ValueError(f"values beyond the range of {dense}; leave out dense={dense!r}")
    return narrow


def _lower(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Turns symbols into the signed codes that they are shifted from."""
    return (symbols - np.uint8(1 << bits - 1)).view(np.int8)


def _spread(flat: np.ndarray, keep: np.ndarray | None, shape: Any) -> np.ndarray:
    if keep is None:
        return flat.reshape(shape)
    out = np.zeros(shape, flat.dtype)
    out[keep] = flat
    return out


def _statics(x: Encoded) -> list[Any]:
    """The static fields, without those at the end that are at their default."""
    defaults = {f.name: f.default for f in dataclasses.fields(x)}  # type: ignore[arg-type]
    values = [(getattr(x, n), defaults[n]) for n in type(x).static_names]
    while values and values[-1][0] == values[-1][1]:
        values.pop()
    return [v for v, _ in values]


def _plain_static(value: Any) -> Any:
    if type(value) is tuple:
        return [_plain_static(v) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"static field {value!r:.60} of type {type(value).__name__} cannot be stored; use "
        "numbers, strings and tuples"
    )


def _strangers(x: Any, d: Any) -> Iterator[tuple[Encoded, Any]]:
    """The leaves of classes that are not ours, innermost first, with their claimed shapes."""
    if not is_encoded(x):
        return
    for name, part in zip(type(x).part_names, d[2], strict=True):
        yield from _strangers(getattr(x, name), part)
    if len(d) > 3:
        yield x, d[3]


def _check_stranger(leaf: Encoded, shape: tuple[int, ...]) -> None:
    seen = jax.eval_shape(type(leaf).materialize, leaf)
    if not (tuple(seen.shape) == tuple(leaf.shape) == shape and seen.dtype == leaf.dtype):
        raise ArtifactError(f"the parts of a {type(leaf).__name__} do not fit together")
