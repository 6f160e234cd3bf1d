r"""Range coding: the shortest byte form of the coder's state, and an adaptive model.

The model has no table. It starts from a *prior* named by a few bytes and learns the
frequencies from what was coded before, in blocks that grow with what is known:

.. math:: p(s) = (c_s + t / (2^{16} (A - 1))) / Z, \qquad t = \sum_s c_s

with the prior plus 16 for every occurrence in ``c_s``. The small floor keeps every
symbol above ``2^-16 / (A - 1)``, so that a count which the payload cannot hold is
refused before anything is allocated. All of it is integer arithmetic, or single
IEEE 754 additions and divisions, hence the same on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from constriction import stream

from ._errors import ArtifactError
from ._varint import read_varint, write_varint

# Weight of one occurrence; the smallest prior of a symbol is 1.
_UNIT = 16
# Weights are halved beyond this total (65,536 occurrences), more for large alphabets.
_MOST_WEIGHT = 1 << 20
_FLOOR = 1 << 16
# A symbol costs at least -log2(1 - 2^-16) bits, rounded down to 1 / 45,500.
_SYMBOLS_PER_BIT = 45_500
_FIRST_BLOCK = 8
_LARGEST_BLOCK = 8192
# Beyond this many symbols a prior, at most 1024 occurrences, is forgotten.
_TRIAL = 1 << 18


def fits(count: int, payload: bytes) -> bool:
    """Tells whether so many symbols can come out of a range-coded payload."""
    return count <= (8 * len(payload) + 64) * _SYMBOLS_PER_BIT


def finish(encoder: stream.queue.RangeEncoder) -> bytes:
    """Returns the shortest bytes that decode to what was encoded, zeros being implied.

    The coder ends with an interval `[low, low + width)` and any number in it will do;
    the one with most trailing zero bytes is taken, and those are left out.
    """
    words = encoder.get_compressed()
    position, (low, width) = encoder.pos()
    data = words.astype(">u4").tobytes()
    length = 4 * (position + 2)
    number = int.from_bytes(data, "big") << 8 * (length - len(data))
    # `low` is known modulo 2^64 only: a carry may still travel into earlier words.
    bottom = number - ((number - low) & ((1 << 64) - 1))
    for zeros in range(8, -1, -1):
        step = 1 << 8 * zeros
        candidate = -(-bottom // step) * step
        if candidate < bottom + width:
            return candidate.to_bytes(length, "big").rstrip(b"\0")
    raise AssertionError("the interval of a range coder is never empty")


def start_decoder(payload: bytes) -> stream.queue.RangeDecoder:
    """Returns a decoder of what :func:`finish` gave; refuses a trailing zero byte."""
    if payload.endswith(b"\0"):
        raise ArtifactError("a range-coded payload ends with a zero byte")
    padded = payload + bytes(-len(payload) % 4 + 8)
    return stream.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))


@dataclasses.dataclass(frozen=True)
class Prior:
    """Weights before anything was seen, named by a few bytes.

    With ``kind`` 0 to 2 every symbol has the same weight: 1, 1/4 or 1/16 of an
    occurrence. With ``kind`` 3 to 6 the weights fall off by ``ratio / 256`` a step on
    both sides of ``centre`` and sum to 16, 64, 256 or 1024 occurrences.
    """

    size: int
    kind: int
    ratio: int = 0
    centre: int = 0

    def weights(self) -> np.ndarray:
        """Returns the weights, `int64[size]`, each at least 1."""
        if self.kind < 3:
            return np.full(self.size, _UNIT >> 2 * self.kind, np.int64)
        falling = [1 << 30]
        while falling[-1] and len(falling) < self.size:
            falling.append(falling[-1] * self.ratio >> 8)
        profile = np.zeros(self.size, np.int64)
        profile[: len(falling)] = falling
        weights = profile[np.abs(np.arange(self.size) - self.centre)]
        total = _UNIT << 2 * (self.kind - 1)
        return 1 + weights * total // weights.sum()

    def table(self, alphabet: int) -> bytes:
        """Returns the bytes that :meth:`parse` reads."""
        short = self.size < alphabet
        out = bytes([self.kind | short << 3]) + (write_varint(self.size) if short else b"")
        if self.kind >= 3:
            out += bytes([self.ratio]) + write_varint(self.centre)
        return out

    @staticmethod
    def parse(table: bytes, alphabet: int) -> Prior:
        """Reads a prior; everything that :meth:`table` cannot write is refused."""
        if not table:
            raise ArtifactError("a range-coded stream has no table")
        kind, end = table[0] & 7, 1
        size, ratio, centre = alphabet, 0, 0
        if table[0] & 8:
            size, end = read_varint(table, end)
            if size >= alphabet:
                raise ArtifactError(f"a table covers {size} symbols of an alphabet of {alphabet}")
        if kind >= 3:
            if end >= len(table):
                raise ArtifactError("a table ends early")
            ratio = table[end]
            centre, end = read_varint(table, end + 1)
        if table[0] >> 4 or kind == 7 or size < 2 or centre >= size or end != len(table):
            raise ArtifactError("a range-coded stream has an unknown table")
        return Prior(size, kind, ratio, centre)


def candidates(counts: np.ndarray) -> list[Prior]:
    """Returns the priors worth trying for a histogram that ends with its last symbol."""
    size = len(counts)
    out = [Prior(size, kind) for kind in range(3)]
    n, values = int(counts.sum()), np.arange(size)
    for centre in dict.fromkeys((0, int((counts * values).sum() / n + 0.5))):
        spread = float((counts * np.abs(values - centre)).sum()) / n
        # One-sided: mean r / (1 - r). Two-sided: mean distance 2 r / (1 - r^2), about 1 / (1 - r).
        ratio = spread / (1 + spread) if centre == 0 else max(0.0, 1 - 1 / (spread + 0.5))
        out += [Prior(size, k, min(255, int(256 * ratio)), centre) for k in range(3, 7)]
    return out


class _Model:
    """Learns frequencies; encoder and decoder drive it with the same symbols."""

    def __init__(self, prior: Prior) -> None:
        self._weights = prior.weights()
        self._most = max(_MOST_WEIGHT, 64 * prior.size)
        self._floor = _FLOOR * (prior.size - 1)

    def weights(self) -> np.ndarray:
        return self._weights + self._weights.sum() / self._floor

    def categorical(self) -> stream.model.Categorical:
        return stream.model.Categorical(self.weights(), perfect=False)

    def learn(self, symbols: np.ndarray) -> None:
        self._weights += _UNIT * np.bincount(symbols, minlength=len(self._weights))
        if self._weights.sum() > self._most:
            self._weights = (self._weights + 1) // 2


def _blocks(count: int) -> Iterator[slice]:
    start = 0
    while start < count:
        stop = min(count, start + min(_LARGEST_BLOCK, max(_FIRST_BLOCK, start // 8)))
        yield slice(start, stop)
        start = stop


def cost(symbols: np.ndarray, prior: Prior, alphabet: int) -> float:
    """Returns the bytes of the table and of the first 262,144 symbols, nearly."""
    model, bits = _Model(prior), 0.0
    for block in _blocks(min(len(symbols), _TRIAL)):
        weights = model.weights()
        bits += (block.stop - block.start) * np.log2(weights.sum())
        bits -= np.log2(weights[symbols[block]]).sum()
        model.learn(symbols[block])
    return bits / 8 + len(prior.table(alphabet))


def encode(symbols: np.ndarray, prior: Prior) -> bytes:
    """Codes symbols below ``prior.size``."""
    encoder, model = stream.queue.RangeEncoder(), _Model(prior)
    for block in _blocks(len(symbols)):
        encoder.encode(symbols[block].astype(np.int32), model.categorical())
        model.learn(symbols[block])
    return finish(encoder)


def decode(payload: bytes, prior: Prior, count: int) -> np.ndarray:
    """Reads `[count]` symbols back; the payload must be exactly what encoding gives."""
    if not fits(count, payload):
        raise ArtifactError(f"{len(payload)} range-coded bytes cannot hold {count} symbols")
    decoder, encoder, model = start_decoder(payload), stream.queue.RangeEncoder(), _Model(prior)
    symbols = np.empty(count, np.uint8 if prior.size <= 256 else np.uint16)
    for block in _blocks(count):
        categorical = model.categorical()
        found = read(decoder, categorical, block.stop - block.start)
        encoder.encode(found, categorical)
        model.learn(found)
        symbols[block] = found
    if finish(encoder) != payload:
        raise ArtifactError("a range-coded payload does not end where its symbols end")
    return symbols


def read(decoder: stream.queue.RangeDecoder, *model: object) -> np.ndarray:
    """Decodes one block; what no encoder can have written is refused."""
    try:
        return decoder.decode(*model)
    except AssertionError as error:
        raise ArtifactError("a range-coded payload fits no sequence of symbols") from error
