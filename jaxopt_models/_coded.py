"""What the leaves of integer codes have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ._axes import Matrix
from ._bits import has_planes, pack_codes, packed_layout, unpack_codes
from ._encoded import Encoded, faults, is_encoded, rebuilt


class Coded(Encoded):
    """A tensor as packed codes and a trained part that says what they mean.

    A subclass has the fields ``codes``, ``core``, ``out``, ``bits``, ``dtype_name`` and, first
    in ``trainable``, the part `[*stack, *core[out], n]` with what belongs to each output.
    """

    coded: ClassVar[dict[str, str]] = {"codes": "codes"}

    codes: jax.Array
    out: tuple[int, ...]
    bits: int
    dtype_name: str
    signed: bool

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor."""
        return jnp.dtype(self.dtype_name)

    @property
    def meaning(self) -> Any:
        """The part that says what codes mean: scales or centroids."""
        return getattr(self, self.trainable[0])

    @property
    def shared(self) -> int:
        """Number of neighbours along the last output axis that mean the same."""
        return 1

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of :attr:`meaning`."""
        return tuple(self.meaning.shape[: self.meaning.ndim - len(self.out) - 1])

    def integers(self) -> jax.Array:
        """Unpacks the codes: `int32`, shape of the tensor."""
        n = self.core[-1] if self.core else 1
        return unpack_codes(self.codes, n, bits=self.bits, signed=self.signed).reshape(self.shape)

    def hidden(self, keep: jax.Array) -> Coded:
        """Returns this leaf with code 0 where a mask hides it."""
        codes = jnp.where(keep, self.integers(), 0)
        packed = pack_codes(jnp.atleast_1d(codes), bits=self.bits, signed=self.signed)
        return dataclasses.replace(self, codes=packed)

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides codes as the tensor, and what belongs to each output with the outputs."""
        axes = [*spec, *[None] * (self.ndim - len(spec))]
        if self.core and axes[-1] is not None and has_planes(self.bits) and local[-1] % 8:
            return None
        n = len(self.stack)
        last = self._last_spec(axes[n:], local[n:])
        if last is NotImplemented:
            return None
        planes = (*axes[:-1], None, axes[-1]) if has_planes(self.bits) and axes else axes
        meaning = PartitionSpec(*axes[:n], *(axes[n + a] for a in self.out), last)
        if (
            self.out
            and axes[n + self.out[-1]] is not None
            and local[n + self.out[-1]] % self.shared
        ):
            return None
        rest = {k: meaning for k in self.parts() if k != "codes"}
        if is_encoded(self.meaning):
            inside = self.meaning.specs(meaning, self._meaning_shape(local[:n], local[n:]))
            if inside is None:
                return None
            rest[self.trainable[0]] = inside
        return dataclasses.replace(self, codes=PartitionSpec(*planes), **rest)

    def _meaning_shape(self, stack: tuple[int, ...], core: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of :attr:`meaning` in the leaf of a shard."""
        outputs = [core[a] for a in self.out]
        if outputs:
            outputs[-1] //= self.shared
        whole, shard = (Matrix(c, self.out).rows for c in (self.core, core))
        last = self.meaning.shape[-1]
        return (*stack, *outputs, last if last == 1 else last * shard // whole)

    def resized(self, shape: tuple[int, ...]) -> Encoded:
        """Returns the leaf of a shard; scales that are encoded themselves are of another shape."""
        core = tuple(shape[len(shape) - len(self.core) :])
        inner = {}
        if is_encoded(self.meaning):
            inner[self.trainable[0]] = self.meaning.resized(self._meaning_shape(self.stack, core))
        return dataclasses.replace(self, core=core, **inner)

    def _last_spec(self, core: list[Any], local: tuple[int, ...]) -> Any:
        """Returns how the last axis of :attr:`meaning` is divided, if it can be."""
        return None

    def check(self) -> list[str]:
        """Checks the layout of the codes and their meaning."""
        wrong = []
        name = self.trainable[0]
        outputs = Matrix(self.core, self.out).out_shape
        if outputs:
            outputs = (*outputs[:-1], outputs[-1] // self.shared)
        if tuple(self.meaning.shape[len(self.stack) : -1]) != outputs:
            wrong.append(f"{name} has shape {self.meaning.shape} for the outputs {outputs}")
        shape, dtype = packed_layout(self.core, bits=self.bits, signed=self.signed)
        if self.codes.dtype != dtype or tuple(self.codes.shape) != self.stack + shape:
            have = f"{self.codes.dtype}{list(self.codes.shape)}"
            wrong.append(f"codes are {have}, not {dtype}{list(self.stack + shape)}")
        meaning = rebuilt(self.meaning)
        if not np.all(np.isfinite(meaning)):
            wrong.append(f"{name} holds NaN or Inf")
        return wrong + faults(self.meaning)
