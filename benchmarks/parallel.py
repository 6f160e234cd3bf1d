"""Parallelism: weak scaling and layouts on devices that are not there."""

from __future__ import annotations

from . import _parallel_layouts, _parallel_scaling
from ._rows import Row

PARTS = {
    "scaling": _parallel_scaling,
    "layouts": _parallel_layouts,
}


def run(*, quick: bool = False) -> list[Row]:
    """Measures all parts, one after another."""
    return [row for part in PARTS.values() for row in part.rows(quick=quick)]
