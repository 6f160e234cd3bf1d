"""How a GPU divides a product with codes as they are stored."""

from __future__ import annotations

import dataclasses
from typing import Any

from .stored import Format

#: Programs that keep an H100 busy: a few for each of its 132 processors.
PROGRAMS = 512


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is divided.

    Args:
      form: how the codes are stored.
      size: numbers of rows, inputs and outputs.
      each: neighbours that share a word and are multiplied one after the other.
      aligned: whether each line of codes starts with a byte.
      rows: of a tile of the input.
      lines, words: of a tile of the codes along inputs and outputs, ``each`` of them a word.
      group: number of inputs that share a scale, all of them if there is one.
      after: whether a tile has one scale for an output, which then follows the product.
      parts: number of runs of inputs that are summed up apart.
    """

    form: Format
    size: tuple[int, int, int]
    each: int
    aligned: bool
    rows: int
    lines: int
    words: int
    group: int
    after: bool
    parts: int

    @classmethod
    def of(cls, form: Format, shape: tuple[int, int], n: int, scale: Any) -> Tiles:
        """Chooses tiles for a product."""
        m, k = shape
        group = k // max(1, scale.shape[1])
        each = 8 if form.planes else 8 // form.bits
        aligned = form.planes or (k if form.inner else n) % each == 0
        each = each if aligned else 1
        rows = min(64, max(16, 1 << (m - 1).bit_length()))
        lines, words = (max(16, 64 // each), 64) if form.inner else (64, max(16, 64 // each))
        along = each if form.inner else 1
        while group < k and group % (lines * along) and lines > 16:
            lines //= 2
        after = group == k or group % (lines * along) == 0
        tiles = cls(form, (m, k, n), each, aligned, rows, lines, words, group, after, 1)
        wide, high, _ = tiles.grid
        # What is summed up apart is written and read: at most a quarter of what the codes are.
        apart = k * form.bits // (256 * m)
        parts = max(1, min(tiles.steps // 4, PROGRAMS // (wide * high), apart))
        return dataclasses.replace(tiles, parts=-(-tiles.steps // -(-tiles.steps // parts)))

    @property
    def steps(self) -> int:
        """Number of tiles along the inputs."""
        return -(-self.size[1] // (self.lines * (self.each if self.form.inner else 1)))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of programs along outputs, rows and runs of inputs."""
        m, _, n = self.size
        columns = self.words * (1 if self.form.inner else self.each)
        return -(-n // columns), -(-m // self.rows), self.parts
