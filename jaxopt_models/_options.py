"""Checks of options that many functions take."""

from __future__ import annotations

import operator
import re
from typing import Any


def whole(value: Any, name: str) -> int:
    """Returns a whole number as `int`, NumPy's included; raises a `TypeError` naming it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is no whole number") from None


def pattern(text: Any, name: str) -> re.Pattern[str]:
    """Compiles a regular expression; raises a `ValueError` naming it."""
    try:
        return re.compile(text)
    except (re.error, TypeError) as e:
        raise ValueError(f"{name}={text!r} is no regular expression: {e}") from None
