"""Streams of small integers, coded by whatever makes them smallest."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from numpy.typing import ArrayLike

from . import _huffman, _range
from ._errors import ArtifactError
from ._varint import read_varint, write_varint

LARGEST_ALPHABET = 1 << 16
_CHUNK = 1 << 16
# Beyond this many symbols building Huffman codes is not worth the time.
_MOST_HUFFMAN_SYMBOLS = 1_000_000
_MOST_HUFFMAN_ALPHABET = 4096


class Coder(enum.IntEnum):
    """How a stream is coded; the value is what a file holds."""

    CONSTANT = 0
    PLAIN = 1
    HUFFMAN = 2
    RANGE = 3


@dataclasses.dataclass(frozen=True)
class Stream:
    """A coded stream; the number of symbols and the alphabet are kept by its owner."""

    coder: Coder
    table: bytes
    payload: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of table and payload together."""
        return len(self.table) + len(self.payload)


def encode(
    symbols: ArrayLike, alphabet: int, *, coders: tuple[Coder, ...] = tuple(Coder)
) -> Stream:
    """Codes a stream of integers in `[0, alphabet)` with the smallest of several coders.

    ``CONSTANT`` stores one value, ``PLAIN`` ``ceil(log2(alphabet))`` bits a symbol,
    ``HUFFMAN`` (streams of at most a million symbols) a canonical prefix code of at most
    15 bits with its lengths at half a byte each, and ``RANGE`` an adaptive range coder
    whose table is only the 1 to 8 bytes that name its prior.

    Args:
      symbols: integers, any shape; coded in C order.
      alphabet: number of possible values, 1 to 65,536.
      coders: the coders to try. Where none of them can code the stream, an error.

    Returns:
      The :class:`Stream` of fewest bytes, table included.

    Raises:
      TypeError: if ``symbols`` are no integers.
      ValueError: if a symbol lies outside the alphabet, or no coder fits.

    Example:
      >>> import numpy as np
      >>> from jaxopt_models.artifact import decode, encode
      >>> symbols = np.arange(3000) ** 2 % 1009 % 37 // 4
      >>> stream = encode(symbols, 16)
      >>> stream.coder.name, len(stream.table), stream.nbytes < 1500
      ('RANGE', 2, True)
      >>> back = decode(stream.coder, stream.table, stream.payload, 3000, 16)
      >>> bool((back == symbols).all())
      True

    References:
      Martin, Range encoding, 1979; Huffman, A method for the construction of
      minimum-redundancy codes, 1952; constriction, arXiv:2201.01741.
    """
    values = np.asarray(symbols)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"symbols must be integers, got {values.dtype}")
    if not 1 <= alphabet <= LARGEST_ALPHABET:
        raise ValueError(f"alphabet must be in [1, {LARGEST_ALPHABET}], got {alphabet}")
    values = values.reshape(-1)
    count = len(values)
    if count and not 0 <= int(values.min()) <= int(values.max()) < alphabet:
        raise ValueError(
            f"symbols must be in [0, {alphabet}), got {values.min()} to {values.max()}"
        )
    values = values.astype(np.uint8 if alphabet <= 256 else np.uint16, copy=False)
    counts = _count(values) if set(coders) != {Coder.PLAIN} else np.zeros(0, np.int64)
    found: list[Stream] = []
    present = int(np.count_nonzero(counts))
    if Coder.CONSTANT in coders and present < 2:
        found.append(Stream(Coder.CONSTANT, write_varint(int(values[0])) if count else b"", b""))
    if present >= 2:
        if Coder.HUFFMAN in coders and _huffman_worthwhile(count, present):
            lengths = _huffman.code_lengths(counts)
            table = _huffman.pack_lengths(lengths)
            found.append(Stream(Coder.HUFFMAN, table, _huffman.encode(values, lengths)))
        if Coder.RANGE in coders:
            found.append(_encode_range(values, counts, alphabet))
    if Coder.PLAIN in coders and alphabet > 1 and count:
        # Built last, as it is known beforehand whether it is the smallest.
        width = (alphabet - 1).bit_length()
        if not found or -(-count * width // 8) <= min(s.nbytes for s in found):
            found.append(Stream(Coder.PLAIN, b"", _pack(values, width)))
    if not found:
        raise ValueError(
            f"none of {[c.name for c in coders]} can code these {count} symbols of an alphabet of "
            f"{alphabet}; allow more coders"
        )
    return min(found, key=lambda s: (s.nbytes, s.coder))


def decode(coder: int, table: bytes, payload: bytes, count: int, alphabet: int) -> np.ndarray:
    """Reads a stream back, and refuses every stream that :func:`encode` cannot write.

    What ``count`` symbols need at least is compared with the payload before anything is
    allocated. Only a constant has no payload: the owner of the stream bounds its count.

    Args:
      coder: a :class:`Coder` or its number.
      table: the table of the stream.
      payload: the payload of the stream.
      count: number of symbols.
      alphabet: number of possible values, 1 to 65,536.

    Returns:
      `uint8[count]` for alphabets up to 256, `uint16[count]` beyond.

    Raises:
      ArtifactError: if anything is not as :func:`encode` would have written it.
    """
    if not 1 <= alphabet <= LARGEST_ALPHABET:
        raise ArtifactError(f"a stream has an alphabet of {alphabet}")
    if count < 0:
        raise ArtifactError(f"a stream has {count} symbols")
    dtype = np.uint8 if alphabet <= 256 else np.uint16
    if coder == Coder.CONSTANT:
        return _decode_constant(table, payload, count, alphabet, dtype)
    if not count or alphabet < 2:
        raise ArtifactError("a stream without a choice is not coded as a constant")
    if coder == Coder.PLAIN:
        if table:
            raise ArtifactError("a plain stream has a table")
        values = _unpack(payload, (alphabet - 1).bit_length(), count)
        if int(values.max()) >= alphabet:
            raise ArtifactError(f"a plain stream holds symbols beyond its alphabet of {alphabet}")
    elif coder == Coder.HUFFMAN:
        values = _huffman.decode(payload, _huffman.unpack_lengths(table, alphabet), count)
    elif coder == Coder.RANGE:
        values = _range.decode(payload, _range.Prior.parse(table, alphabet), count)
    else:
        raise ArtifactError(f"a stream has the unknown coder {coder!r}")
    return values.astype(dtype, copy=False)


def _count(values: np.ndarray) -> np.ndarray:
    """Histogram that ends with the largest symbol, without a wide copy of all of them."""
    counts = np.zeros(int(values.max(initial=0)) + 1, np.int64)
    for start in range(0, len(values), _CHUNK):
        counts += np.bincount(values[start : start + _CHUNK], minlength=len(counts))
    return counts


def _huffman_worthwhile(count: int, present: int) -> bool:
    return count <= _MOST_HUFFMAN_SYMBOLS and present <= _MOST_HUFFMAN_ALPHABET


def _encode_range(values: np.ndarray, counts: np.ndarray, alphabet: int) -> Stream:
    priors = _range.candidates(counts)
    best = min(priors, key=lambda prior: _range.cost(values, prior, alphabet))
    if best.size < alphabet:
        # Trailing symbols that never occur may cost less than saying how many there are.
        whole = dataclasses.replace(best, size=alphabet)
        best = min(best, whole, key=lambda prior: _range.cost(values, prior, alphabet))
    return Stream(Coder.RANGE, best.table(alphabet), _range.encode(values, best))


def _decode_constant(
    table: bytes, payload: bytes, count: int, alphabet: int, dtype: type
) -> np.ndarray:
    if payload:
        raise ArtifactError("a constant stream has a payload")
    if not count:
        if table:
            raise ArtifactError("an empty stream has a table")
        return np.zeros(0, dtype)
    value, end = read_varint(table)
    if end != len(table) or value >= alphabet:
        raise ArtifactError(f"a constant stream holds no symbol of its alphabet of {alphabet}")
    return np.full(count, value, dtype)


def _pack(values: np.ndarray, width: int) -> bytes:
    """Packs the lowest bits of every value, highest first."""
    if width == 8:
        return values.astype(np.uint8).tobytes()
    out = []
    for start in range(0, len(values), _CHUNK):
        if width in (1, 2, 4) and values.dtype == np.uint8:
            out.append(_pack_narrow(values[start : start + _CHUNK], width).tobytes())
            continue
        wide = values[start : start + _CHUNK].astype(">u2").view(np.uint8).reshape(-1, 2)
        out.append(np.packbits(np.unpackbits(wide, axis=1)[:, 16 - width :]).tobytes())
    return b"".join(out)


def _pack_narrow(values: np.ndarray, width: int) -> np.ndarray:
    """Packs widths that divide a byte: neighbours are joined until they fill one."""
    values = np.pad(values, (0, -len(values) % (8 // width)))
    while width < 8:
        values = values[0::2] << np.uint8(width) | values[1::2]
        width *= 2
    return values


def _unpack(payload: bytes, width: int, count: int) -> np.ndarray:
    if len(payload) != -(-count * width // 8):
        raise ArtifactError(f"{len(payload)} bytes do not hold {count} symbols of {width} bits")
    data = np.frombuffer(payload, np.uint8)
    if width in (8, 16):
        return data if width == 8 else data.view(">u2")
    if -count * width % 8 and payload[-1] & (1 << -count * width % 8) - 1:
        raise ArtifactError("the bits after the last symbol are not zero")
    out = np.empty(count, np.uint8 if width < 8 else np.uint16)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        bits = np.unpackbits(data[start * width // 8 : -(-stop * width // 8)])
        bits = bits[: (stop - start) * width].reshape(-1, width)
        wide = np.zeros((stop - start, 16), np.uint8)
        wide[:, 16 - width :] = bits
        out[start:stop] = np.packbits(wide, axis=1).view(">u2")[:, 0]
    return out
