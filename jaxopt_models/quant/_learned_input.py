"""Encoders of inputs whose grids training finds: learned steps, learned clips, the unit range."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._encoded import is_encoded
from .._options import flag, number, width
from .._paths import flatten
from ._grid import divide, positive
from ._lsq import MeanAbs
from ._observers import MSE, Observer
from ._with_input import Input
from ._with_learned import OnInput, WithLearnedInput


@dataclasses.dataclass(frozen=True)
class _Observed(OnInput):
    """A grid that starts from a number, or from what calibration saw."""

    _: dataclasses.KW_ONLY
    start: float | None = None
    observer: Observer = MSE()  # noqa: RUF009 (a frozen value)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.start is not None:
            object.__setattr__(self, "start", number(self.start, f"{name}: start"))
            if self.start <= 0:
                raise ValueError(f"{name}: start={self.start!r} must be positive")
        if not isinstance(self.observer, Observer):
            raise TypeError(f"{name}: observer={self.observer!r} is no observer such as MSE()")

    @property
    def learns(self) -> tuple[bool, bool]:
        """Whether a scale is learned, and whether an offset is."""
        return True, False

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the observer watches, where no number is given."""
        return () if self.start is not None else (self.observer.watches,)

    def _begin(self, stats: Any, shape: tuple[int, ...], n: int) -> tuple[Any, Any]:
        moved, stack = self.learns[1], shape[:n]
        if self.start is not None:
            zero = jnp.zeros(stack, jnp.float32) if moved else None
            return jnp.full(stack, self.start, jnp.float32), zero
        rounding = Input(self.bits, per="static", symmetric=self.negative, observer=self.observer)
        bounds = rounding.bounds(stats, shape, n, instead="start=")
        low, high = (b.astype(jnp.float32) for b in bounds)
        if self.rule == "clip":
            return positive(high), None
        if self.negative:
            return positive(divide(jnp.maximum(-low, high), 2 ** (self.bits - 1) - 1)), None
        low = low if moved else jnp.zeros_like(low)
        return positive(divide(high - low, 2**self.bits - 1)), low if moved else None


@dataclasses.dataclass(frozen=True)
class LearnedInput(_Observed):
    r"""Rounds the input of a parameter to integers whose step is learned.

    .. math:: \hat x = s \, \mathrm{round}(\mathrm{clip}(x / s, -Q_n, Q_p))

    with the derivatives of :class:`LSQ`, that by `s` multiplied by :math:`1 / \sqrt{N Q_p}`, with
    `N` the entries of one sample. Signed, :math:`Q_n = 2^{b-1}` and :math:`Q_p = 2^{b-1} - 1`; for
    inputs that are never negative, as after a ReLU, 0 and :math:`2^b - 1`; with an offset these and
    :math:`\hat x = s q + \beta` (LSQ+). Composed with an encoder of the values:
    ``chain(quant.LSQ(bits=4), quant.LearnedInput(bits=4, signed=False))``.

    The parts ``scale`` (the step) and ``offset`` of the leaf are trained by what
    :func:`jaxopt_models.partition` returns; when the leaf is compressed again by the same encoder,
    they stay.

    Args:
      bits: width of an input, 2 to 8.
      signed: whether half of the codes are negative; of no use with ``offset``.
      offset: learn what the lowest code means, too.
      start: the first step; ``None``: chosen from statistics by ``observer``.
      observer: how the range is chosen; by default from the mean magnitude, as in the paper.

    Raises:
      TypeError: for options of another type.
      ValueError: for options out of range, or, when called, if statistics are missing or saw no
        input.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> recipe = [jom.Rule("w", jom.quant.LearnedInput(bits=2, start=1.0))]
      >>> latents = jom.prepare({"w": jnp.eye(2)}, recipe)
      >>> fn = jom.simulate(lambda p, x: x @ p["w"])
      >>> fn(latents, jnp.array([[-9.0, 0.7]]))
      Array([[-2.,  1.]], dtype=float32)

    References:
      Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_, 2020;
      Bhalgat et al., `LSQ+ <https://arxiv.org/abs/2004.09576>`_, 2020
    """

    rule: ClassVar[str] = "step"
    _: dataclasses.KW_ONLY
    signed: bool = True
    offset: bool = False
    observer: Observer = MeanAbs()  # noqa: RUF009 (a frozen value)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("signed", "offset"):
            flag(getattr(self, name), f"LearnedInput: {name}")

    @property
    def negative(self) -> bool:
        """Whether half of the codes are negative."""
        return self.signed and not self.offset

    @property
    def learns(self) -> tuple[bool, bool]:
        """Whether a scale is learned, and whether an offset is."""
        return True, self.offset


