"""XNOR-Net: binary weights with the paper's gradient, and binary inputs with their scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from .._axes import Axes
from .._chain import chain
from .._encoded import Encoded, leaf, static
from .._encoder import Encoder
from .._options import flag
from ._table import Binary
from ._with_input import Reader, inside


@dataclasses.dataclass(frozen=True)
class BWN(Binary):
    r"""Keeps the signs of a tensor and a scale for each filter, with the gradient of XNOR-Net.

    .. math:: \tilde W = \alpha \, \mathrm{sign}(W), \quad \alpha = \frac{1}{n} \sum |W_i|,
              \qquad \frac{\partial L}{\partial W_i} = \frac{\partial L}{\partial \tilde W_i}
              \left( \frac{1}{n} + 1[|W_i| \le 1] \, \alpha \right)

    It encodes as :class:`Binary` does; only :func:`jaxopt_models.prepare` sees the gradient.

    Args:
      per: see :class:`Binary`, as are the others.
      group: see there.
      block: see there.
      scale: see there.
      observer: see there.
      unit: see there; the gradient is then :math:`1[|W_i| \le 1]`.

    Raises:
      TypeError: for what :class:`Binary` raises.
      ValueError: for what :class:`Binary` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> latents = jom.prepare({"w": jnp.array([[0.5], [-1.5]])}, [jom.Rule("w", jom.quant.BWN())])
      >>> loss = lambda w: dataclasses.replace(latents["w"], w=w).materialize().sum()
      >>> jax.grad(loss)(latents["w"].w).ravel()               # 1/2 + 1, and 1/2 alone
      Array([1.5, 0.5], dtype=float32)

    References:
      Rastegari et al., `XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks <https://arxiv.org/abs/1603.05279>`_, 2016
    """

    def show(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> jax.Array:
        """Shows one core tensor, with the gradient of :class:`BWN`."""

        @jax.custom_jvp
        def shown(w: jax.Array, keep: Any) -> jax.Array:
            return self.encode(w, **{**given, "keep": keep}).rebuild()

        @shown.defjvp
        def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            value, w = shown(*primals), primals[0]
            m = self.matrix(w, given["axes"])
            n = (self.group or m.rows) * self.block
            each = 0 if self.unit else 1 / n
            slope = each + jnp.where(jnp.abs(w) <= 1, jnp.abs(value), 0)
            return value, slope.astype(w.dtype) * tangents[0]

        return shown(w, given["keep"])


@leaf
class WithSign(Reader):
    """A parameter, dense, compressed or in training, whose input counts by its sign.

    Args:
      values: array `[*stack, *core]`, or a leaf of that shape.
      core: shape of the core tensor.
      scaled: see :class:`Sign`.
    """

    values: Any
    core: tuple[int, ...] = static()
    scaled: bool = static()

    def read(self, x: jax.Array, row: tuple[int, ...], over: tuple[str, ...]) -> jax.Array:
        """Returns plus and minus one; derivatives pass where the input is within these."""
        return _sign(x)

    def result(self, y: jax.Array, x: jax.Array, product: Any, over: tuple[str, ...]) -> jax.Array:
        """Multiplies the product by the mean magnitude of what each entry of it has seen."""
        if not self.scaled:
            return y
        size = jnp.abs(lax.stop_gradient(x))
        conv = product.eqn.primitive.name == "conv_general_dilated"
        scale = _box(size, product) if conv else _mean(size, product)
        return y * (lax.pmean(scale, over) if over else scale).astype(y.dtype)


@jax.custom_jvp
def _sign(x: jax.Array) -> jax.Array:
    one = jnp.ones((), x.dtype)
    return jnp.where(x >= 0, one, jnp.where(x < 0, -one, x))  # a NaN has no sign


@_sign.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    [x], [dx] = primals, tangents
    return _sign(x), jnp.where(jnp.abs(x) <= 1, dx, 0)


def _mean(x: jax.Array, product: Any) -> jax.Array:
    """Returns the means of the rows of an input, in the shape of the product, or broadcast."""
    _, batch = product.eqn.params["dimension_numbers"]
    batch = batch[1 - product.position]
    free = [a for a in range(x.ndim) if a not in batch and a not in product.row]
    mean = jnp.mean(x.transpose(*batch, *free, *product.row), range(-len(product.row), 0))
    return jnp.expand_dims(mean, product.span)


def _box(x: jax.Array, product: Any) -> jax.Array:
    """Returns the means of the channels, averaged over the window of a convolution."""
    p = product.eqn.params
    spec, groups = p["dimension_numbers"], p["feature_group_count"]
    kernel = product.eqn.invars[1].aval.shape
    window = tuple(kernel[a] for a in spec.rhs_spec[2:])
    features = kernel[spec.rhs_spec[0]]
    x = x.transpose(spec.lhs_spec)
    x = jnp.mean(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 2)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    scale = lax.conv_general_dilated(
        x,
        jnp.full((groups, 1, *window), 1 / math.prod(window), x.dtype),
        **{n: p[n] for n in names},
        feature_group_count=groups,
    )
    scale = jnp.repeat(scale, features // groups, axis=1) if groups > 1 else scale
    back = [spec.out_spec.index(a) for a in range(len(spec.out_spec))]
    return scale.transpose(back)


@dataclasses.dataclass(frozen=True)
class Sign(Encoder):
    r"""Makes the input of a parameter binary.

    .. math:: \hat y = K \odot (\mathrm{sign}(x) * W), \qquad
              K = \mathrm{mean}_c |x| * \frac{1}{k_h k_w} \mathbf{1}

    so `K` is the mean magnitude of the input that each entry of the product has seen: of a row, or
    of the channels in a window of a convolution. Derivatives by `x` pass where
    :math:`|x| \le 1`, and `K` counts as a constant. Zero counts as positive; what a convolution
    pads stays zero.

    Args:
      scaled: ``False`` leaves `K` out.

    Raises:
      TypeError: if ``scaled`` is neither true nor false.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"w": jnp.ones((2, 1))}, [jom.Rule("w", jom.quant.Sign())])
      >>> jom.simulate(lambda p, x: x @ p["w"])(small, jnp.array([[0.5, 2.5]]))       # 2 * 1.5
      Array([[3.]], dtype=float32)

    References:
      Rastegari et al., `XNOR-Net <https://arxiv.org/abs/1603.05279>`_, 2016
    """

    around: ClassVar[bool] = True
    _: dataclasses.KW_ONLY
    scaled: bool = True

    def __post_init__(self) -> None:
        flag(self.scaled, "Sign: scaled")

    def __call__(
        self,
        w: Any,
        *,
        axes: Axes | None = None,
        keep: Any = None,
        stats: Any = None,
        key: Any = None,
    ) -> WithSign:
        """Says of ``w`` that its input is binary; see :class:`Sign`."""
        values, stack = inside(w, axes, keep, str(self))
        return WithSign(values, tuple(values.shape[stack:]), self.scaled)


@dataclasses.dataclass(frozen=True)
class XNOR(Encoder):
    """Makes a parameter and its input binary: ``chain(BWN(), Sign())``.

    For the inner layers of a network whose blocks are in the order normalization, (binary input)
    layer, with no ReLU before it. The first and the last layer stay as they are in the paper.

    Args:
      scaled: see :class:`Sign`.

    Raises:
      TypeError: if ``scaled`` is neither true nor false.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> jom.quant.XNOR()(jnp.ones((4, 2))).kind()
      'WithSign(Tabulated)'

    References:
      Rastegari et al., `XNOR-Net <https://arxiv.org/abs/1603.05279>`_, 2016
    """

    _: dataclasses.KW_ONLY
    scaled: bool = True

    def __post_init__(self) -> None:
        self.sides()

    def sides(self) -> tuple[Encoder | None, tuple[Encoder, ...]]:
        """Returns the encoder of the values and that of the input."""
        return BWN(), (Sign(scaled=self.scaled),)

    def __call__(self, w: Any, **given: Any) -> Encoded:
        """Encodes ``w``, and says that its input is binary."""
        values, around = self.sides()
        return chain(values, *around)(w, **given)
