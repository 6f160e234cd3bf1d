"""Formats with few values: tables of a user, NF4, ternary, binary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._options import flag
from ._float import Tabled
from ._format import Format
from ._grid import Grid, mean, steady
from ._quantized import Quantized
from ._tables import ascending

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Table(Tabled):
    """Rounds a tensor to the values of a table, with a scale for each channel or group.

    Args:
      entries: 2 to 256 different finite values, ascending, which are kept as `float32`.
      per: see :class:`Format`, as are ``group``, ``block``, ``scale``, ``observer``.
      group: see there.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      TypeError: if the values are no numbers.
      ValueError: if there are too few or many, or as `float32` they are not ascending.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jnp.array([[8.0], [-3.1], [0.9]])
      >>> quant.Table((-1.0, -0.5, -0.25, -0.125, 0.0, 0.125, 0.5, 1.0))(w).materialize().ravel()
      Array([ 8., -4.,  1.], dtype=float32)
    """

    entries: tuple[float, ...]

    def __post_init__(self) -> None:
        try:
            if isinstance(self.entries, (str, bytes)):
                raise TypeError
            entries = tuple(float(v) for v in self.entries)
        except (TypeError, ValueError):
            raise TypeError(
                f"Table: entries={self.entries!r} are no numbers; give a tuple of them"
            ) from None
        object.__setattr__(self, "entries", entries)
        if not ascending(entries):
            raise ValueError(
                f"Table: entries={entries!r} must be 2 to 256 finite values, ascending, as "
                "float32 (nothing but zero below 1.2e-38)"
            )
        super().__post_init__()

    @property
    def table(self) -> tuple[float, ...]:
        """The values."""
        return self.entries

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.table) - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class NF4(Tabled):
    """Rounds a tensor to 16 quantiles of a normal distribution, in groups of 64.

    ``scale=quant.Int(bits=8, symmetric=False)`` encodes the scales, too (double quantization).

    Args:
      group: number of inputs that share a scale.
      per: see :class:`Format`, as are the others.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      ValueError: for what :class:`Format` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.NF4()(jnp.linspace(-1, 1, 64)[:, None]).storage_bits() / 64
      4.5

    References:
      Dettmers et al., `QLoRA: Efficient Finetuning of Quantized LLMs
      <https://arxiv.org/abs/2305.14314>`_, 2023
    """

    _: dataclasses.KW_ONLY
    group: int | None = 64

    @property
    def table(self) -> tuple[float, ...]:
        """The quantiles."""
        return _NF4

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4


@dataclasses.dataclass(frozen=True)
class Binary(Tabled):
    r"""Keeps the signs of a tensor, and their mean magnitude for each channel or group.

    .. math:: \alpha = \frac{1}{n} \sum |w_i|, \qquad q_i = \pm\alpha

    the least squared error of all signs and scales; zero counts as positive. Of a pruned tensor
    only the kept entries are averaged. With ``unit=True`` the scale is one (BinaryConnect).

    Args:
      unit: leave the magnitude out.
      per: see :class:`Format`, as are ``group``, ``block``, ``scale``.
      group: see there.
      block: see there.
      scale: see there.
      observer: has no say, as nothing is clipped.

    Raises:
      TypeError: if ``unit`` is neither true nor false.
      ValueError: for what :class:`Format` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.Binary()(jnp.array([[0.5], [-1.5], [1.0]])).materialize().ravel()
      Array([ 1., -1.,  1.], dtype=float32)

    References:
      Rastegari et al., `XNOR-Net <https://arxiv.org/abs/1603.05279>`_, 2016; Courbariaux et al.,
      `BinaryConnect <https://arxiv.org/abs/1511.00363>`_, 2015
    """

    _: dataclasses.KW_ONLY
    unit: bool = False

    def __post_init__(self) -> None:
        flag(self.unit, "Binary: unit")
        super().__post_init__()

    @property
    def table(self) -> tuple[float, ...]:
        """Minus and plus one."""
        return (-1.0, 1.0)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1

    def fit_runs(self, x: jax.Array, weight: jax.Array | None) -> Grid:
        """Averages the magnitudes of the kept entries."""
        kept = jnp.ones(x.shape, x.dtype) if weight is None else (weight > 0).astype(x.dtype)
        count = jnp.maximum(jnp.sum(kept, axis=-2), 1)
        scale = steady(mean(jnp.abs(x) * kept, count, self.block))
        return Grid(self.kept_scale(jnp.ones_like(scale) if self.unit else scale))

    def codes(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the signs: 0 for minus, 1 for plus."""
        return (x >= 0).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Ternary(Format):
    r"""Rounds a tensor to minus, zero and plus a magnitude, for each channel or group.

    .. math:: \Delta = 0.7 \, \mathrm{mean}|w|, \qquad
              \alpha = \mathrm{mean}(|w| : |w| > \Delta), \qquad q = \pm\alpha \text{ or } 0

    Codes are those of two-bit integers. Of a pruned tensor only the kept entries are averaged.

    Args:
      per: see :class:`Format`, as are ``group``, ``block``, ``scale``.
      group: see there.
      block: see there.
      scale: see there.
      observer: has no say, as nothing is clipped.

    Raises:
      ValueError: for what :class:`Format` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.Ternary()(jnp.array([[0.1], [-1.5], [2.5]])).materialize().ravel()
      Array([ 0., -2.,  2.], dtype=float32)

    References:
      Li et al., `Ternary Weight Networks <https://arxiv.org/abs/1605.04711>`_, 2016
    """

    @property
    def magnitudes(self) -> int:
        """Zero and one."""
        return 2

    def fit_runs(self, x: jax.Array, weight: jax.Array | None) -> Grid:
        """Chooses threshold and magnitude; see :class:`Ternary`."""
        size = jnp.abs(x)
        kept = jnp.ones(x.shape, bool) if weight is None else jnp.broadcast_to(weight > 0, x.shape)
        count = jnp.maximum(jnp.sum(kept, axis=-2), 1)
        inside = jnp.where(kept, size, 0)
        threshold = 0.7 * jnp.sum(inside, axis=-2) / count
        threshold = jnp.where(
            jnp.isfinite(threshold), threshold, 0.7 * mean(inside, count, self.block)
        )
        large = kept & (size > threshold[..., None, :])
        count = jnp.maximum(jnp.sum(large, axis=-2), 1)
        scale = steady(mean(jnp.where(large, size, 0), count, self.block))
        return Grid(self.kept_scale(scale), threshold=threshold)

    def codes(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the codes -1, 0 and 1."""
        return jnp.where(jnp.abs(x) > grid.threshold, jnp.sign(x), 0).astype(jnp.int32)

    def values(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """Returns what codes mean."""
        return codes.astype(grid.scale.dtype) * grid.scale

    def pack(self, codes: jax.Array, grid: Grid, m: Matrix, dtype: Any) -> Quantized:
        """Returns the leaf of codes."""
        leaf = self.leaf(codes, grid.scale, m, dtype, bits=2, signed=True)
        return Quantized(**leaf, zero_point=None)