@dataclasses.dataclass(frozen=True)
class PACT(_Observed):
    r"""Clips the input of a parameter at a learned value, and rounds what is below.

    .. math:: y = \mathrm{clip}(x, 0, \alpha), \qquad
              \hat y = \mathrm{round}\left(y \frac{2^b - 1}{\alpha}\right) \frac{\alpha}{2^b - 1},
              \qquad \frac{\partial \hat y}{\partial \alpha} = 1[x \ge \alpha]

    and the derivative by `x` is one between zero and the clip. The clip only ever grows by its
    derivative where it cuts large inputs; the paper adds :math:`\lambda \alpha^2` to the loss, see
    :func:`clip_penalty`. Put on the layer after a ReLU, whose place it takes.

    Args:
      bits: width of an input, 2 to 8.
      start: the first clip; ``None``: chosen from statistics by ``observer``.
      observer: how it is chosen.

    Raises:
      TypeError: for options of another type.
      ValueError: for options out of range, or, when called, if statistics are missing or saw no
        input.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"w": jnp.eye(3)}, [jom.Rule("w", jom.quant.PACT(2, start=3.0))])
      >>> jom.simulate(lambda p, x: x @ p["w"])(small, jnp.array([[-1.0, 1.7, 9.0]]))
      Array([[0., 2., 3.]], dtype=float32)

    References:
      Choi et al., `PACT: Parameterized Clipping Activation for Quantized Neural Networks
      <https://arxiv.org/abs/1805.06085>`_, 2018
    """


@dataclasses.dataclass(frozen=True)
class DoReFaInput(OnInput):
    r"""Clips the input of a parameter to the unit range, and rounds it.

    .. math:: \hat x = \frac{1}{2^b - 1}
              \mathrm{round}\left((2^b - 1) \, \mathrm{clip}(x, 0, 1)\right)

    Derivatives pass between zero and one. Nothing is learned.

    With ``gradient_bits`` the gradient of the product with the parameter is rounded, too, as by
    :func:`round_gradient`, with a range for each sample. Its noise comes from a random key in the
    leaf, from the ``key`` of :func:`jaxopt_models.prepare`; :func:`renew_keys` puts in new ones,
    which each step needs. In a loop that uses the same parameter again the noise is the same.
    :func:`jaxopt_models.compress` leaves the keys out.

    Args:
      bits: width of an input, 1 to 8.
      gradient_bits: width to which gradients are rounded, 1 to 8, or ``None``.

    Raises:
      TypeError: if a width is no whole number.
      ValueError: for another width, or, when a gradient is rounded, if there is no key.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"w": jnp.eye(3)}, [jom.Rule("w", jom.quant.DoReFaInput(1))])
      >>> jom.simulate(lambda p, x: x @ p["w"])(small, jnp.array([[-1.0, 0.7, 9.0]]))
      Array([[0., 1., 1.]], dtype=float32)

    References:
      Zhou et al., `DoReFa-Net <https://arxiv.org/abs/1606.06160>`_, 2016
    """

    least: ClassVar[int] = 1
    _: dataclasses.KW_ONLY
    gradient_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_bits is None:
            return
        found = width(self.gradient_bits, "DoReFaInput: gradient_bits", least=1)
        object.__setattr__(self, "gradient_bits", found)


def clip_penalty(tree: Any) -> jax.Array:
    r"""Sums the squares of the clips of :class:`PACT`, to be added to a loss.

    .. math:: \sum_l \alpha_l^2

    Args:
      tree: from :func:`jaxopt_models.prepare`, or its trainable part.

    Returns:
      A number, `float32`; zero without such leaves.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> recipe = [jom.Rule("w", jom.quant.PACT(4, start=3.0))]
      >>> jom.quant.clip_penalty(jom.prepare({"w": jnp.eye(3)}, recipe))
      Array(9., dtype=float32)

    References:
      Choi et al., `PACT <https://arxiv.org/abs/1805.06085>`_, 2018
    """
    total = jnp.zeros((), jnp.float32)
    for x in (p.value for p in flatten(tree)[0] if is_encoded(p.value)):
        if isinstance(x, WithLearnedInput) and x.rule == "clip" and x.scale is not None:
            total = total + jnp.sum(jnp.square(x.scale))
    return total
