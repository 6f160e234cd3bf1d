"""BinaryConnect, latents that stay in range, and products of packed signs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._bits import wide_dtype
from .._encoded import Encoded, is_encoded
from .._latent import Latent
from .._options import flag, number, pattern
from .._partition import check_trainable
from .._paths import flatten
from ._table import Binary


@dataclasses.dataclass(frozen=True)
class BinaryConnect(Binary):
    r"""Makes each weight plus or minus one.

    Deterministic, :math:`\hat w = \mathrm{sign}(w)`, zero counting as positive; stochastic,

    .. math:: P(\hat w = 1) = \mathrm{clip}\left(\frac{w + 1}{2}, 0, 1\right).

    For training, ``show = straight_through([Rule(path, BinaryConnect(stochastic=True))])`` and
    ``show(params, key)`` with a new key each step, the optimizer followed by
    :func:`clip_latents`; the paper tests with the signs.

    Args:
      stochastic: draw each weight; needs ``key``.
      unit: has to be true.
      per: of no effect, as are the others.
      group: see there.
      block: see there.
      scale: see there.
      observer: see there.

    Raises:
      TypeError: if ``stochastic`` is neither true nor false.
      ValueError: when called, if it is true and there is no key.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.BinaryConnect()(jnp.array([[0.5], [-0.1]])).materialize().ravel()
      Array([ 1., -1.], dtype=float32)

    References:
      Courbariaux et al., `BinaryConnect: Training Deep Neural Networks with binary weights during
      propagations <https://arxiv.org/abs/1511.00363>`_, 2015
    """

    _: dataclasses.KW_ONLY
    unit: bool = True
    stochastic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self.stochastic, "BinaryConnect: stochastic")
        if not self.unit:
            raise ValueError("BinaryConnect: unit=False; use Binary() for signs with a scale")

    def encode(self, w: jax.Array, **given: Any) -> Encoded:
        """Encodes one core tensor; see :class:`BinaryConnect`."""
        if not self.stochastic:
            return super().encode(w, **given)
        if given["key"] is None:
            raise ValueError(f"{self} draws; give key=")
        wide = w.astype(wide_dtype(w.dtype))
        draw = jax.random.uniform(given["key"], w.shape, wide.dtype)
        up = draw < jnp.clip((wide + 1) / 2, 0, 1)
        return super().encode(jnp.where(up, 1, -1).astype(w.dtype), **given)


def clip_latents(
    low: float = -1.0, high: float = 1.0, *, only: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps trained weights in a range: the last transformation of an optax chain.

    Beyond it the sign of a weight no longer changes by the updates that follow. The updates are
    rewritten so that ``params + updates`` is within the range, up to a rounding; there is nothing
    to call after ``optax.apply_updates``.

    Args:
      low: lowest weight.
      high: highest weight.
      only: regular expression on whole paths of what is kept in range; default: the tensor of
        every :class:`jaxopt_models.Latent`, what it learns left alone.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      TypeError: if a limit is no number, or the parameters hold codes that cannot be trained.
      ValueError: if the range is empty, nothing is selected, or ``update`` is called without
        ``params``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_models import quant
      >>> tx = optax.chain(optax.sgd(1.0), quant.clip_latents(only="w"))
      >>> params = {"w": jnp.array([0.5, -0.5]), "b": jnp.array([3.0])}
      >>> grads = {"w": jnp.array([2.0, 0.25]), "b": jnp.array([-1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'b': Array([4.], dtype=float32), 'w': Array([-1.  , -0.75], dtype=float32)}

    References:
      Courbariaux et al., `BinaryConnect <https://arxiv.org/abs/1511.00363>`_, 2015
    """
    low, high = number(low, "clip_latents: low"), number(high, "clip_latents: high")
    if low >= high:
        raise ValueError(f"clip_latents: the range from {low} to {high} is empty")
    chosen = None if only is None else pattern(only, "clip_latents: only")

    def selected(leaves: Any) -> list[bool]:
        if chosen is None:
            found = [_latent(p.value) is not None for p in leaves]
        else:
            found = [not p.reason and bool(chosen.fullmatch(p.path)) for p in leaves]
        if not any(found):
            paths = ", ".join(p.path for p in leaves)
            raise ValueError(f"clip_latents: nothing is kept in range; paths are: {paths}")
        return found

    def init(params: Any) -> optax.EmptyState:
        check_trainable(params, who="clip_latents")
        selected(flatten(params)[0])
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError("clip_latents: update needs params, tx.update(grads, state, params)")
        leaves, steps = flatten(params)[0], flatten(updates)
        clipped = [
            _clip(u.value, p.value, low, high) if chosen_ else u.value
            for u, p, chosen_ in zip(steps[0], leaves, selected(leaves), strict=True)
        ]
        return steps[1](clipped), state

    return optax.GradientTransformationExtraArgs(init, update)


