"""Data-free distillation: what makes inputs look real, and a memory of those that were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._options import whole
from ._reduce import channel_means, counts, floats, magnitude, mean, only


def batchnorm_statistics(
    features: Any, means: Any, variances: Any, *, where: Any = None, weights: Any = None
) -> jax.Array:
    r"""The inputs look to the teacher's batch normalisations like those it was trained on.

    With the mean :math:`\hat\mu` and the variance :math:`\hat\sigma^2` of each channel over all
    other axes, and those the layer has kept,

    .. math:: \sum_{\mathrm{layers}} \left\| \hat\mu - \mu \right\|_2 +
        \left\| \hat\sigma^2 - \sigma^2 \right\|_2.

    Args:
      features: inputs of a layer, the channels last, shape `[B, ..., C]`, or a tree of those of
        several layers.
      means: running means, shape `[C]`, or a tree of the same structure.
      variances: running variances, likewise.
      where: mask of leading axes, of all layers.
      weights: of leading axes, of all layers.

    Returns:
      A scalar; 0 for equal statistics, and where nothing counts.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if the trees or the numbers of channels differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> features = {"norm": jnp.array([[0.0, 1.0], [2.0, 1.0]])}
      >>> means, variances = {"norm": jnp.array([1.0, 4.0])}, {"norm": jnp.array([1.0, 4.0])}
      >>> float(distill.batchnorm_statistics(features, means, variances))  # 3 + 4
      7.0

    References:
      Yin et al., `Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion
      <https://arxiv.org/abs/1912.08795>`_, 2020
    """
    who = "batchnorm_statistics"
    layers, structure = jax.tree.flatten(features)
    for name, tree in (("means", means), ("variances", variances)):
        if jax.tree.structure(tree) != structure:
            raise ValueError(
                f"{who}: {name} have the structure {jax.tree.structure(tree)}, features "
                f"{structure}; they must be equal"
            )
    total = jnp.zeros(())
    kept = zip(layers, jax.tree.leaves(means), jax.tree.leaves(variances), strict=True)
    for x, mu, variance in kept:
        x = only(floats(x, who, "features", least=2), where, who)
        mu, variance = floats(mu, who, "means"), floats(variance, who, "variances")
        if mu.shape != x.shape[-1:] or variance.shape != x.shape[-1:]:
            raise ValueError(
                f"{who}: features have shape {x.shape}, means {mu.shape}, variances "
                f"{variance.shape}; give one of each for every channel, {x.shape[-1:]}"
            )
        center = channel_means(x, who, where=where, weights=weights)
        off = jnp.square(x - center.reshape((1,) * (x.ndim - 1) + center.shape))
        spread = channel_means(off, who, where=where, weights=weights)
        some = jnp.any(counts(x[..., 0], who, where=where, weights=weights) > 0)
        total = total + jnp.where(some, _norm(center - mu) + _norm(spread - variance), 0)
    return total


def total_variation(images: jax.Array, *, where: Any = None, weights: Any = None) -> jax.Array:
    r"""The images are smooth: the mean difference of neighbours, down and to the right.

    .. math:: \mathrm{mean}\, |x_{i+1,j} - x_{i,j}| + \mathrm{mean}\, |x_{i,j+1} - x_{i,j}|

    Args:
      images: shape `[B, H, W, C]`.
      where: mask of images, shape `[B]`.
      weights: of images, shape `[B]`.

    Returns:
      A scalar; 0 for images of one color.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> image = jnp.array([[0.0, 1.0], [4.0, 5.0]])
      >>> float(distill.total_variation(image[None, :, :, None]))
      5.0

    References:
      Mahendran and Vedaldi, `Understanding Deep Image Representations by Inverting Them
      <https://arxiv.org/abs/1412.0035>`_, 2015
    """
    who = "total_variation"
    images = floats(images, who, "images", least=4)
    if images.ndim != 4:
        raise ValueError(f"{who}: images have shape {images.shape}; give [B, H, W, C]")
    images = only(images, where, who)
    steps = [magnitude(jnp.diff(images, axis=axis)) for axis in (1, 2)]
    return sum(mean(x, who, where=where, weights=weights) for x in steps)


class Inversions(NamedTuple):
    """A ring of images: new ones take the place of the oldest when it is full.

    A pytree of fixed shapes, so it can be the state of a compiled step.

    Args:
      images: shape `[size, ...]`; zeros where nothing has been put yet.
      place: `int32`, where the next image goes.
      filled: `int32`, number of images in it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> memory = distill.Inversions.empty(3, (2,))
      >>> memory = memory.put(jnp.full((2, 2), 1.0)).put(jnp.full((2, 2), 5.0))
      >>> memory.images[:, 0]
      Array([5., 1., 5.], dtype=float32)
      >>> memory.draw(jax.random.key(0), 8).shape
      (8, 2)

    References:
      Fang et al., `Contrastive Model Inversion for Data-Free Knowledge Distillation
      <https://arxiv.org/abs/2105.08584>`_, 2021
    """

    images: jax.Array
    place: jax.Array
    filled: jax.Array

    @classmethod
    def empty(cls, size: int, shape: Sequence[int], *, dtype: Any = jnp.float32) -> Inversions:
        """Returns an empty memory.

        Args:
          size: number of images it can hold.
          shape: that of one image.
          dtype: in which images are kept.

        Raises:
          ValueError: for sizes below 1.
        """
        size = whole(size, "Inversions.empty: size", least=1)
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros((size, *shape), dtype), zero, zero)

    def put(self, images: jax.Array) -> Inversions:
        """Returns the memory with more images; of more than it can hold, the last ones.

        Args:
          images: shape `[B, ...]`.

        Raises:
          ValueError: for images of another shape.
        """
        size = self.images.shape[0]
        images = jnp.asarray(images, self.images.dtype)
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"Inversions.put: images have shape {images.shape}; give "
                f"(B, {', '.join(map(str, self.images.shape[1:]))})"
            )
        images = images[-size:]
        count = images.shape[0]
        places = (self.place + jnp.arange(count, dtype=jnp.int32)) % size
        return Inversions(
            self.images.at[places].set(images),
            (self.place + count) % size,
            jnp.minimum(self.filled + count, size),
        )

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        """Returns images drawn with replacement, from what has been put; zeros if nothing has.

        Args:
          key: a random key.
          count: how many.

        Returns:
          Shape `[count, ...]`.
        """
        count = whole(count, "Inversions.draw: count", least=1)
        chosen = jax.random.randint(key, (count,), 0, jnp.maximum(self.filled, 1))
        return self.images[chosen]


def _norm(x: jax.Array) -> jax.Array:
    """Returns the length of a vector, with a derivative of zero where it is zero."""
    square = jnp.sum(x * x)
    zero = square <= 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
