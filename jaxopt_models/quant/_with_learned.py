"""The leaf of inputs on learned grids, and how these round."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._axes import Axes
from .._bits import wide_dtype
from .._compress import check_key, fold
from .._encoded import leaf, static
from .._encoder import Encoder
from .._latent import holds_latent
from .._options import width
from .._paths import flatten
from ._dorefa import rounded_back
from ._grid import divide, positive, quotient
from ._with_input import Reader, inside


@leaf
class WithLearnedInput(Reader):
    """A parameter, dense, compressed or in training, and the learned grid of its input.

    It is the same before, in and after training; see :class:`LearnedInput`, :class:`PACT` and
    :class:`DoReFaInput`.

    Args:
      values: array `[*stack, *core]`, or a leaf of that shape.
      scale: `float32` `[*stack]`: the step, or where the input is clipped; ``None`` for one.
      offset: `float32` `[*stack]`: what code 0 means; ``None`` for zero.
      key: random keys `[*stack]` for rounded gradients, or ``None``.
      core: shape of the core tensor.
      bits: width of an input.
      rule: ``"step"`` or ``"clip"``: what ``scale`` is.
      signed: whether half of the codes are negative.
      gradient_bits: width to which gradients of products are rounded, or ``None``.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values", "scale", "offset")
    values: Any
    scale: jax.Array | None
    offset: jax.Array | None
    key: jax.Array | None
    core: tuple[int, ...] = static()
    bits: int = static()
    rule: str = static()
    signed: bool = static()
    gradient_bits: int | None = static(default=None)

    def read(self, x: jax.Array, row: tuple[int, ...], over: tuple[str, ...]) -> jax.Array:
        """Rounds an input to the grid, with the derivatives of its encoder."""
        wide = x.astype(wide_dtype(x.dtype))
        scale, offset = (self._number(p, wide) for p in (self.scale, self.offset))
        if self.rule == "clip":
            return _clip(wide, scale, self.bits).astype(x.dtype)
        features = math.prod(x.shape[a] for a in row)
        return _step(wide, scale, offset, self.bits, self.signed, features).astype(x.dtype)

    def result(self, y: jax.Array, x: jax.Array, product: Any, over: tuple[str, ...]) -> jax.Array:
        """Rounds the gradient of the product, where that was asked for."""
        if self.gradient_bits is None:
            return y
        key = self.key if self.key is None else self.key.reshape(-1)[0]
        return rounded_back(self.gradient_bits, product.span, y, key)

    def _number(self, part: jax.Array | None, x: jax.Array) -> jax.Array | None:
        if part is None:
            return None
        if part.size > 1:
            raise ValueError(
                f"an input scale for each of {part.shape} stacked tensors, used at once; loop over "
                "the stack, or use quant.Input for this parameter"
            )
        return part.reshape((1,) * x.ndim).astype(x.dtype)


