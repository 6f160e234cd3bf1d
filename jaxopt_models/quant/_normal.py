"""The values that lose least of normally distributed weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics

from .._options import width
from ._float import Tabled
from ._observers import Observer
from ._rms import RMS


@dataclasses.dataclass(frozen=True)
class Normal(Tabled):
    r"""Rounds a tensor to the `2^b` values that lose least of a normal distribution.

    .. math:: v_i = \mathrm{E}[x \mid b_i < x \le b_{i+1}], \qquad b_i = (v_{i-1} + v_i) / 2,
              \qquad x \sim N(0, 1)

    (Lloyd and Max), times a scale for each channel or group, by default its root mean square. The
    mean squared error is 0.0345, 0.0095 and 0.0025 of the variance at 3, 4 and 5 bits, where
    evenly spaced integers have 0.0374, 0.0115 and 0.0035 at best. :class:`NF4` has other values:
    as many weights at each, and zero among them.

    It is meant for what :class:`Hadamard` has made normal, ``Hadamard(GPTQ(Normal(bits=4)))``.
    Zero is none of the values, and encoding again may move them, as the scale is another then.

    Args:
      bits: width of a code, 2 to 8.
      per: see :class:`Format`, as are ``group``, ``block``, ``scale``.
      group: see there.
      block: see there.
      scale: see there.
      observer: how the scale is chosen.

    Raises:
      TypeError: if ``bits`` is no integer.
      ValueError: if it is out of range, and for what :class:`Format` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jax.random.normal(jax.random.key(0), (4096, 1))
      >>> error = lambda fmt: float(jnp.mean((w - fmt(w).materialize()) ** 2))
      >>> error(quant.Normal(bits=4)) < 0.9 * error(quant.Int(bits=4, observer=quant.MSE()))
      True

    References:
      Max, `Quantizing for Minimum Distortion`, IRE Transactions on Information Theory, 1960
      Malinovskii et al., `Pushing the Limits of Large Language Model Quantization via the
      Linearity Theorem <https://arxiv.org/abs/2411.17525>`_, 2024
    """

    bits: int
    _: dataclasses.KW_ONLY
    observer: Observer = RMS()  # noqa: RUF009 (a frozen value)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", width(self.bits, "Normal: bits"))
        super().__post_init__()

    @property
    def table(self) -> tuple[float, ...]:
        """The values."""
        return normal_values(self.bits)


@functools.cache
def normal_values(bits: int) -> tuple[float, ...]:
    """Returns the values of :class:`Normal` for a scale of one.

    They are cut to six decimals, so that they are the same wherever they are computed.
    """
    normal = statistics.NormalDist()
    half = 2 ** (bits - 1)
    # As dense as the cube root of the density says is nearly best, so few steps are enough.
    start = statistics.NormalDist(0, 3**0.5)
    values = [start.inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    for _ in range(_STEPS):
        borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(values))]
        density = [*map(normal.pdf, borders), 0.0]
        below = [*map(normal.cdf, borders), 1.0]
        values = [(density[i] - density[i + 1]) / (below[i + 1] - below[i]) for i in range(half)]
    positive = tuple(round(v, 6) for v in values)
    return (*(-v for v in reversed(positive)), *positive)


_STEPS = 300
