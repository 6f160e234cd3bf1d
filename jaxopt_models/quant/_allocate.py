"""Planner of formats: one choice for each parameter, within budgets."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._encoder import Encoder
from .._options import number, portion
from .._recipe import Rule
from ._choices import Candidate, Sensitivity
from ._knapsack import Item, choose

Latency = Mapping[str, Mapping[Encoder | None, float]]


def allocate_bits(
    sensitivity: Sensitivity,
    *,
    budget_bits: float | None = None,
    budget_bytes: float | None = None,
    latency: Latency | None = None,
    budget_seconds: float | None = None,
    gap: float = 0.0,
) -> list[Rule]:
    r"""Plans a format for each parameter: the least summed score within the budgets.

    .. math:: \min_k \sum_l s_{l k_l} \quad \text{subject to} \quad
              \sum_l b_{l k_l} \le B, \quad \sum_l t_{l k_l} \le T

    where :math:`s_{lk}` is the score, :math:`b_{lk}` the storage (scales and all else included)
    and :math:`t_{lk}` the time of candidate `k` for parameter `l`. The search is exact: no
    assignment within the budgets has a smaller sum. What is least for the sum need not be for the
    model, whose losses do not quite add up; :func:`guard` looks at the model.

    Args:
      sensitivity: what :func:`sensitivity` measured.
      budget_bits: bits of an entry, on average over the parameters that take part.
      budget_bytes: bytes of the whole tree in memory, that which takes no part included: the
        total that :func:`jaxopt_models.plan` prints.
      latency: seconds by path and candidate, measured on the device.
      budget_seconds: the sum of these.
      gap: how far above the least sum the result may be, as a share of it; a small one
        shortens the search where very many assignments are as good as each other.

    Returns:
      A recipe with a rule for the exact path of each parameter that is encoded; what stays dense
      has none.

    Raises:
      TypeError: for arguments of another type.
      ValueError: without a budget, if none can be met (the message says the least possible), or
        if times are missing.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.array([[0.1, 1.0], [-0.7, 0.2]]), "b": jnp.array([[2.0], [-0.3]])}
      >>> formats = [jom.quant.Int(bits=b) for b in (2, 4, 8)]
      >>> found = jom.quant.sensitivity(fn, params, [(jnp.eye(2),)], formats)
      >>> jom.quant.allocate_bits(found, budget_bytes=16)
      [Rule('a', Int(bits=4)), Rule('b', Int(bits=8))]
      >>> jom.quant.allocate_bits(found, budget_bytes=13)
      Traceback (most recent call last):
        ...
      ValueError: allocate_bits: budget_bytes=13 cannot be met: the least possible is 13.5 bytes

    References:
      Yao et al., `HAWQ-V3: Dyadic Neural Network Quantization
      <https://arxiv.org/abs/2011.10680>`_, 2021
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"allocate_bits: {type(sensitivity).__name__} is not what sensitivity(...) returns"
        )
    check_usable(sensitivity, "allocate_bits")
    limits = _limits(sensitivity, budget_bits, budget_bytes, latency, budget_seconds)
    picked = allocate(sensitivity, limits, gap=portion(gap, "allocate_bits: gap"))
    if picked is None:
        raise ValueError("allocate_bits: " + _least(sensitivity, limits))
    return recipe_of(
        sensitivity, [c.candidates[k] for c, k in zip(sensitivity, picked, strict=True)]
    )


@dataclasses.dataclass(frozen=True)
class Limit:
    """One budget.

    Args:
      most: the largest sum of costs.
      costs: of each candidate of each parameter.
      name: the option that gave it, as it was typed.
      unit: what the option counts.
      fixed: cost of all that takes no part.
      scale: costs in a unit.
    """

    most: float
    costs: Sequence[Sequence[float]]
    name: str = "budget"
    unit: str = "bits"
    fixed: float = 0
    scale: float = 1

    def says(self, cost: float) -> str:
        """Writes a sum of costs in the unit of the option."""
        return f"{(cost + self.fixed) / self.scale:,.6g} {self.unit}"


def allocate(
    sensitivity: Sensitivity, limits: Sequence[Limit], *, gap: float = 0.0, scores: Any = None
) -> list[int] | None:
    """Returns the candidate of each parameter, or ``None`` where a budget cannot be met.

    Args:
      sensitivity: what was measured.
      limits: the budgets.
      gap: see :func:`allocate_bits`.
      scores: other scores, of each candidate of each parameter.
    """
    if scores is None:
        scores = [[k.score for k in c.candidates] for c in sensitivity]
    costs = [np.array(each, np.float64).T for each in zip(*(t.costs for t in limits), strict=True)]
    items = list(map(Item.of, scores, costs))
    try:
        return choose(items, [limit.most for limit in limits], gap=gap)
    except MemoryError as e:
        raise ValueError(
            f"allocate_bits: {e} are as good as each other so far; allow a small gap=1e-3"
        ) from None


