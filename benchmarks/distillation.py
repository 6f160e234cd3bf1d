"""Distillation: classes, schemes, no data, features, recovery, modalities, and step times."""

from __future__ import annotations

from . import (
    _distilled_classes,
    _distilled_features,
    _distilled_free,
    _distilled_minilm,
    _distilled_recovery,
    _distilled_schemes,
    _distilled_times,
    _distilled_towers,
)
from ._rows import Row

PARTS = {
    "classes": _distilled_classes,
    "schemes": _distilled_schemes,
    "free": _distilled_free,
    "features": _distilled_features,
    "recovery": _distilled_recovery,
    "minilm": _distilled_minilm,
    "times": _distilled_times,
    "towers": _distilled_towers,
}


def run(*, quick: bool = False) -> list[Row]:
    """Measures all parts, one after another."""
    return [row for part in PARTS.values() for row in part.rows(quick=quick)]
