"""Formats that parameters could have, what each stores, and the harm it does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from .._axes import Axes
from .._bits import array_bits
from .._encoded import is_encoded
from .._encoder import Encoder
from .._plot import axes_of
from .._table import Table


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One format for one parameter.

    Args:
      encoder: the method; ``None`` keeps the parameter dense.
      bits: storage of the leaf, scales and all else included.
      score: the harm it does, by the metric; infinite where the model gives NaN or Inf.
    """

    encoder: Encoder | None
    bits: int
    score: float


@dataclasses.dataclass(frozen=True)
class Choices:
    """What can become of one parameter.

    Args:
      path: its path.
      shape: its shape.
      dense: its storage as it is, in bits.
      axes: the roles of its axes where they are not the default.
      candidates: the formats that were measured.
    """

    path: str
    shape: tuple[int, ...]
    dense: int
    axes: Axes | None
    candidates: tuple[Candidate, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity:
    """Scores and storage by parameter and candidate; made by :func:`sensitivity`.

    Printed it is a table, ``found["ip1/kernel"]`` are the choices of one parameter, and
    iterated it gives those of all.

    Args:
      metric: what the scores are.
      choices: of each parameter that takes part.
      others: storage of all that takes no part, in bits.
      note: what else was found.
    """

    metric: str
    choices: tuple[Choices, ...]
    others: int
    note: str = ""

    def __iter__(self) -> Iterator[Choices]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __getitem__(self, path: str) -> Choices:
        for c in self.choices:
            if c.path == path:
                return c
        paths = ", ".join(c.path for c in self.choices)
        raise KeyError(f"no parameter {path!r} takes part; paths are: {paths}")

    def table(self) -> Table:
        """Returns a row for each candidate of each parameter: bits of an entry, and score."""
        rows = [
            (c.path, list(c.shape), repr(k.encoder), k.bits / c.size, k.score)
            for c in self.choices
            for k in c.candidates
        ]
        notes = [self.note] if self.note else []
        columns = ("path", "shape", "encoder", "bits", "score")
        return Table(columns, rows, title=f"sensitivity: {self.metric}", notes=notes)

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, *, ax: Any = None) -> Any:
        """Draws the scores of each parameter, a mark for each candidate (extra ``plot``).

        Args:
          ax: matplotlib axes to draw into; default: new ones.

        Returns:
          The matplotlib axes.
        """
        ax = axes_of(ax, 0.25 * len(self.choices) + 1.5)
        for encoder in dict.fromkeys(k.encoder for c in self.choices for k in c.candidates):
            points = [
                (k.score, row)
                for row, c in enumerate(self.choices)
                for k in c.candidates
                if k.encoder == encoder and math.isfinite(k.score)
            ]
            if points:
                ax.plot(*zip(*points, strict=True), "o", label=repr(encoder))
        ax.set_yticks(range(len(self.choices)), [c.path for c in self.choices])
        ax.invert_yaxis()
        scores = [k.score for c in self.choices for k in c.candidates if math.isfinite(k.score)]
        if min(scores, default=0) < 0:
            ax.set_xscale("symlog", linthresh=max(map(abs, scores)) / 1e6)
        elif max(scores, default=0) > 0:
            ax.set_xscale("log")
        ax.set_xlabel(f"score ({self.metric})")
        ax.legend()
        return ax


def stored_bits(x: Any) -> int:
    """Returns the bits that a leaf of a tree occupies, compressed or not."""
    return x.storage_bits() if is_encoded(x) else array_bits(x) if hasattr(x, "dtype") else 0
