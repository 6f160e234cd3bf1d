"""Floats of 8, 6 and 4 bits, alone and in blocks with shared exponents."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes

from .._axes import Matrix
from ._format import Format
from ._grid import Grid, divide, positive, power_of_two, quotient
from ._tables import FLOATS, Table, table_of
from ._tabulated import Tabulated


@dataclasses.dataclass(frozen=True)
class Tabled(Format):
    """What formats with a table have in common; a subclass names :attr:`table` and ``bits``."""

    @property
    def table(self) -> str | tuple[float, ...]:
        """The table as its leaf names it."""
        raise NotImplementedError

    @property
    def _values(self) -> Table:
        return table_of(self.table)

    @property
    def magnitudes(self) -> int:
        """Number of magnitudes of the values."""
        return max(2, len(self._values.order) // 2)

    @property
    def has_zero(self) -> bool:
        """Whether zero stands in the table."""
        return 0 in self._values.sorted

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """Returns the smallest scale with which the table spans a range."""
        t = self._values
        scale = jnp.zeros((), low.dtype)
        if t.highest > 0:
            scale = jnp.maximum(scale, divide(high, t.highest))
        if t.lowest < 0:
            scale = jnp.maximum(scale, divide(-low, -t.lowest))
        return Grid(self.kept_scale(scale))

    def codes(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the codes of the nearest values."""
        return self._values.nearest(quotient(x, grid.scale))

    def values(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """Returns what codes mean."""
        return jnp.asarray(self._values.values, grid.scale.dtype)[codes] * grid.scale

    def pack(self, codes: jax.Array, grid: Grid, m: Matrix, dtype: Any) -> Tabulated:
        """Returns the leaf of codes."""
        leaf = self.leaf(codes, grid.scale, m, dtype, bits=self.bits, signed=False)
        return Tabulated(**leaf, table=self.table)


@dataclasses.dataclass(frozen=True)
class Float(Tabled):
    r"""Rounds a tensor to floats of 8, 6 or 4 bits, with a scale for each channel or group.

    .. math:: s = \max|w| / \max(\text{type}), \qquad q = \mathrm{round}_\text{type}(w / s)

    to the nearest, halves to the even one, as `ml_dtypes` casts; what is beyond the largest value
    becomes the largest. With ``scale="power_of_two"`` the scale is that of the microscaling
    standard, :math:`2^{\lfloor \log_2 \max|w| \rfloor - e_{\max}}`; see :class:`MX`.

    Args:
      kind: exponent and mantissa bits: ``"e4m3"`` (without infinities), ``"e5m2"``, ``"e3m2"``,
        ``"e2m3"`` or ``"e2m1"``.
      per: see :class:`Format`, as are ``group``, ``block``, ``scale``, ``observer``.
      group: see there.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      TypeError: if the kind is no `str`.
      ValueError: for another kind, and for what :class:`Format` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> small = quant.Float("e2m1")(jnp.array([[6.0], [2.9], [-0.4]]))
      >>> small.materialize().ravel()
      Array([ 6. ,  3. , -0.5], dtype=float32)

    References:
      Micikevicius et al., `FP8 Formats for Deep Learning <https://arxiv.org/abs/2209.05433>`_,
      2022
    """

    kind: Literal["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise TypeError(
                f"{type(self).__name__}: kind={self.kind!r} is no str; give one of "
                f"{', '.join(FLOATS)}"
            )
        if self.kind not in FLOATS:
            raise ValueError(f"Float: kind={self.kind!r} is none of {', '.join(FLOATS)}")
        super().__post_init__()

    @property
    def table(self) -> str:
        """Name of the number type."""
        return FLOATS[self.kind]

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(ml_dtypes.finfo(self.table).bits)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """Returns the grid that spans ranges; see :class:`Float`."""
        if self.scale != "power_of_two":
            return super().grid(low, high)
        top = positive(jnp.maximum(-low, high))
        # The largest power of two of the type, 2^emax.
        largest = jnp.exp2(jnp.floor(jnp.log2(jnp.array(self._values.top, top.dtype))))
        return Grid(power_of_two(positive(power_of_two(top, up=False) / largest), up=False))


@dataclasses.dataclass(frozen=True)
class MX(Float):
    """Microscaling floats: 32 consecutive inputs share a power of two, `MXFP8`, `MXFP6`, `MXFP4`.

    The scale takes 8 bits for 32 values: 4.25 bits a weight for ``"e2m1"``.

    Args:
      kind: see :class:`Float`.
      group: number of inputs that share a scale.
      per: see :class:`Format`, as are the others.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      ValueError: for what :class:`Float` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.MX("e2m1")(jnp.ones((64, 2))).storage_bits() / 128
      4.25

    References:
      Rouhani et al., `Microscaling Data Formats for Deep Learning
      <https://arxiv.org/abs/2310.10537>`_, 2023
    """

    _: dataclasses.KW_ONLY
    group: int | None = 32
    scale: str | Format = "power_of_two"


@dataclasses.dataclass(frozen=True)
class NVFP4(Float):
    """Floats of 4 bits in groups of 16 whose scales are floats of 8 bits, under one `float32`.

    Args:
      kind: see :class:`Float`.
      group: number of inputs that share a scale.
      per: see :class:`Format`, as are the others.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      ValueError: for what :class:`Float` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.NVFP4()(jnp.ones((64, 2))).bits_by_part()
      {'codes': 576, 'scale': 32}

    References:
      NVIDIA, `Pretraining Large Language Models with NVFP4
      <https://arxiv.org/abs/2509.25149>`_, 2025
    """

    kind: Literal["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"] = "e2m1"
    _: dataclasses.KW_ONLY
    group: int | None = 16
    scale: str | Format = Float("e4m3", per="tensor")
