"""How often the loops of a compiled program run."""

from __future__ import annotations

from typing import Any

from ._program import as_module


def ticks(program: Any) -> list[int]:
    """Returns how often each loop runs in which devices hand something to their neighbours.

    Read from a program as it is after all of XLA's changes: of a :func:`pipeline` these are the
    ticks of its phases, to be compared with those of its :class:`Timetable`.

    Args:
      program: what `jax.jit(fn).lower(...).compile()` returns, or the text of it.

    Returns:
      Numbers of ticks, in the order in which the program has the loops.

    Raises:
      ValueError: if the compiler does not say how often such a loop runs, or it is no program.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> parallel.ticks(jax.jit(jnp.sin).lower(jnp.ones(3)).compile())
      []
    """
    module, found = as_module(program), []
    for computation in module.computations.values():
        for loop in computation.values():
            body = dict(module.called(loop)).get("body") if loop.kind == "while" else None
            inside = module.computations.get(body, {}).values()
            if not any(one.kind.startswith("collective-permute") for one in inside):
                continue
            times = module.passes(loop, computation)
            if times is None:
                raise ValueError(f"ticks: the program does not say how often {loop.name} runs")
            found.append(times)
    return found
