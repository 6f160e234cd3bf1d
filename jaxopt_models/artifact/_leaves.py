"""Tensors as sections: what an array or a compressed leaf writes, and how it is read back.

A section is the concatenation of streams; its description (`_describe.py`) says what they
are. Under a mask only kept codes and values are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._bits import pack_bits, pack_codes
from .._encoded import Encoded, Masked, is_encoded
from ._describe import ARRAY, CODES, KEYS, MASK, RAW, SMALL, class_name, to_tuple
from ._errors import ArtifactError
from ._masks import decode_mask, encode_mask
from ._symbols import decode, encode


class SectionWriter:
    """Collects the streams of one tensor."""

    def __init__(self, dense: str | None = None) -> None:
        self.chunks: list[bytes] = []
        self.dense = dense

    def leaf(self, x: Any, keep: np.ndarray | None = None) -> list[Any]:
        """Writes an array or a compressed leaf and returns its description."""
        if not is_encoded(x):
            return self.array(x, keep)
        statics = [_plain_static(getattr(x, n)) for n in type(x).static_names]
        if isinstance(x, Masked):
            keep = np.asarray(x.keep())
        parts: list[Any] = []
        for name in type(x).part_names:
            part, how = getattr(x, name), type(x).coded.get(name)
            if part is None:
                parts.append(None)
            elif how == "mask":
                parts.append(self._mask(np.asarray(x.keep()), x))
            elif how == "codes":
                parts.append(self._codes(x, keep))
            else:
                inner = keep if isinstance(x, Masked) else None
                parts.append(self.leaf(part, inner))
        return [class_name(type(x)), statics, parts]

    def array(self, x: Any, keep: np.ndarray | None = None) -> list[Any]:
        """Writes a dense array, or under ``keep`` only its kept entries."""
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return [KEYS, str(jax.random.key_impl(x)), self.array(jax.random.key_data(x))]
        x = np.asarray(x)
        name = x.dtype.name
        shape = list(x.shape)
        x = x.reshape(-1) if keep is None else x[keep]
        if name in SMALL:
            bits, signed = SMALL[name]
            symbols = x.astype(np.int32) + ((1 << bits - 1) if signed else 0)
            return [ARRAY, name, shape, "", *self._symbols(symbols, 1 << bits)]
        if name not in RAW:
            raise TypeError(f"a file cannot hold arrays of {name}")
        stored = name
        if self.dense is not None and name == "float32":
            stored = self.dense
            with np.errstate(over="ignore"):
                narrow = x.astype(np.dtype(stored))
            if not np.array_equal(np.isfinite(narrow.astype(np.float32)), np.isfinite(x)):
                raise ValueError(f"values beyond the range of {stored}; leave out dense={stored!r}")
            x = narrow
        self.chunks.append(np.ascontiguousarray(x).astype(x.dtype.newbyteorder("<")).tobytes())
        return [ARRAY, name, shape, stored]

    def _symbols(self, symbols: np.ndarray, alphabet: int) -> list[int]:
        s = encode(symbols, alphabet)
        self.chunks += [s.table, s.payload]
        return [int(s.coder), len(s.table), len(s.payload)]

    def _mask(self, keep: np.ndarray, x: Encoded) -> list[Any]:
        m = encode_mask(keep)
        self.chunks += [m.table, m.payload]
        return [MASK, list(x.stack), int(m.layout), len(m.table), len(m.payload)]

    def _codes(self, x: Any, keep: np.ndarray | None) -> list[Any]:
        codes = np.asarray(x.integers())
        codes = codes.reshape(-1) if keep is None else codes[keep]
        offset = (1 << x.bits - 1) if x.signed else 0
        return [CODES, list(x.stack), *self._symbols(codes + offset, 1 << x.bits)]


class SectionReader:
    """Takes the streams of one tensor apart; the data may be hostile."""

    def __init__(self, data: bytes, types: Mapping[str, type[Encoded]]) -> None:
        self.data, self.at, self.types = data, 0, types

    def tensor(self, description: Any) -> Any:
        """Reads a whole section."""
        x = self.leaf(description)
        if self.at != len(self.data):
            raise ArtifactError(f"{len(self.data) - self.at} bytes are left in a section")
        return x

    def leaf(self, d: Any, keep: np.ndarray | None = None) -> Any:
        """Reads an array or a leaf."""
        if isinstance(d[0], str):
            return self._encoded(d, keep)
        if d[0] == KEYS:
            return _keys(d[1], self.array(d[2], None))
        return to_jax(self.array(d, keep))

    def array(self, d: Any, keep: np.ndarray | None) -> np.ndarray:
        """Reads a dense array; under ``keep`` the entries that are not kept are zero."""
        _, name, shape, stored, *rest = d
        size = math.prod(shape)
        if keep is not None and list(keep.shape) != shape:
            raise ArtifactError(f"values of shape {shape} under a mask of {list(keep.shape)}")
        count = size if keep is None else int(keep.sum())
        if stored == "":
            bits, signed = SMALL[name]
            flat = self._symbols(rest, count, 1 << bits).astype(np.int16)
            flat = (flat - ((1 << bits - 1) if signed else 0)).astype(np.dtype(name))
        else:
            dtype = np.dtype(stored).newbyteorder("<")
            raw = self._take(count * dtype.itemsize)
            flat = np.frombuffer(raw, dtype).astype(np.dtype(name))
        if keep is None:
            return flat.reshape(shape)
        out = np.zeros(shape, flat.dtype)
        out[keep] = flat
        return out

    def _encoded(self, d: Any, outer: np.ndarray | None) -> Encoded:
        name, statics, parts = d
        cls = self.types[name]
        fields = dict(zip(cls.static_names, map(to_tuple, statics), strict=True))
        core = fields["core"]
        keep = outer
        values: dict[str, Any] = {}
        for field, part in zip(cls.part_names, parts, strict=True):
            how = cls.coded.get(field)
            if part is None:
                values[field] = None
            elif how == "mask":
                keep = self._mask(part, core)
                values[field] = pack_bits(jnp.asarray(keep if core else keep[..., None]))
            elif how == "codes":
                # Whether codes are signed may hang on another part, as on the zero point.
                blank = dict.fromkeys(cls.part_names) | {
                    f: 0 for f, p in zip(cls.part_names, parts, strict=True) if p is not None
                }
                signed = cls(**blank, **fields).signed
                values[field] = self._codes(part, core, fields["bits"], signed, outer)
            else:
                values[field] = self.leaf(part, keep if issubclass(cls, Masked) else None)
        leaf = cls(**values, **fields)
        _check_shape(leaf)
        return leaf

    def _mask(self, d: Any, core: tuple[int, ...]) -> np.ndarray:
        _, stack, layout, table, payload = d
        return decode_mask(layout, self._take(table), self._take(payload), (*stack, *core))

    def _codes(
        self, d: Any, core: tuple[int, ...], bits: int, signed: bool, keep: np.ndarray | None
    ) -> jax.Array:
        shape = (*d[1], *core)
        if keep is not None and keep.shape != shape:
            raise ArtifactError(f"codes of shape {shape} under a mask of {keep.shape}")
        count = math.prod(shape) if keep is None else int(keep.sum())
        flat = self._symbols(d[2:], count, 1 << bits).astype(np.int16)
        flat = (flat - ((1 << bits - 1) if signed else 0)).astype(np.int16)
        if keep is None:
            codes = flat.reshape(shape)
        else:
            codes = np.zeros(shape, np.int16)
            codes[keep] = flat
        return pack_codes(
            jnp.asarray(codes if core else codes[..., None]), bits=bits, signed=signed
        )

    def _symbols(self, lengths: list[int], count: int, alphabet: int) -> np.ndarray:
        coder, table, payload = lengths
        return decode(coder, self._take(table), self._take(payload), count, alphabet)

    def _take(self, n: int) -> bytes:
        if not 0 <= n <= len(self.data) - self.at:
            raise ArtifactError(f"a stream of {n} bytes in a section with {self.left()} left")
        self.at += n
        return self.data[self.at - n : self.at]

    def left(self) -> int:
        """Returns the bytes not read yet."""
        return len(self.data) - self.at


def to_jax(x: np.ndarray) -> Any:
    """Returns a JAX array, or ``x`` itself where JAX would change its type."""
    return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _keys(impl: str, data: np.ndarray) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"random keys of {impl!r} cannot be made: {e}") from e


def _plain_static(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_static(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"static field {value!r} cannot be stored; use numbers, strings and tuples")


def _check_shape(leaf: Encoded) -> None:
    try:
        seen = jax.eval_shape(type(leaf).materialize, leaf)
        fits = (tuple(seen.shape), seen.dtype) == (leaf.shape, leaf.dtype)
    except ArtifactError:
        raise
    except Exception as e:
        raise ArtifactError(f"the parts of a {type(leaf).__name__} do not fit: {e!s:.200}") from e
    if not fits:
        raise ArtifactError(f"the parts of a {type(leaf).__name__} do not fit together")
