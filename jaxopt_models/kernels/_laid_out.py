"""What leaves in the order of a machine's kernels have in common."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from .._axes import Matrix
from .._encoded import Encoded


class LaidOut(Encoded):
    """A parameter in the order in which a kernel reads it; no file keeps it.

    A subclass has the fields ``core``, ``out`` and ``dtype_name``.
    """

    laid_out: ClassVar[bool] = True
    out: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor."""
        return jnp.dtype(self.dtype_name)

    @property
    def matrix(self) -> Matrix:
        """The `[in, out]` view of the core tensor."""
        return Matrix(self.core, self.out)
