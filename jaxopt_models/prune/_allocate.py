"""Planners: one decision across all parameters, written down as a recipe."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp

from .._axes import Axes
from .._bits import wide_dtype
from .._compress import named
from .._encoded import rebuilt
from .._encoder import check_tensor
from .._options import pattern, portion
from .._paths import flatten
from .._recipe import Rule
from ._magnitude import Magnitude
from ._select import keep_largest


def allocate_global(
    params: Any, *, sparsity: float, only: str = ".*", axes: Axes | None = None
) -> list[Rule]:
    r"""Plans magnitude pruning with one threshold for all parameters.

    .. math:: m^{(l)}_i = 1 \text{ for the } n - \lfloor s n + 1/2 \rfloor \text{ largest }
              |w^{(l)}_i| \text{ over all } l

    Args:
      params: tree of parameters.
      sparsity: share of all selected entries to drop, in [0, 1).
      only: regular expression on whole paths of the parameters that take part; matrices
        and larger ones only, biases and norms (one axis beside the stack) stay dense.
      axes: roles of the axes of these parameters, if not the default.

    Returns:
      A recipe with a rule, and so an exact count, for each path.

    Raises:
      ValueError: if nothing is selected, or a layer would lose every entry.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"a": jnp.array([[1.0, 8.0]]), "b": jnp.array([[7.0, 9.0], [2.0, 3.0]])}
      >>> jom.prune.allocate_global(params, sparsity=0.5)
      [Rule('a', Magnitude(sparsity=0.5)), Rule('b', Magnitude(sparsity=0.5))]
    """
    sparsity = portion(sparsity, "allocate_global: sparsity")
    selected = pattern(only, "allocate_global: only")
    leaves, _ = flatten(params)
    least = 1 if axes is None else 1 + axes.stack
    chosen = [
        p
        for p in leaves
        if not p.reason and selected.fullmatch(p.path) and len(p.value.shape) > least
    ]
    if not chosen:
        paths = ", ".join(p.path for p in leaves)
        raise ValueError(
            f"allocate_global: only={only!r} selects no parameter of two or more axes. "
            f"Paths are: {paths}"
        )
    scores = []
    for p in chosen:
        w = rebuilt(p.value)
        with named(f"allocate_global: {p.path}"):
            check_tensor(w)
        scores.append(jnp.abs(w.astype(wide_dtype(w.dtype))))
    size = sum(s.size for s in scores)
    kept = size - int(sparsity * size + 0.5)
    marks = keep_largest(scores, kept, keep=[None] * len(scores))
    rules = []
    for p, mark in zip(chosen, marks, strict=True):
        count = int(jnp.sum(mark))
        if count == 0:
            raise ValueError(
                f"allocate_global: {p.path} would lose all of its {mark.size} entries and cut the "
                f"network in two; lower the sparsity, or leave it out by only="
            )
        across = axes is not None and axes.stack > 0
        encoder = Magnitude(sparsity=(mark.size - count) / mark.size, across_stack=across)
        rules.append(Rule(re.escape(p.path), encoder, axes))
    return rules
