"""A small judge for adversarial distillation, as a dictionary of arrays and a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._options import whole
from ._dense import affine, layer, leaky, lookup, take
from ._reduce import floats, indices, rows


def judge(
    key: jax.Array,
    inputs: int,
    *,
    hidden: Sequence[int] = (128, 128),
    classes: int | None = None,
    conditions: int | None = None,
) -> dict[str, Any]:
    r"""Returns the parameters of a small judge of logits or features, for :func:`judged`.

    Dense layers with leaky rectifiers, and one score. It can be told what the input was, either
    by its class, which adds :math:`\langle e_y, h \rangle` of the last hidden units and a vector
    for each class (the projection of Miyato and Koyama), or by features of it, which are joined
    to what is judged.

    Args:
      key: a random key.
      inputs: number of values that are judged of an example.
      hidden: widths of the hidden layers, at least one.
      classes: number of classes, if a label is given with each example.
      conditions: number of features, if those are given instead.

    Returns:
      A dictionary of `layer_0`, `layer_1` ... and `score`, each with `kernel` and `bias`, and
      `classes`, shape `[classes, hidden[-1]]`.

    Raises:
      TypeError: for widths that are no whole numbers.
      ValueError: for widths below 1, no hidden layer, or both kinds of conditions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> params = distill.judge(jax.random.key(0), 10, hidden=(32,), classes=10)
      >>> distill.judged(params, jnp.ones((4, 10)), jnp.array([1, 2, 3, 4])).shape
      (4,)

    References:
      Mirza and Osindero, `Conditional Generative Adversarial Nets
      <https://arxiv.org/abs/1411.1784>`_, 2014; Miyato and Koyama, `cGANs with Projection
      Discriminator <https://arxiv.org/abs/1802.05637>`_, 2018
    """
    who = "judge"
    if classes is not None and conditions is not None:
        raise ValueError(f"{who}: give classes= or conditions=, not both")
    if not hidden:
        raise ValueError(f"{who}: hidden= is empty; give the width of at least one layer")
    width = whole(inputs, f"{who}: inputs", least=1)
    if conditions is not None:
        width += whole(conditions, f"{who}: conditions", least=1)
    widths = [width, *(whole(n, f"{who}: hidden", least=1) for n in hidden)]
    keys = jax.random.split(key, len(widths) + 1)
    params: dict[str, Any] = {
        f"layer_{i}": layer(k, (a,), (b,))
        for i, (k, a, b) in enumerate(zip(keys[2:], widths[:-1], widths[1:], strict=True))
    }
    params["score"] = layer(keys[0], (widths[-1],), (1,))
    if classes is not None:
        classes = whole(classes, f"{who}: classes", least=1)
        params["classes"] = jnp.transpose(layer(keys[1], (widths[-1],), (classes,))["kernel"])
    return params


def judged(params: dict[str, Any], x: jax.Array, condition: Any = None) -> jax.Array:
    """Returns a judge's scores.

    Args:
      params: those of :func:`judge`.
      x: logits or features, shape `[B, ...]`.
      condition: labels, whole numbers of shape `[B]`, for a judge with ``classes``, or features,
        shape `[B, ...]`, for one with ``conditions``.

    Returns:
      Shape `[B]`, high for what is taken for the teacher's; NaN for a label of no class.

    Raises:
      TypeError: for labels that are no whole numbers, or features that are not floating.
      ValueError: for a condition that is missing, too much or of another shape, other widths, or
        parameters of something else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> params = distill.judge(jax.random.key(0), 10, conditions=5)
      >>> distill.judged(params, jnp.ones((4, 10)), jnp.ones((4, 5))).shape
      (4,)
    """
    who = "judged"
    for name in ("layer_0", "score"):
        take(params, name, who, "judge")
    x = rows(floats(x, who, "x"))
    classes = params.get("classes")
    labels = None
    if classes is not None:
        if condition is None:
            raise ValueError(f"{who}: the judge has classes; give labels, shape {x.shape[:1]}")
        labels = indices(condition, x.shape[:1], who, "condition")
    elif condition is not None:
        if jnp.issubdtype(jnp.result_type(condition), jnp.integer):
            raise TypeError(
                f"{who}: condition is {jnp.result_type(condition)}, labels, and the judge was made "
                "without classes=; give it classes=, an array of floats, or no condition: "
                "adversarial(..., condition=None)"
            )
        condition = rows(floats(condition, who, "condition"))
        if condition.shape[0] != x.shape[0]:
            raise ValueError(
                f"{who}: condition has {condition.shape[0]} examples, x has {x.shape[0]}"
            )
        x = jnp.concatenate([x, condition], axis=1)
    width = params["layer_0"]["kernel"].shape[0]
    if x.shape[1] != width:
        raise ValueError(
            f"{who}: an example has {x.shape[1]} values, its condition included; the judge was "
            f"made for {width} (inputs= plus conditions=)"
        )
    for i in range(sum(name.startswith("layer_") for name in params)):
        x = leaky(affine(params[f"layer_{i}"], x))
    scores = affine(params["score"], x)[:, 0]
    if labels is None:
        return scores
    return scores + jnp.sum(lookup(classes, labels) * x, axis=1)
