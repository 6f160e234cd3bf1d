"""Canonical Huffman codes of at most 15 bits, written and read by whole arrays."""

from __future__ import annotations

import numpy as np

from ._errors import ArtifactError

MOST_BITS = 15
_CHUNK = 1 << 13


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Returns the best code lengths of at most 15 bits by package-merge.

    Args:
      counts: occurrences, `[n]`, of which 2 to 32,768 are not zero.

    Returns:
      `int64[n]`, 0 where a symbol does not occur; the Kraft sum of the others is 1.

    References:
      Larmore and Hirschberg, A fast algorithm for optimal length-limited Huffman codes,
      Journal of the ACM 37(3), 1990.
    """
    counts = np.asarray(counts, np.int64)
    order = np.flatnonzero(counts)
    order = order[np.argsort(counts[order], kind="stable")]
    leaves = counts[order]
    assert 2 <= len(leaves) <= 1 << MOST_BITS
    # One list a level, lightest first: the leaves and the pairs of the level before.
    levels, merged, is_leaf = [], leaves, np.ones(len(leaves), bool)
    for _ in range(MOST_BITS):
        levels.append(is_leaf)
        even = len(merged) // 2 * 2
        pairs = merged[:even:2] + merged[1:even:2]
        both = np.concatenate([leaves, pairs])
        by_weight = np.argsort(both, kind="stable")
        merged, is_leaf = both[by_weight], by_weight < len(leaves)
    lengths = np.zeros(len(counts), np.int64)
    take = 2 * len(leaves) - 2
    for is_leaf in reversed(levels):
        taken = int(np.count_nonzero(is_leaf[:take]))
        lengths[order[:taken]] += 1
        take = 2 * (take - taken)
    return lengths


def pack_lengths(lengths: np.ndarray) -> bytes:
    """Packs lengths by half bytes; zeros at the end are left out."""
    used = lengths[: np.flatnonzero(lengths)[-1] + 1].astype(np.uint8)
    used = np.append(used, np.zeros(len(used) % 2, np.uint8))
    return (used[::2] << 4 | used[1::2]).tobytes()


def unpack_lengths(table: bytes, alphabet: int) -> np.ndarray:
    """Reads lengths, `int64[n]` with `n <= alphabet`; an incomplete code is refused."""
    packed = np.frombuffer(table, np.uint8)
    lengths = np.stack([packed >> 4, packed & 15], -1).reshape(-1).astype(np.int64)
    used = np.flatnonzero(lengths)
    if len(used) < 2 or used[-1] >= alphabet or used[-1] < len(lengths) - 2:
        raise ArtifactError("a Huffman table names the wrong symbols")
    lengths = lengths[: used[-1] + 1]
    if (1 << MOST_BITS - lengths[used]).sum() != 1 << MOST_BITS:
        raise ArtifactError("the lengths of a Huffman table make no complete code")
    return lengths


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols by length, then value, and the left-aligned 15-bit code of each."""
    symbols = np.flatnonzero(lengths)
    symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
    span = 1 << MOST_BITS - lengths[symbols]
    return symbols, np.cumsum(span) - span


def encode(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """Codes symbols that all have a length; the last byte is filled with zero bits."""
    order, left = _canonical(lengths)
    codes = np.zeros(len(lengths), np.int64)
    codes[order] = left >> MOST_BITS - lengths[order]
    out, rest = [], np.zeros(0, np.uint8)
    for start in range(0, len(symbols), _CHUNK):
        part = symbols[start : start + _CHUNK]
        length = lengths[part]
        end = np.cumsum(length)
        below = np.repeat(end, length) - np.arange(1, end[-1] + 1)
        bits = (np.repeat(codes[part], length) >> below & 1).astype(np.uint8)
        bits = np.concatenate([rest, bits])
        whole = len(bits) // 8 * 8
        out.append(np.packbits(bits[:whole]).tobytes())
        rest = bits[whole:]
    return b"".join([*out, np.packbits(rest).tobytes()])


def decode(payload: bytes, lengths: np.ndarray, count: int) -> np.ndarray:
    """Reads `uint16[count]` symbols back; the payload must end with them."""
    if count > 8 * len(payload):
        raise ArtifactError(f"{len(payload)} bytes of Huffman codes cannot hold {count} symbols")
    order, _ = _canonical(lengths)
    # Symbol and length for any bits that may come next, as many as the longest code has.
    most = int(lengths.max())
    spans = 1 << most - lengths[order]
    symbol_at = np.repeat(order.astype(np.uint16), spans)
    length_at = np.repeat(lengths[order].astype(np.uint8), spans)
    data = np.frombuffer(payload + bytes(2), np.uint8)
    shifts = np.arange(24 - most, 16 - most, -1, dtype=np.uint32)
    out, left, at = [], count, 0
    for start in range(0, len(payload), _CHUNK):
        size = min(_CHUNK, len(payload) - start)
        window = data[start : start + size + 2].astype(np.uint32)
        window = window[:-2] << 16 | window[1:-1] << 8 | window[2:]
        # The bits that start at every bit of the chunk.
        window = (window[:, None] >> shifts & np.uint32((1 << most) - 1)).reshape(-1)
        steps, places, end = length_at[window].tolist(), [], 8 * size
        while at < end and len(places) < left:
            places.append(at)
            at += steps[at]
        out.append(symbol_at[window[places]] if places else symbol_at[:0])
        left -= len(places)
        if not left:
            if start + size != len(payload) or not 0 <= end - at < 8:
                raise ArtifactError("bytes are left after the last Huffman code")
            if payload[-1] & (1 << end - at) - 1:
                raise ArtifactError("the bits after the last Huffman code are not zero")
        at -= end
    if left:
        raise ArtifactError("a Huffman payload ends before its last symbol")
    return np.concatenate(out)
