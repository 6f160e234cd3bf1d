"""What becomes of the outputs of several members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mean(outs: Sequence[Any]) -> Any:
    r"""Returns the mean of the members' outputs, added up in their order.

    .. math:: \frac{1}{n} \sum_{i=1}^{n} y_i

    Args:
      outs: `n` trees of floating arrays of the same shapes.

    Returns:
      A tree of the same.

    Raises:
      ValueError: for no outputs, or outputs of different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> parallel.mean([jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])])
      Array([2., 4.], dtype=float32)
    """
    outs = _alike(outs, "mean")
    return jax.tree.map(lambda *ys: sum(ys[1:], ys[0]) / len(ys), *outs)


def weighted(weights: Any) -> Callable[[Sequence[Any]], Any]:
    r"""Returns the function from members' outputs to their weighted sum, in their order.

    .. math:: \sum_{i=1}^{n} w_i \, y_i

    Args:
      weights: numbers `[n]`, for instance accuracies divided by their sum.

    Returns:
      A function for ``combine=`` of :func:`apart`.

    Raises:
      ValueError: for weights that are no finite numbers `[n]`; when called, for another number of
        outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> parallel.weighted([0.25, 0.75])([jnp.array([4.0]), jnp.array([8.0])])
      Array([7.], dtype=float32)
    """
    numbers = np.asarray(weights, np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"weighted: weights={weights!r:.80}; give finite numbers, one a member")

    def combine(outs: Sequence[Any]) -> Any:
        outs = _alike(outs, "weighted")
        if len(outs) != numbers.size:
            raise ValueError(f"weighted: {numbers.size} weights for {len(outs)} outputs")

        def total(*ys: jax.Array) -> jax.Array:
            parts = [float(w) * y for w, y in zip(numbers, ys, strict=True)]
            return sum(parts[1:], parts[0])

        return jax.tree.map(total, *outs)

    return combine


def vote(outs: Sequence[jax.Array]) -> jax.Array:
    r"""Returns which share of the members prefers each class.

    .. math:: s_c = \frac{1}{n} \left| \{ i : \arg\max_k y_{ik} = c \} \right|

    Its `argmax` is the majority's class, of equal ones the first.

    Args:
      outs: `n` arrays of logits or probabilities `[..., C]`.

    Returns:
      Shares `[..., C]`, `float32`, that add up to one.

    Raises:
      ValueError: for no outputs, or outputs of different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> outs = [jnp.array(z) for z in ([9.0, 0.0], [0.0, 1.0], [1.0, 2.0], [0.0, 1.0])]
      >>> parallel.vote(outs)
      Array([0.25, 0.75], dtype=float32)
    """
    outs = _alike(outs, "vote")
    if not hasattr(outs[0], "ndim") or not outs[0].ndim:
        raise ValueError("vote: outputs are no arrays [..., C] of logits")
    votes = [jax.nn.one_hot(jnp.argmax(y, -1), y.shape[-1], dtype=jnp.float32) for y in outs]
    return sum(votes[1:], votes[0]) / len(votes)


def _alike(outs: Sequence[Any], who: str) -> list[Any]:
    shapes = [(jax.tree.structure(y), [jnp.shape(x) for x in jax.tree.leaves(y)]) for y in outs]
    if not shapes:
        raise ValueError(f"{who}: no outputs; give those of at least one member")
    for i, found in enumerate(shapes):
        if found != shapes[0]:
            raise ValueError(
                f"{who}: output {i} has shapes {found[1]}, output 0 {shapes[0][1]}; make them "
                "alike, or combine them by a function of your own"
            )
    return list(outs)