def recipe_of(sensitivity: Sensitivity, picks: Sequence[Candidate]) -> list[Rule]:
    """Returns the recipe of one candidate for each parameter."""
    return [
        Rule(re.escape(c.path), k.encoder, c.axes)
        for c, k in zip(sensitivity, picks, strict=True)
        if k.encoder is not None
    ]


def storage(sensitivity: Sensitivity, most: float, **words: Any) -> Limit:
    """Returns the budget of so many bits for the parameters that take part."""
    return Limit(most, [[k.bits for k in c.candidates] for c in sensitivity], **words)


def check_usable(sensitivity: Sensitivity, who: str) -> None:
    """Raises where a parameter has no candidate with a finite score."""
    for c in sensitivity:
        if not any(math.isfinite(k.score) for k in c.candidates):
            raise ValueError(
                f"{who}: no candidate for {c.path!r} has a finite score; add others, such as None"
            )


def _limits(
    sensitivity: Sensitivity,
    budget_bits: Any,
    budget_bytes: Any,
    latency: Any,
    budget_seconds: Any,
) -> list[Limit]:
    if budget_bits is not None and budget_bytes is not None:
        raise ValueError("allocate_bits: budget_bits and budget_bytes say the same; give one")
    if (latency is None) != (budget_seconds is None):
        raise ValueError("allocate_bits: latency and budget_seconds go together; give both")
    found = []
    if budget_bits is not None:
        size = sum(c.size for c in sensitivity)
        # A product of floats may round down, below a sum of whole bits that it stands for.
        most = number(budget_bits, "allocate_bits: budget_bits") * size * (1 + 1e-12)
        words = {"name": f"budget_bits={budget_bits}", "unit": "bits an entry", "scale": size}
        found.append(storage(sensitivity, most, **words))
    if budget_bytes is not None:
        fixed = sensitivity.others
        most = number(budget_bytes, "allocate_bits: budget_bytes") * 8 - fixed
        words = {"name": f"budget_bytes={budget_bytes}", "unit": "bytes", "scale": 8}
        found.append(storage(sensitivity, most, fixed=fixed, **words))
    if budget_seconds is not None:
        most = number(budget_seconds, "allocate_bits: budget_seconds")
        name, costs = f"budget_seconds={budget_seconds}", _times(sensitivity, latency)
        # Sums of floats may round up.
        found.append(Limit(most * (1 + 1e-9), costs, name, "seconds"))
    if not found:
        raise ValueError("allocate_bits: give budget_bits, budget_bytes or budget_seconds")
    return found


def _times(sensitivity: Sensitivity, latency: Any) -> list[list[float]]:
    if not isinstance(latency, Mapping):
        raise TypeError(
            f"allocate_bits: latency={latency!r:.60}; give {{path: {{encoder: seconds}}}}"
        )
    found = []
    for c in sensitivity:
        times = latency.get(c.path, {})
        lacking = [repr(k.encoder) for k in c.candidates if k.encoder not in times]
        if lacking:
            raise ValueError(
                f"allocate_bits: latency has no seconds for {c.path!r} as {', '.join(lacking)}"
            )
        found.append([_seconds(times[k.encoder], c.path, k.encoder) for k in c.candidates])
    return found


def _seconds(value: Any, path: str, encoder: Encoder | None) -> float:
    name = f"allocate_bits: latency of {path!r} as {encoder!r}"
    if (found := number(value, name)) < 0:
        raise ValueError(f"{name} is {found} seconds; a time is not negative")
    return found


def _least(sensitivity: Sensitivity, limits: Sequence[Limit]) -> str:
    """Says what of the budgets is out of reach, and what would be the least possible."""
    scores = [[k.score for k in c.candidates] for c in sensitivity]
    lines = []
    for limit in limits:
        least = sum(
            min(cost for cost, score in zip(costs, row, strict=True) if math.isfinite(score))
            for costs, row in zip(limit.costs, scores, strict=True)
        )
        if least > limit.most:
            lines.append(f"{limit.name} cannot be met: the least possible is {limit.says(least)}")
    if lines:
        return "; ".join(lines)
    first, second = limits
    cheapest = [
        [cost if math.isfinite(score) else math.inf for cost, score in zip(costs, row, strict=True)]
        for costs, row in zip(first.costs, scores, strict=True)
    ]
    picked = allocate(sensitivity, [second], scores=cheapest)
    least = sum(costs[k] for costs, k in zip(first.costs, picked, strict=True))
    return (
        f"{first.name} and {second.name} cannot be met together: with the second the least "
        f"possible is {first.says(least)}"
    )
