"""Ranges of channels made equal across layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._call import name_of
from .._graph import Chain, Links, check_finite, finished, traced
from .._options import whole
from ._smooth import chosen

# A step that moves no channel by more than this, in its logarithm, is the last.
_SMALL = 1e-3


def equalize(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    iterations: int = 50,
    only: str | None = None,
) -> Any:
    r"""Gives each channel between two layers the same range on either side.

    With :math:`r^{(1)}_i` the largest weight that makes channel `i` and :math:`r^{(2)}_i` the
    largest that takes it in, the first layer, its bias included, is divided by `s` and the
    second multiplied,

    .. math:: s_i = \sqrt{r^{(1)}_i / r^{(2)}_i},

    after which both are :math:`\sqrt{r^{(1)}_i r^{(2)}_i}`: one grid for a whole kernel then
    serves all of its channels. Layers that share channels (a depthwise convolution between two
    others, the trunk of a residual network) are visited in turn until nothing moves. Between the
    layers may be what commutes with positive factors: ReLU but not ReLU6, pooling, a norm of
    running statistics; :func:`links` says what is. The scale of a norm stays as it is.

    Args:
      fn: function of `(params, ...)`.
      params: its dense parameters, statistics included.
      *args: other arguments, for shapes and for the check that ``fn`` returns the same.
      iterations: most visits of each pair.
      only: regular expression on paths of kernels that take channels in; those that match, and
        others that share their input, are equalised, and have to be. Default: all that can be.

    Returns:
      New parameters: ``fn`` of them is what it was.

    Raises:
      TypeError: if a parameter is compressed, or under a JAX transformation.
      ValueError: if ``iterations`` is less than one, a kernel of ``only`` has no layer before it
        that can be scaled, or none has, or a parameter holds NaN or Inf.
      RuntimeError: if ``fn`` of the result is something else, beyond rounding.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.array([[1.0, 8.0]]), "b": jnp.array([[1.0], [2.0]])}
      >>> new = jom.quant.equalize(fn, params, jnp.ones(1))
      >>> new["a"], new["b"][:, 0]
      (Array([[1., 4.]], dtype=float32), Array([1., 4.], dtype=float32))

    References:
      Nagel et al., `Data-Free Quantization Through Weight Equalization and Bias Correction
      <https://arxiv.org/abs/1906.04721>`_, 2019
    """
    iterations = whole(iterations, "equalize: iterations", least=1)
    t = traced(fn, params, args, "equalize")
    links = Links(t, absorbs=("product", "added"))
    chains = chosen(links, only, "equalize", name_of(fn), ("product", "lookup"))
    check_finite(t, (m.path for c in chains for m in c.members), "equalize")
    new = {m.path: np.asarray(t.values[m.path], np.float64) for c in chains for m in c.members}
    for _ in range(iterations):
        moved = 0.0
        for chain in chains:
            first, second = (
                _ranges(chain, new, chain.producers),
                _ranges(chain, new, chain.consumers),
            )
            known = (first > 0) & (second > 0)
            scale = np.sqrt(np.where(known, second, 1.0) / np.where(known, first, 1.0))
            moved = max(moved, float(np.max(np.abs(np.log(scale)))))
            new |= chain.scaled(new, scale)
        if moved < _SMALL:
            break
    return finished(t, new, "equalize")


def _ranges(chain: Chain, values: dict[str, np.ndarray], members: list[Any]) -> np.ndarray:
    found = np.zeros(chain.channels)
    for m in members:
        found = np.maximum(
            found, m.channels(np.maximum, np.abs(values[m.path]), chain.channels, 0.0)
        )
    return found
