"""The leaf of weights whose inputs have a scale each."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._axes import Matrix
from .._bits import wide_dtype
from .._encoded import Encoded, divided, faults, leaf, rebuilt, static

SCALES = ("float16", "bfloat16", "float32")


@leaf
class Scaled(Encoded):
    r"""A tensor whose values are multiplied with a scale for each input.

    .. math:: w_{ij} = s_i \, v_{ij}

    in the `[in, out]` view of the core tensor. It undoes what moved the precision of the codes to
    the inputs that matter (:class:`AWQ`), so no other layer has to change. Under a mask it stands
    inside: ``Masked(values=Scaled(values=codes))``, as a zero stays zero. An encoder that is
    applied to such a leaf rebuilds the tensor and encodes it anew.

    Args:
      values: array `[*stack, *core]`, or a leaf of that shape.
      scale: `float16`, `bfloat16` or `float32` `[*stack, rows]`, a row for each entry of the *in*
        axes.
      core: shape of the core tensor.
      out: its output axes.
      dtype_name: data type of the tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values", "scale")
    values: Any
    scale: jax.Array
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    dtype_name: str = static()

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor."""
        return jnp.dtype(self.dtype_name)

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the scales."""
        return tuple(self.scale.shape[:-1])

    def rebuild(self) -> jax.Array:
        """Multiplies the values of one core tensor with the scales of their inputs."""
        values = rebuilt(self.values)
        wide = wide_dtype(self.dtype)
        shape = [1 if a in self.out else n for a, n in enumerate(self.core)]
        return (values.astype(wide) * self.scale.astype(wide).reshape(shape)).astype(self.dtype)

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides the values as the tensor, and the scales with its first *in* axis."""
        axes = [*spec, *[None] * (self.ndim - len(spec))]
        n = len(self.stack)
        first, *others = [axes[n + a] for a in range(len(self.core)) if a not in self.out] or [None]
        if any(a is not None for a in others):
            return None  # the scales run along all inputs in order
        values = divided(self.values, spec, local)
        scale = PartitionSpec(*axes[:n], first)
        return None if values is None else dataclasses.replace(self, values=values, scale=scale)

    def check(self) -> list[str]:
        """Checks the values, and the shape and type of the scales, and that they are finite."""
        wrong = faults(self.values)
        rows = Matrix(self.core, self.out).rows
        if tuple(self.values.shape) != self.shape:
            wrong.append(f"values have shape {self.values.shape}, the scales say {self.shape}")
        if self.scale.shape[-1] != rows:
            wrong.append(f"scale has shape {self.scale.shape} for {rows} inputs")
        if str(self.scale.dtype) not in SCALES:
            wrong.append(f"scale is {self.scale.dtype}, none of {', '.join(SCALES)}")
        elif not bool(jnp.all(jnp.isfinite(self.scale))):
            wrong.append("scale holds NaN or Inf")
        return wrong
