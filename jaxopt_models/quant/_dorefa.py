"""DoReFa: weights of a squashed range, and gradients of few bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._bits import pack_codes, wide_dtype
from .._encoded import Encoded
from .._encoder import Encoder
from .._options import width
from ._grid import divide, positive, quotient
from ._quantized import Quantized
from ._table import Binary


@dataclasses.dataclass(frozen=True)
class DoReFa(Encoder):
    r"""Rounds the squashed weights of a tensor to integers between minus one and one.

    .. math:: t = \frac{\tanh w}{2 \max|\tanh w|} + \frac12, \qquad
              \hat w = \frac{2}{2^b - 1} \mathrm{round}\left((2^b - 1) \, t\right) - 1

    and with one bit :math:`\hat w = \mathrm{sign}(w) \, \mathrm{mean}|w|`, zero counting as
    positive; one scale for the whole tensor. As this is no approximation of `w`, a network has to
    be trained with it (:func:`jaxopt_models.prepare`): derivatives pass through the rounding, and
    are those of the squashing. Encoding again moves the values.

    Args:
      bits: width of a code, 1 to 8.

    Raises:
      TypeError: if ``bits`` is no whole number.
      ValueError: for another width.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.DoReFa(bits=2)(jnp.array([[2.0], [0.1], [-0.6]])).materialize().ravel()
      Array([ 1.        ,  0.33333334, -0.33333334], dtype=float32)

    References:
      Zhou et al., `DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients <https://arxiv.org/abs/1606.06160>`_, 2016
    """

    bits: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", width(self.bits, "DoReFa: bits", least=1))

    @property
    def _top(self) -> int:
        return 2**self.bits - 1

    def encode(self, w: jax.Array, **given: Any) -> Encoded:
        """Encodes one core tensor; see :class:`DoReFa`."""
        if self.bits == 1:
            return Binary(per="tensor").encode(w, **given)
        codes = jnp.round(self._squash(w)).astype(jnp.int32)
        return Quantized(
            pack_codes(jnp.atleast_1d(codes), bits=self.bits, signed=False),
            self._scale(jnp.float32)[None],
            jnp.full((1,), self._top / 2, jnp.float16),
            core=tuple(w.shape),
            out=(),
            bits=self.bits,
            dtype_name=str(w.dtype),
        )

    def show(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> jax.Array:
        """Shows one core tensor, with the derivative of the squashing."""
        if self.bits == 1:
            return super().show(w, learned, **given)
        squashed = self._squash(w)
        codes = _rounded(squashed)
        scale = self._scale(squashed.dtype)
        return ((codes - jnp.array(self._top / 2, codes.dtype)) * scale).astype(w.dtype)

    def _squash(self, w: jax.Array) -> jax.Array:
        """Returns where weights lie among the codes."""
        t = jnp.tanh(w.astype(wide_dtype(w.dtype)))
        most = positive(jnp.max(jnp.abs(t)))
        return self._top * (quotient(t, 2 * most) + 0.5)

    def _scale(self, dtype: Any) -> jax.Array:
        return jnp.array(2 / self._top, dtype)


@jax.custom_jvp
def _rounded(x: jax.Array) -> jax.Array:
    return jnp.round(x)


@_rounded.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _rounded(*primals), tangents[0]


def round_gradient(
    x: jax.Array, *, bits: int, key: jax.Array, axes: tuple[int, ...] | None = None
) -> jax.Array:
    r"""Returns ``x``, whose gradient will be rounded to few bits, with noise.

    .. math:: m = 2 \max|g|, \qquad \hat g = m \left(
              \frac{1}{2^b - 1} \mathrm{round}\left((2^b - 1)
              \left(\frac{g}{m} + \frac12\right) + N\right) - \frac12 \right)

    with `N` uniform between minus and plus one half, so that the rounded gradient is `g` in the
    mean. Reverse mode only.

    Args:
      x: any floating array.
      bits: width of a code, 1 to 8.
      key: random key; a new one each step.
      axes: the maximum is taken along these; default: all but the first, so that each example has
        a range of its own.

    Returns:
      ``x``.

    Raises:
      TypeError: if ``bits`` is no whole number.
      ValueError: for another width.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> key = jax.random.key(0)
      >>> loss = lambda x: jnp.sum(jom.quant.round_gradient(x, bits=2, key=key) ** 2)
      >>> x = jnp.array([[3.0, -1.0, 0.4]])
      >>> sorted({round(float(g), 4) for g in jax.grad(loss)(x).ravel()} - {-6.0, -2.0, 2.0, 6.0})
      []

    References:
      Zhou et al., `DoReFa-Net <https://arxiv.org/abs/1606.06160>`_, 2016
    """
    bits = width(bits, "round_gradient: bits", least=1)
    return rounded_back(bits, tuple(range(1, x.ndim)) if axes is None else axes, x, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rounded_back(bits: int, axes: tuple[int, ...], x: jax.Array, key: Any) -> jax.Array:
    return x


def _forward(bits: int, axes: tuple[int, ...], x: jax.Array, key: Any) -> Any:
    return x, key


def _backward(bits: int, axes: tuple[int, ...], key: Any, g: jax.Array) -> Any:
    if key is None:
        raise ValueError(
            "gradients of few bits need random numbers: give prepare a key=, and each step a new "
            "one, by quant.renew_keys(tree, key)"
        )
    wide, top = g.astype(wide_dtype(g.dtype)), 2**bits - 1
    most = positive(2 * jnp.max(jnp.abs(wide), axis=axes, keepdims=True))
    noise = jax.random.uniform(key, g.shape, wide.dtype, -0.5, 0.5)
    codes = jnp.clip(jnp.round(top * (wide / most + 0.5) + noise), 0, top)
    return (most * (divide(codes, top) - 0.5)).astype(g.dtype), None


rounded_back.defvjp(_forward, _backward)
