r"""A model of masks in which lines and places differ: pruned weights are no coin tosses.

A mask is read line by line. The chance that place ``j`` of line ``i`` is kept is

.. math:: p_{ij} = f_i \, \frac{k_j + a}{\sum_{i' < i} f_{i'} + a / \mu} \, r_c

with ``k_j`` the entries kept at this place so far, ``a`` the strength of the common
density :math:`\mu`, ``f_i`` the density of the line relative to the mean (a power of 2
or of its root, sent beforehand; a line that keeps nothing is not coded at all), and
``r_c`` how much more the context ``c`` keeps than was expected so far. The context is
what the same place kept one line and ``lag`` lines before: an image that enters a layer
by pixels has neighbours there. Probabilities are integers over `2 ** 22`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from constriction import stream

from . import _range, _symbols
from ._errors import ArtifactError
from ._varint import read_varint, write_varint

_ONE = 22
# The same floor as for symbols, so that `_range.fits` bounds the number of entries.
_LEAST = 1 << _ONE - 16
_STATIC = 1 << 24
_STRENGTHS = (1, 2, 4, 8, 16, 32, 64, _STATIC)
_CONTEXT_STRENGTH = 16
_CLASSES = 17
_MOST_LAG = 256
# Parameters are chosen on at most so many entries.
_TRIAL = 1 << 19


@dataclasses.dataclass(frozen=True)
class Params:
    """What the model of one mask was set to.

    ``steps`` is 0 (all lines alike), 1 or 2 classes an octave; ``lag`` is 0 without
    contexts; ``strength`` indexes the strengths 1 to 64 and infinity.
    """

    steps: int
    strength: int
    lag: int


class _Model:
    """Predicts a line from those before it; encoder and decoder drive it alike."""

    def __init__(self, classes: np.ndarray, places: int, kept: int, params: Params) -> None:
        self._params, self._kept = params, kept
        self._factors = [_factor(c, params.steps) for c in classes.tolist()]
        self._prior = places * int(np.count_nonzero(classes)) * 256
        self._strength = _STRENGTHS[params.strength]
        self._place = np.full(places, self._strength, np.int64)
        self._seen = 0
        self._observed, self._expected = [0] * 4, [0] * 4

    def predict(self, i: int, mask: np.ndarray) -> np.ndarray:
        """Returns the chances at line ``i``, `float64[places]`, given the lines before."""
        whole = self._seen * self._kept + self._strength * self._prior
        gain = (self._factors[i] * self._kept << 40) // whole
        self._base = _clip(self._place * gain >> 40 - _ONE)
        if not self._params.lag:
            return self._base / (1 << _ONE)
        context = mask[i - 1].astype(np.int8) if i else np.zeros(len(self._base), np.int8)
        if i >= self._params.lag:
            context = context + 2 * mask[i - self._params.lag]
        self._context = context
        ratios = [_ratio(o, e) for o, e in zip(self._observed, self._expected, strict=True)]
        return _clip(self._base * np.array(ratios)[context] >> 16) / (1 << _ONE)

    def learn(self, i: int, line: np.ndarray) -> None:
        """Takes in what line ``i`` really kept."""
        self._place += line
        self._seen += self._factors[i]
        if self._params.lag:
            # Sums of integers below 2^53 are exact in float64.
            observed = np.bincount(self._context, line, 4)
            expected = np.bincount(self._context, self._base, 4)
            self._observed = [a + int(b) for a, b in zip(self._observed, observed, strict=True)]
            self._expected = [a + int(b) for a, b in zip(self._expected, expected, strict=True)]


def _ratio(observed: int, expected: int) -> int:
    """Kept over expected in one context, times 2^16; ``expected`` is times 2^22."""
    ratio = (observed + _CONTEXT_STRENGTH << 16 + _ONE) // (expected + (_CONTEXT_STRENGTH << _ONE))
    return min(ratio, 1 << 24)


def _clip(p: np.ndarray) -> np.ndarray:
    return np.clip(p, _LEAST, (1 << _ONE) - _LEAST)


def _factor(class_: int, steps: int) -> int:
    """Density of a class relative to the mean, times 256; class 0 is never coded."""
    if not steps or not class_:
        return 256
    return math.isqrt(1 << 16 + 2 * (class_ - 9) // steps)


def _classes(counts: np.ndarray, steps: int) -> np.ndarray:
    """Class of every line: 0 keeps nothing, 9 is the mean density."""
    classes = (counts > 0).astype(np.int64)
    if steps:
        relative = np.log2(np.maximum(counts, 1) / counts[counts > 0].mean())
        classes *= np.clip(np.round(relative * steps), -8, 7).astype(np.int64) + 9
    return classes


def _encode_classes(classes: np.ndarray) -> tuple[int, _symbols.Stream]:
    """Codes the classes, or (1) their differences modulo their number, if that is smaller."""
    differences = np.diff(classes, prepend=0) % _CLASSES
    coded = [_symbols.encode(c, _CLASSES) for c in (classes, differences)]
    return min(enumerate(coded), key=lambda c: c[1].nbytes)


def _cost(mask: np.ndarray, params: Params) -> float:
    """Returns the bytes of classes and entries, nearly."""
    counts = mask.sum(1)
    classes = _classes(counts, params.steps)
    model, bits = _Model(classes, mask.shape[1], int(counts.sum()), params), 0.0
    for i in np.flatnonzero(classes).tolist():
        p = model.predict(i, mask)
        bits -= np.log2(np.where(mask[i], p, 1 - p)).sum()
        model.learn(i, mask[i])
    return _encode_classes(classes)[1].nbytes + bits / 8


def _best_lag(mask: np.ndarray) -> int:
    """Returns the distance of lines, 2 to 256, at which most entries coincide beyond chance."""
    packed = np.packbits(mask[:, :1024], axis=1)
    most = min(_MOST_LAG, len(mask) // 2)
    counts = mask[:, :1024].sum(1, dtype=np.float64)
    best, best_score = 2, 0.0
    for lag in range(2, most + 1):
        both = float(np.bitwise_count(packed[lag:] & packed[:-lag]).sum())
        chance = float(counts[lag:] @ counts[:-lag]) / min(1024, mask.shape[1])
        score = (both - chance) / math.sqrt(chance + 1)
        if score > best_score:
            best, best_score = lag, score
    return best


def tune(views: Sequence[np.ndarray]) -> tuple[int, Params]:
    """Chooses how to read a mask that keeps something.

    Args:
      views: masks `[lines, places]`, one of which will be coded.

    Returns:
      The index of the view, and the parameters.
    """
    parts = [v[: max(2 * _MOST_LAG, _TRIAL // v.shape[1])] for v in views]
    if not all(part.any() for part in parts):
        parts = list(views)
    starts = [Params(steps=1, strength=2, lag=_best_lag(part)) for part in parts]
    costs = [
        _cost(part, params) * (view.size / part.size)
        for part, params, view in zip(parts, starts, views, strict=True)
    ]
    k = int(np.argmin(costs))
    part, best = parts[k], starts[k]
    best_cost = _cost(part, best)
    tries: list[dict[str, int]] = [{"steps": 0}, {"steps": 2}, {"lag": 0}]
    tries += [{"strength": s} for s in range(len(_STRENGTHS))]
    for change in tries:
        params = dataclasses.replace(best, **change)
        if params != best and (cost := _cost(part, params)) < best_cost:
            best, best_cost = params, cost
    return k, best


def encode(mask: np.ndarray, params: Params) -> tuple[bytes, bytes]:
    """Codes a mask `[lines, places]` that keeps something; returns table and payload."""
    counts = mask.sum(1)
    kept, classes = int(counts.sum()), _classes(counts, params.steps)
    differences, side = _encode_classes(classes)
    table = bytes([params.steps | params.strength << 2 | side.coder << 5 | differences << 7])
    table += write_varint(params.lag) + write_varint(kept)
    table += write_varint(len(side.table)) + side.table + side.payload
    encoder, bernoulli = stream.queue.RangeEncoder(), stream.model.Bernoulli(perfect=False)
    model = _Model(classes, mask.shape[1], kept, params)
    for i in np.flatnonzero(classes).tolist():
        encoder.encode(mask[i].astype(np.int32), bernoulli, model.predict(i, mask))
        model.learn(i, mask[i])
    return table, _range.finish(encoder)


def decode(table: bytes, payload: bytes, lines: int, places: int) -> np.ndarray:
    """Reads a mask `bool[lines, places]` back; refuses what :func:`encode` cannot write."""
    if not table:
        raise ArtifactError("a mask has no table")
    params, coder = Params(table[0] & 3, table[0] >> 2 & 7, 0), table[0] >> 5 & 3
    lag, end = read_varint(table, 1)
    kept, end = read_varint(table, end)
    length, end = read_varint(table, end)
    if params.steps == 3 or lag == 1 or lag > _MOST_LAG or end + length > len(table):
        raise ArtifactError("a mask has an unknown table")
    side_table, side_payload = table[end : end + length], table[end + length :]
    classes = _symbols.decode(coder, side_table, side_payload, lines, _CLASSES)
    if table[0] >> 7:
        classes = np.cumsum(classes, dtype=np.int64) % _CLASSES
    params = dataclasses.replace(params, lag=lag)
    coded = np.flatnonzero(classes).tolist()
    if not len(coded) <= kept <= len(coded) * places or not coded:
        raise ArtifactError(f"a mask cannot keep {kept} entries in {len(coded)} lines")
    if not _range.fits(len(coded) * places, payload):
        raise ArtifactError(f"{len(payload)} range-coded bytes cannot hold {lines} x {places}")
    mask = np.zeros((lines, places), bool)
    decoder, encoder = _range.start_decoder(payload), stream.queue.RangeEncoder()
    bernoulli, model = stream.model.Bernoulli(perfect=False), _Model(classes, places, kept, params)
    for i in coded:
        p = model.predict(i, mask)
        line = _range.read(decoder, bernoulli, p)
        encoder.encode(line, bernoulli, p)
        mask[i] = line
        model.learn(i, mask[i])
    if _range.finish(encoder) != payload or int(mask.sum()) != kept:
        raise ArtifactError("a mask does not end where its payload ends")
    return mask
