"""Half-quadratic quantization: zero points for few large errors, without data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._axes import Matrix
from .._options import number, whole
from ._grid import Grid, quotient
from ._int import Int


@dataclasses.dataclass(frozen=True)
class HQQ(Int):
    r"""Rounds a tensor to integers with real zero points that suit weights with outliers.

    .. math:: \min_z \; \sum_i |w_i - s \, (q_i - z)|^p, \qquad
              q_i = \mathrm{clip}(\mathrm{round}(w_i / s + z))

    with :math:`p < 1`, by turns for errors `e` that are let go and for the zero point,

    .. math:: e \leftarrow \mathrm{sign}(r) \max(|r| - |r|^{p-1} / \beta, 0), \quad
              z \leftarrow \mathrm{mean}(q - (w - e) / s), \quad \beta \leftarrow \kappa \beta

    where `r` is the error of rounding. Errors are counted in steps `s`, so that :math:`\beta` means
    the same for weights of any size; the scale stays that of :class:`Int`. Of all zero points on
    the way, and that of ``Int(symmetric=False)``, each group keeps the best, as it is stored
    (`float16`): the objective is never above that of rounding to the nearest. No data are needed.

    Zero is not among the values of a real zero point; pruned entries stay zero by their mask and
    have no say. It is a format as any other: ``GPTQ(HQQ(bits=3, group=64))``. Encoding again may
    move the values.

    Args:
      bits: width of a code, 2 to 8.
      symmetric: has to be ``False``; there is nothing to choose without a zero point.
      power: the exponent :math:`p`, in (0, 1].
      beta: weight of the rounding against the errors that are let go; the larger, the more of
        each is let go.
      kappa: by how much ``beta`` grows.
      steps: number of turns.
      per: see :class:`Format`, as are ``group``, ``block``, ``scale``, ``observer``.
      group: see there.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      TypeError: for options of another type.
      ValueError: for options out of range, and for what :class:`Int` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jax.random.t(jax.random.key(0), 4.0, (64, 16))
      >>> error = lambda q: jnp.mean(jnp.abs(w - q.materialize()) ** 0.7)
      >>> nearest = quant.Int(bits=3, symmetric=False)(w)
      >>> bool(error(quant.HQQ(bits=3)(w)) < error(nearest))
      True

    References:
      Badri and Shaji, `Half-Quadratic Quantization of Large Machine Learning Models
      <https://mobiusml.github.io/hqq_blog/>`_, 2023
    """

    _: dataclasses.KW_ONLY
    symmetric: bool = False
    power: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric:
            raise ValueError("HQQ: symmetric=True leaves no zero point to choose; use Int(...)")
        for name in ("power", "beta", "kappa"):
            object.__setattr__(self, name, number(getattr(self, name), f"HQQ: {name}"))
        object.__setattr__(self, "steps", whole(self.steps, "HQQ: steps", least=1))
        if not 0 < self.power <= 1:
            raise ValueError(f"HQQ: power={self.power} is not in (0, 1]")
        if self.beta <= 0 or self.kappa < 1:
            raise ValueError(
                f"HQQ: beta={self.beta} must be positive, and kappa={self.kappa} at least 1"
            )

    def fit_runs(self, x: jax.Array, weight: jax.Array | None) -> Grid:
        """Chooses a grid for each column of each group; see :class:`HQQ`."""
        start = super().fit_runs(x, weight)
        scale = start.scale[..., None, :]
        weight = jnp.ones((), x.dtype) if weight is None else weight.astype(x.dtype)
        total = jnp.sum(jnp.broadcast_to(weight, x.shape), axis=-2)
        total = jnp.where(total > 0, total, 1)

        def miss(zero: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Returns the errors in steps, and the codes, for zero points."""
            grid = Grid(scale, zero[..., None, :])
            codes = self.codes(x, grid)
            return quotient(x - self.values(codes, grid), scale), codes.astype(x.dtype)

        def loss(errors: jax.Array) -> jax.Array:
            size = jnp.abs(errors)
            powers = jnp.where(size > 0, jnp.where(size > 0, size, 1) ** self.power, 0)
            return jnp.sum(powers * weight, axis=-2)

        def turn(i: jax.Array, state: Any) -> Any:
            zero, beta, best, least = state
            errors, codes = miss(zero)
            now = loss(errors)
            better = now < least
            best, least = jnp.where(better, zero, best), jnp.where(better, now, least)
            size = jnp.where(errors != 0, jnp.abs(errors), 1)
            let = jnp.maximum(size - size ** (self.power - 1) / beta, 0)
            let = jnp.where(errors != 0, jnp.sign(errors) * let, 0)
            mean = jnp.sum((codes - quotient(x, scale) + let) * weight, axis=-2)
            return self._kept_zero(quotient(mean, total)), beta * self.kappa, best, least

        least = loss(miss(start.zero)[0])
        state = (start.zero, jnp.asarray(self.beta, x.dtype), start.zero, least)
        return Grid(start.scale, lax.fori_loop(0, self.steps + 1, turn, state)[2])

    def _kept_zero(self, zero: jax.Array) -> jax.Array:
        """Returns zero points as they will be read back."""
        return jnp.clip(zero, 0, 2**self.bits - 1).astype(jnp.float16).astype(zero.dtype)

    def pack_zero(self, zero: jax.Array, m: Matrix) -> jax.Array:
        """Returns zero points `[groups, columns]` as a leaf keeps them: `float16`."""
        return self.place(zero, m).astype(jnp.float16)