def _latent(x: Any) -> Latent | None:
    while is_encoded(x) and not isinstance(x, Latent):
        x = getattr(x, "values", None)
    return x if isinstance(x, Latent) else None


def _clip(step: Any, x: Any, low: float, high: float) -> Any:
    """Rewrites the update of an array, of the tensor of a latent leaf, or of what is inside."""
    if isinstance(x, Latent):
        return dataclasses.replace(step, w=_clip(step.w, x.w, low, high))
    if is_encoded(x):
        return dataclasses.replace(step, values=_clip(step.values, x.values, low, high))
    return (jnp.clip(x + step, low, high) - x).astype(step.dtype)


def pack_signs(x: jax.Array) -> jax.Array:
    """Packs the signs of numbers along the last axis into words, for :func:`binary_dot`.

    Args:
      x: numbers `[..., n]`; zero counts as positive.

    Returns:
      `uint32` `[..., ceil(n / 32)]`, a set bit for each that is not negative, the first in the
      lowest bit; the bits beyond `n` are zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> quant.pack_signs(jnp.array([1.0, -2.0, 0.5]))
      Array([5], dtype=uint32)
    """
    n = x.shape[-1]
    width = [(0, 0)] * (x.ndim - 1) + [(0, 32 * -(-n // 32) - n)]
    bits = jnp.pad(x >= 0, width).reshape(*x.shape[:-1], -1, 32).astype(jnp.uint32)
    place = jnp.broadcast_to(jnp.arange(32, dtype=jnp.uint32), bits.shape)
    return jnp.sum(bits << place, axis=-1, dtype=jnp.uint32)


@jax.jit
def _dot(a: jax.Array, b: jax.Array, n: jax.Array) -> jax.Array:
    columns = b.reshape((1,) * (a.ndim - 1) + b.shape)
    apart = jax.lax.population_count(a[..., :, None, :] ^ columns)
    return n - 2 * jnp.sum(apart.astype(jnp.int32), axis=-1)


def binary_dot(a: jax.Array, b: jax.Array, n: int) -> jax.Array:
    r"""Multiplies matrices of plus and minus one as packed words.

    .. math:: a_i \cdot b_j = n - 2 \, \mathrm{popcount}(a_i \oplus b_j)

    Args:
      a: rows, `uint32` `[..., rows, words]` as :func:`pack_signs` packs them.
      b: columns, `uint32` `[columns, words]`: those of a weight `[n, columns]` are
        ``pack_signs(w.T)``.
      n: number of signs in a row.

    Returns:
      The product, `int32` `[..., rows, columns]`, exact.

    Raises:
      TypeError: unless both are `uint32`.
      ValueError: unless rows and columns have the words of `n` signs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> x, w = jnp.array([[0.3, -2.0, 1.0]]), jnp.array([[1.0], [1.0], [1.0]])
      >>> quant.binary_dot(quant.pack_signs(x), quant.pack_signs(w.T), 3)
      Array([[1]], dtype=int32)

    References:
      Rastegari et al., `XNOR-Net <https://arxiv.org/abs/1603.05279>`_, 2016
    """
    for name, words in (("a", a), ("b", b)):
        if words.dtype != jnp.uint32:
            raise TypeError(f"binary_dot: {name} is {words.dtype}, not uint32; see pack_signs")
    want = -(-n // 32)
    if (a.shape[-1], b.shape[-1]) != (want, want) or b.ndim != 2 or a.ndim < 2:
        raise ValueError(
            f"binary_dot: a {a.shape} and b {b.shape} for {n} signs in a row; give "
            f"[..., rows, {want}] and [columns, {want}]"
        )
    return _dot(a, b, n)
