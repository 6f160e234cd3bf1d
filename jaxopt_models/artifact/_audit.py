"""How near the streams of a file come to their entropy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._encoded import Encoded
from . import _huffman
from ._leaves import SectionReader
from ._masks import MaskLayout, read_gaps
from ._open import Opened
from ._reader import Reader
from ._symbols import Coder


def audit(
    path: str | os.PathLike[str], *, types: Sequence[type[Encoded]] = ()
) -> list[dict[str, Any]]:
    r"""Compares every coded stream of a file with the entropy of its symbols.

    .. math:: H = -\frac{1}{8} \sum_s c_s \log_2 \frac{c_s}{n}

    bytes, where ``s`` occurs ``c_s`` times among ``n`` symbols. A coder that adapts, or a
    mask coded by lines, may need less.

    Args:
      path: the file.
      types: your own leaf classes that the file may name.

    Returns:
      A dictionary for each stream: ``path``, ``part``, ``coder`` (``gaps:`` and a coder for
      masks of index gaps), ``symbols`` (their number: gaps, entries of a mask, or codes),
      ``distinct``, ``entropy_bytes``, ``bytes`` (the whole stream), ``table_bytes`` of them,
      and ``kraft``, the Kraft sum of a Huffman table or ``None``.

    Raises:
      ArtifactError: for what is no sound artifact.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models.artifact import audit
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jom")
      ...     size = jom.save(path, {"codes": jnp.arange(2000, dtype=jnp.uint8) % 7})
      ...     [row] = audit(path)
      >>> row["coder"], row["symbols"], row["entropy_bytes"] <= row["bytes"] < 720
      ('range', 2000, True)
    """
    rows: list[dict[str, Any]] = []
    with Reader(path) as reader:
        opened = Opened(reader, types)
        for i, name in enumerate(opened.paths):
            recorder = _Recorder(reader.read(i), opened.types)
            recorder.tensor(reader.sections[i].description)
            rows += [{"path": name, **row} for row in recorder.rows]
    return rows


class _Recorder(SectionReader):
    """Reads a section and notes its streams."""

    def __init__(self, data: bytes, types: Mapping[str, type[Encoded]]) -> None:
        super().__init__(data, types)
        self.rows: list[dict[str, Any]] = []

    def mask(self, d: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Reads and notes a mask."""
        layout, table_bytes, payload_bytes = d[2:]
        start = self.at
        mask = super().mask(d, shape)
        table = bytes(self.data[start : start + table_bytes])
        name, symbols, kraft = MaskLayout(layout).name.lower(), mask, None
        if layout == MaskLayout.GAPS:
            payload = bytes(self.data[start + table_bytes : self.at])
            symbols, coder, inner = read_gaps(table, payload, mask.size)
            name, kraft = f"gaps:{Coder(coder).name.lower()}", _kraft(coder, inner)
        self._note("index", name, symbols, table_bytes, payload_bytes, kraft)
        return mask

    def symbols(self, part: str, lengths: list[int], count: int, alphabet: int) -> np.ndarray:
        """Reads and notes a stream."""
        coder, table_bytes, payload_bytes = lengths
        table = bytes(self.data[self.at : self.at + table_bytes])
        symbols = super().symbols(part, lengths, count, alphabet)
        name = Coder(coder).name.lower()
        self._note(part, name, symbols, table_bytes, payload_bytes, _kraft(coder, table))
        return symbols

    def _note(
        self, part: str, coder: str, symbols: np.ndarray, table: int, payload: int, kraft: Any
    ) -> None:
        counts = np.bincount(symbols.reshape(-1).astype(np.int64))
        counts = counts[counts > 0]
        bits = -(counts * np.log2(counts / counts.sum())).sum() if len(counts) else 0.0
        row = {"part": part, "coder": coder, "symbols": symbols.size, "distinct": len(counts)}
        row |= {"entropy_bytes": float(bits) / 8 + 0.0, "bytes": table + payload}
        self.rows.append(row | {"table_bytes": table, "kraft": kraft})


def _kraft(coder: int, table: bytes) -> float | None:
    if coder != Coder.HUFFMAN:
        return None
    lengths = _huffman.unpack_lengths(table, 1 << 16)
    return float((2.0 ** -lengths[lengths > 0]).sum())
