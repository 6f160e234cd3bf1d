"""Which axes of a parameter are output, input and stack axes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ._options import whole


@dataclasses.dataclass(frozen=True)
class Axes:
    """The roles of a parameter's axes; every axis not named is an *in* axis.

    Scales and channels go by *out* axes, groups and n:m patterns run along the *in*
    axes (the contraction), *stack* axes hold several tensors of the same layer type
    (``nn.scan``) and are mapped over. Stack axes lead.

    Args:
      out: output axes; negative numbers count from the end. ``None`` is the default of
        the library: the last axis, or none for a vector, which then has one scale.
      stack: number of leading stack axes.

    Raises:
      TypeError: if ``out`` is no tuple of integers, or ``stack`` no integer.
      ValueError: if ``stack`` is negative.

    Example:
      >>> Axes.torch()                      # weights stored (out, in)
      Axes(out=(0,), stack=0)
      >>> Axes(stack=1).resolve(3)          # eight scanned layers (8, in, out)
      Axes(out=(1,), stack=1)
    """

    out: tuple[int, ...] | None = None
    stack: int = 0

    def __post_init__(self) -> None:
        if self.out is not None:
            if not isinstance(self.out, (tuple, list)):
                raise TypeError(f"Axes: out={self.out!r} is no tuple of axes; write out=(0,)")
            out = tuple(whole(a, "Axes: an axis of out") for a in self.out)
            object.__setattr__(self, "out", out)
        object.__setattr__(self, "stack", whole(self.stack, "Axes: stack"))
        if self.stack < 0:
            raise ValueError(f"Axes: stack={self.stack} is a number of leading axes, not an axis")

    @classmethod
    def torch(cls) -> Axes:
        """Returns the layout of torch and safetensors files: `(out, in, ...)`."""
        return cls(out=(0,))

    def resolve(self, ndim: int) -> Axes:
        """Returns the roles for a tensor of ``ndim`` axes, checked and normalised.

        Given ``out`` counts the axes of the whole tensor; the resolved one counts the
        axes of the core, the tensor without its stack.
        """
        if not 0 <= self.stack <= ndim:
            raise ValueError(f"axes: stack={self.stack} for a tensor of {ndim} axes")
        core = ndim - self.stack
        if self.out is None:
            return Axes((core - 1,) if core > 1 else (), self.stack)
        out = []
        for axis in self.out:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axes: out={self.out} names axis {axis} of {ndim}")
            if axis % ndim < self.stack:
                raise ValueError(
                    f"axes: out={self.out} names a stack axis (stack={self.stack}); "
                    "an axis has one role"
                )
            out.append(axis % ndim - self.stack)
        if len(set(out)) != len(out):
            raise ValueError(f"axes: out={self.out} names an axis twice")
        return Axes(tuple(sorted(out)), self.stack)


class Matrix:
    """The view of a core tensor as `[in, out]`, both flattened in the order of their axes.

    Args:
      core: shape of the core tensor.
      out: its output axes, resolved.
    """

    def __init__(self, core: tuple[int, ...], out: tuple[int, ...]):
        self.core = core
        self.out = out
        self.inner = tuple(a for a in range(len(core)) if a not in out)
        self.out_shape = tuple(core[a] for a in out)
        self.in_shape = tuple(core[a] for a in self.inner)
        self.rows = math.prod(self.in_shape)
        self.columns = math.prod(self.out_shape)

    def view(self, w: Any) -> jax.Array:
        """Rearranges a core tensor to `[rows, columns]`."""
        return jnp.transpose(w, self.inner + self.out).reshape(self.rows, self.columns)

    def unview(self, m: jax.Array) -> jax.Array:
        """Undoes :meth:`view`."""
        order = self.inner + self.out
        back = [order.index(a) for a in range(len(order))]
        return jnp.transpose(m.reshape(self.in_shape + self.out_shape), back)


def divisors(n: int, *, most: int = 12) -> list[int]:
    """Returns divisors of ``n`` greater than one, for messages that say what would fit."""
    return [d for d in range(2, n + 1) if n % d == 0][:most]
