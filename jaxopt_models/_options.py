"""Checks of options that many functions take."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from typing import Any


class Brief:
    """What a frozen dataclass of options derives from: written as one would type it.

    Options at their default are left out.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass writes a __repr__ of its own unless the class has one.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Brief.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in given(self).items())
        return f"{type(self).__name__}({options})"


def given(value: Any) -> dict[str, Any]:
    """Returns the options of a dataclass that are not at their default."""
    options = {}
    # In the order in which they are typed, not in that of the classes they come from.
    for f in sorted(dataclasses.fields(value), key=lambda f: f.kw_only):
        option = getattr(value, f.name)
        if f.default is dataclasses.MISSING or option != f.default:
            options[f.name] = option
    return options


def whole(value: Any, name: str, *, least: int | None = None) -> int:
    """Returns a whole number as `int`, NumPy's included.

    Raises:
      TypeError: naming the option, if it is no whole number.
      ValueError: naming it, if it is below ``least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is no whole number; write an int") from None
    if least is not None and found < least:
        raise ValueError(f"{name}={found} must be at least {least}")
    return found


def width(value: Any, name: str, *, least: int = 2) -> int:
    """Returns the width of a code, ``least`` to 8 bits.

    Raises:
      TypeError: naming the option, if it is no whole number.
      ValueError: naming it, if it is out of range.
    """
    found = whole(value, name)
    if not least <= found <= 8:
        raise ValueError(f"{name}={found!r} is not a width of {least} to 8")
    return found


def flag(value: Any, name: str) -> bool:
    """Returns a truth value.

    Raises:
      TypeError: naming the option, if it is neither ``True`` nor ``False``.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is neither True nor False")
    return value


def portion(value: Any, name: str, *, closed: bool = False) -> float:
    """Returns a number in [0, 1), or [0, 1] if ``closed``, as `float`, NumPy's included.

    Raises:
      TypeError: naming the option, if it is no number.
      ValueError: naming it, if it is out of range.
    """
    interval = "[0, 1]" if closed else "[0, 1)"
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} is no number; write one in {interval}") from None
    if not (0 <= found < 1 or (closed and found == 1)):
        raise ValueError(f"{name}={found!r} is not in {interval}")
    return found


def number(value: Any, name: str) -> float:
    """Returns a finite real number as `float`, NumPy's included.

    Raises:
      TypeError: naming the option, if it is no number.
      ValueError: naming it, if it is not finite.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} is no number") from None
    if not math.isfinite(found):
        raise ValueError(f"{name}={found!r} is not finite")
    return found


def pattern(text: Any, name: str) -> re.Pattern[str]:
    """Compiles a regular expression on paths.

    Raises:
      TypeError: naming the option, if it is no `str`.
      ValueError: naming it, if it is no regular expression.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}={text!r} is no str; write for instance '.*/kernel'")
    try:
        # Names of parameters may hold any character: "." is all of them, newlines too.
        return re.compile(text, re.DOTALL)
    except re.error as e:
        raise ValueError(f"{name}={text!r} is no regular expression: {e}") from None