def _step(x: Any, step: Any, offset: Any, bits: int, signed: bool, features: int) -> jax.Array:
    """Rounds to a learned grid; `features` entries of a sample share its step."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    share = 1 / math.sqrt(max(1, features) * high)
    offset = jnp.zeros_like(step) if offset is None else offset

    def place(x: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        return quotient(x - offset, positive(jnp.abs(step)))

    @jax.custom_jvp
    def rounded(x: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        codes = jnp.clip(jnp.round(place(x, step, offset)), low, high)
        return codes * positive(jnp.abs(step)) + offset

    @rounded.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        step = primals[1]
        dx, dstep, doffset = tangents
        p = place(*primals)
        code = jnp.clip(jnp.round(p), low, high)
        within = (p > low) & (p < high)
        slope = jnp.where(within, code - p, code) * jnp.sign(step)
        out = jnp.where(within, dx, 0) + slope * (share * dstep)
        return rounded(*primals), out + jnp.where(within, 0, share * doffset)

    return rounded(x, step, offset)


def _clip(x: jax.Array, clip: Any, bits: int) -> jax.Array:
    """Rounds what is between zero and a learned clip (by default one)."""
    top = 2**bits - 1
    clip = jnp.ones((1,) * x.ndim, x.dtype) if clip is None else clip

    @jax.custom_jvp
    def rounded(x: jax.Array, clip: jax.Array) -> jax.Array:
        scale = divide(positive(jnp.abs(clip)), top)
        return jnp.clip(jnp.round(quotient(x, scale)), 0, top) * scale

    @rounded.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x, clip = primals
        above = x >= jnp.abs(clip)
        out = jnp.where(above, jnp.sign(clip) * tangents[1], jnp.where(x >= 0, tangents[0], 0))
        return rounded(*primals), out

    return rounded(x, clip)


@dataclasses.dataclass(frozen=True)
class OnInput(Encoder):
    """What encoders that make :class:`WithLearnedInput` have in common."""

    around: ClassVar[bool] = True
    rule: ClassVar[str] = "clip"
    least: ClassVar[int] = 2
    gradient_bits: ClassVar[int | None] = None
    bits: int

    def __post_init__(self) -> None:
        bits = width(self.bits, f"{type(self).__name__}: bits", least=self.least)
        object.__setattr__(self, "bits", bits)

    @property
    def negative(self) -> bool:
        """Whether half of the codes are negative."""
        return False

    @property
    def learns(self) -> tuple[bool, bool]:
        """Whether a scale is learned, and whether an offset is."""
        return False, False

    def _begin(self, stats: Any, shape: tuple[int, ...], n: int) -> tuple[Any, Any]:
        """Returns scale and offset, as training begins with them, for ``n`` stack axes."""
        return None, None

    def _made(self, w: Any) -> bool:
        """Says whether a leaf was made by this encoder; what it learned is kept then."""
        mine = (self.bits, self.rule, self.negative, self.gradient_bits)
        if not isinstance(w, WithLearnedInput):
            return False
        has = ("scale" in w.parts(), "offset" in w.parts())
        return has == self.learns and (w.bits, w.rule, w.signed, w.gradient_bits) == mine

    def missing(self, w: Any, stats: Any) -> list[str]:
        """Returns the statistics that are needed and not there; a trained leaf needs none."""
        return [] if self._made(w) else super().missing(None, stats)

    def __call__(
        self,
        w: Any,
        *,
        axes: Axes | None = None,
        keep: Any = None,
        stats: Any = None,
        key: Any = None,
    ) -> WithLearnedInput:
        """Puts the grid around ``w``; one that is there already stays as it was learned."""
        values, stack = inside(w, axes, keep, str(self))
        shape = tuple(values.shape)
        if self.gradient_bits is None or key is None:
            key = w.key if self._made(w) and holds_latent(w) else None
        elif stack:
            key = jax.random.split(key, shape[:stack])
        if self._made(w):
            return dataclasses.replace(w, key=key)
        scale, offset = self._begin(stats, shape, stack)
        return WithLearnedInput(
            values,
            scale,
            offset,
            key,
            core=shape[stack:],
            bits=self.bits,
            rule=self.rule,
            signed=self.negative,
            gradient_bits=self.gradient_bits,
        )


def renew_keys(tree: Any, key: jax.Array) -> Any:
    """Puts new random keys where gradients are rounded with noise; see :class:`DoReFaInput`.

    Args:
      tree: from :func:`jaxopt_models.prepare`.
      key: random key of this step; each path gets its own.

    Returns:
      The same tree with other keys.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> recipe = [jom.Rule("w", jom.quant.DoReFaInput(4, gradient_bits=4))]
      >>> latents = jom.prepare({"w": jnp.eye(3)}, recipe, key=jax.random.key(0))
      >>> again = jom.quant.renew_keys(latents, jax.random.key(1))
      >>> bool(again["w"].key == latents["w"].key)
      False
    """
    check_key(key, "renew_keys")
    leaves, unflatten = flatten(tree)
    values = []
    for p in leaves:
        x = p.value
        if isinstance(x, WithLearnedInput) and x.key is not None:
            new = fold(key, p.path)
            new = jax.random.split(new, x.key.shape) if x.key.shape else new
            x = dataclasses.replace(x, key=new)
        values.append(x)
    return unflatten(values)
