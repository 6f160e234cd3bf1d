"""Entropy coding against the entropy: Huffman and range streams, the parts of a file."""

from __future__ import annotations

import os
import tempfile

import numpy as np

import jaxopt_models as jom
from jaxopt_models._demo import recipe
from jaxopt_models.artifact import Coder, audit, encode
from jaxopt_models.artifact._huffman import unpack_lengths

from ._rows import Row


def _entropy_bits(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _streams(quick: bool) -> list[np.ndarray]:
    """Codes and gaps of many kinds: geometric, normal, flat, nearly constant."""
    rng = np.random.default_rng(0)
    streams = []
    for n in (260, 2_000, 20_000) + (() if quick else (200_000, 1_000_000)):
        streams += [np.minimum(rng.geometric(p, n) - 1, 15) for p in (0.06, 0.2, 0.5, 0.9)]
        streams.append(np.clip(np.round(rng.normal(size=n) * 3 + 8), 0, 15).astype(int))
        streams.append(rng.integers(0, 16, n))
    return streams


def run(*, quick: bool) -> list[Row]:
    """Codes each stream with each coder, and saves a pruned and clustered LeNet-300-100."""
    per_symbol, kraft, over, over_small = [], [], [], []
    for symbols in _streams(quick):
        n, bits = len(symbols), _entropy_bits(symbols)
        huffman = encode(symbols, 16, coders=(Coder.HUFFMAN,))
        lengths = unpack_lengths(huffman.table, 16)
        per_symbol.append((8 * (len(huffman.payload)) - bits - 7) / n)
        kraft.append(abs(float((2.0 ** -lengths[lengths > 0].astype(float)).sum()) - 1))
        ranged = encode(symbols, 16, coders=(Coder.RANGE,))
        excess = (ranged.nbytes - 8) / (bits / 8) - 1
        (over_small if n == 260 else over).append(100 * excess)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "lenet.jom")
        rng = np.random.default_rng(0)
        params = {
            f"ip{i + 1}": {
                "kernel": rng.normal(size=shape).astype(np.float32),
                "bias": rng.normal(size=shape[1]).astype(np.float32),
            }
            for i, shape in enumerate([(784, 300), (300, 100), (100, 10)])
        }
        rules = recipe()
        jom.save(path, jom.compress(params, rules), recipe=rules)
        found = jom.artifact.inspect(path)
        differ = abs(sum(found.column("bytes")) - os.path.getsize(path))
        tensors = 6
        streams = audit(path)
    # A few hundred 8-bit codes are too few to learn 256 frequencies from, which an adaptive
    # coder does inside its stream, where others keep a table beside it.
    ranged = [r for r in streams if r["coder"].endswith("range")]
    excess = {r["distinct"] > 64: 0.0 for r in ranged}
    for r in ranged:
        few = r["distinct"] > 64
        excess[few] = max(excess[few], 100 * ((r["bytes"] - 8) / r["entropy_bytes"] - 1))
    return [
        Row("Huffman, worst bits a symbol above the entropy", max(per_symbol), "<= 1"),
        Row("Huffman, worst distance of the Kraft sum from 1", max(kraft), "<= 0"),
        Row("range coding, worst % above the entropy beyond 8 bytes", max(over), "<= 2"),
        Row("range coding, 260 symbols, likewise", max(over_small), "<= 5"),
        Row("range streams of a LeNet-300-100 file, likewise", excess[False], "<= 2"),
        Row("its streams of 300 biases of 8 bits, likewise", excess.get(True, 0.0)),
        Row("bytes of the part list beside the length of the file", differ, "<= 0"),
        Row(
            "container of LeNet-300-100 in bytes",
            found.data["container_bytes"],
            f"<= {160 + 24 * tensors}",
        ),
    ]
