"""Figures of functions that were timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from jaxopt_models._timing import interleaved as interleaved


def ratio(times: Mapping[str, list[float]], name: str, over: str) -> float:
    """Returns the median of the ratios of two functions, round by round."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=True))


def median(times: Mapping[str, list[float]], name: str) -> float:
    """Returns the median of the seconds of one function."""
    return statistics.median(times[name])
