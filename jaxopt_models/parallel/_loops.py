"""How often the loops of a compiled program run."""

from __future__ import annotations

import re
from typing import Any

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(r"\bwhile\([^\n]*\bbody=%?([\w.\-]+)[^\n]*")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


def ticks(program: Any) -> list[int]:
    """Returns how often each loop runs in which devices hand something to their neighbours.

    Read from a program as it is after all of XLA's changes: of a :func:`pipeline` these are the
    ticks of its phases, to be compared with those of its :class:`Timetable`.

    Args:
      program: what `jax.jit(fn).lower(...).compile()` returns, or the text of it.

    Returns:
      Numbers of ticks, in the order in which the program has the loops.

    Raises:
      ValueError: if the compiler does not say how often such a loop runs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> parallel.ticks(jax.jit(jnp.sin).lower(jnp.ones(3)).compile())
      []
    """
    text = program if isinstance(program, str) else program.as_text()
    bodies = dict(_COMPUTATION.findall(text))
    found = []
    for loop in _LOOP.finditer(text):
        if " collective-permute" not in bodies.get(loop[1], ""):
            continue
        trips = _TRIPS.search(loop[0])
        # A TPU's compiler does not say; JAX's loops count from zero to the one bound they have.
        condition = _CONDITION.search(loop[0])
        test = bodies.get(condition[1], "") if condition else ""
        bounds = [trips[1]] if trips else _BOUND.findall(test) if "direction=LT" in test else []
        if len(bounds) != 1:
            raise ValueError(f"ticks: the program does not say how often {loop[1]} runs")
        found.append(int(bounds[0]))
    return found
