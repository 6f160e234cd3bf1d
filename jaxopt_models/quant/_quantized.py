"""The leaf of uniform integer quantization."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._encoded import leaf, static
from ._grouped import Grouped


@leaf
class Quantized(Grouped):
    r"""Integer codes with a scale, and perhaps a zero point, for each group.

    .. math:: w = s \, (q - z)

    In the `[in, out]` view of the core tensor each column has ``groups`` runs of equal
    length along *in*; a run shares one scale.

    Args:
      codes: packed integers (:func:`jaxopt_models._bits.pack_codes`): `[*stack, *core]` of
        `int2/4/8` or `uint8`, or bit planes along the last axis.
      scale: floating `[*stack, *core[out], groups]`, or a leaf of that shape.
      zero_point: `uint8`, or `float16` where it is no whole number, shape of ``scale``; ``None``
        if the codes are signed and symmetric.
      core: shape of the core tensor.
      out: axes of the core whose entries have scales of their own.
      bits: width of a code.
      dtype_name: data type of the tensor.
      block: number of neighbours along the last output axis that share a scale; the axis of
        ``scale`` is shorter by that.
    """

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    codes: jax.Array
    scale: Any
    zero_point: jax.Array | None
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    bits: int = static()
    dtype_name: str = static()
    block: int = static(default=1)

    @property
    def signed(self) -> bool:
        """Whether the codes are two's complement: where there is no zero point."""
        return self.zero_point is None

    def rebuild(self) -> jax.Array:
        """Multiplies the codes of one core tensor by their scales."""
        scale = self.scales()
        q = self.integers().astype(scale.dtype)
        if self.zero_point is not None:
            q = q - self.spread(self.zero_point.astype(scale.dtype))
        return (q * self.spread(scale)).astype(self.dtype)

    def check(self) -> list[str]:
        """Checks also the groups and the zero points."""
        wrong = super().check()
        z = self.zero_point
        if wrong or z is None:
            return wrong
        if z.shape != self.scale.shape or z.dtype not in (jnp.uint8, jnp.float16):
            wrong.append("zero points are not uint8 or float16 of the shape of the scales")
        elif z.size and not (float(jnp.min(z)) >= 0 and float(jnp.max(z)) < 1 << self.bits):
            wrong.append(f"a zero point is beyond {self.bits} bits")
        return wrong
