"""The leaf of uniform integer quantization."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._coded import Coded
from .._encoded import leaf, static


@leaf
class Quantized(Coded):
    r"""Integer codes with a scale, and perhaps a zero point, for each group.

    .. math:: w = s \, (q - z)

    In the `[in, out]` view of the core tensor each column has ``groups`` runs of equal
    length along *in*; a run shares one scale.

    Args:
      codes: packed integers (:func:`jaxopt_models._bits.pack_codes`): `[*stack, *core]` of
        `int2/4/8` or `uint8`, or bit planes along the last axis.
      scale: `float32` `[*stack, *core[out], groups]`.
      zero_point: `uint8`, shape of ``scale``; ``None`` if the codes are signed and
        symmetric.
      core: shape of the core tensor.
      out: axes of the core whose entries have scales of their own.
      bits: width of a code.
      dtype_name: data type of the tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    bits: int = static()
    dtype_name: str = static()

    @property
    def signed(self) -> bool:
        """Whether the codes are two's complement: where there is no zero point."""
        return self.zero_point is None

    @property
    def group(self) -> int:
        """Number of entries that share a scale."""
        return Matrix(self.core, self.out).rows // self.scale.shape[-1]

    def rebuild(self) -> jax.Array:
        """Multiplies the codes of one core tensor by their scales."""
        q = self.integers()
        if self.zero_point is not None:
            q = q - self._spread(self.zero_point.astype(jnp.int32))
        return (q.astype(self.scale.dtype) * self._spread(self.scale)).astype(self.dtype)

    def _spread(self, per_group: jax.Array) -> jax.Array:
        m = Matrix(self.core, self.out)
        groups = per_group.shape[-1]
        columns = per_group.reshape(m.columns, groups).T[:, None, :]
        return m.unview(
            jnp.broadcast_to(columns, (groups, m.rows // groups, m.columns)).reshape(
                m.rows, m.columns
            )
        )

    def _last_spec(self, core: list[Any], local: tuple[int, ...]) -> Any:
        inner = [a for a in range(len(self.core)) if a not in self.out]
        divided = [a for a in inner if core[a] is not None]
        groups = self.scale.shape[-1]
        if not divided or groups == 1:
            return None
        shards = self.core[inner[0]] // local[inner[0]]
        # Runs go along all inputs in order: a shard has whole ones if the first axis is divided.
        return core[inner[0]] if divided == inner[:1] and groups % shards == 0 else NotImplemented

    def check(self) -> list[str]:
        """Checks also the groups and the zero points."""
        wrong = super().check()
        if wrong:
            return wrong
        groups, rows = self.scale.shape[-1], Matrix(self.core, self.out).rows
        if groups == 0 or rows % groups:
            wrong.append(f"{groups} groups do not divide {rows} inputs")
        z = self.zero_point
        if z is not None and (z.shape != self.scale.shape or z.dtype != jnp.uint8):
            wrong.append("zero points are not uint8 of the shape of the scales")
        elif z is not None and z.size and int(jnp.max(z)) >= 1 << self.bits:
            wrong.append(f"a zero point is beyond {self.bits} bits")
        return wrong
