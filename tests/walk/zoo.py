"""Small models in linen, nnx and plain dicts, and what each of their weights must meet."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Use:
    """What is expected of one weight: a parameter that multiplies an activation.

    Args:
      out: output axes of the core tensor, the tensor without its stack axes.
      stack: number of leading stack axes.
      macs: multiply-adds of one call by hand count, over all uses and iterations that run;
        a lookup counts 0, a transposed convolution without the zeros its stride puts in.
      inputs: float64 `[*stack, *groups, samples, rows]`, the rows in the order of the weight;
        a list with an array for each layer where the layers see different numbers of samples.
      groups: number of groups of the output axis that each see an input of their own, or 1.
    """

    out: tuple[int, ...]
    stack: int
    macs: int
    inputs: np.ndarray | list[np.ndarray]
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its arguments and the truth about its weights.

    Args:
      name: framework and model, as in ``"linen dense"``.
      fn: pure function of `(params, *args)`.
      params: its parameters, float32.
      args: arguments after ``params``.
      uses: what is expected of each weight, by normalised path.
      expected: float64 value of `fn(params, *args)`, computed in NumPy.
      stacked: regular expression of the paths with a leading stack axis, for recipes.
    """

    name: str
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    uses: dict[str, Use]
    expected: np.ndarray
    stacked: str = ""


@functools.cache
def cases() -> list[Case]:
    """Returns all cases; they are made at the first call."""
    # These modules import the classes above.
    import zoo_dict
    import zoo_linen
    import zoo_nnx
    import zoo_twins

    return [
        *zoo_twins.cases("linen", zoo_linen.MODELS),
        *zoo_twins.cases("nnx", zoo_nnx.MODELS),
        *zoo_dict.cases(),
    ]


def case(name: str) -> Case:
    """Returns the case of this name."""
    return next(c for c in cases() if c.name == name)


@functools.cache
def names() -> tuple[str, ...]:
    """Returns the names of all cases, for test ids."""
    return tuple(c.name for c in cases())
