"""Matplotlib axes, which only the extra ``plot`` brings."""

from __future__ import annotations

from typing import Any


def axes_of(ax: Any, height: float) -> Any:
    """Returns axes to draw into: those that were given, or new ones, 7 inches wide."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, height), layout="constrained")[1] if ax is None else ax
