"""One choice from each of many sets under budgets: an exact search."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

# Partial choices that are kept at once; joining a set takes some hundred bytes for each.
_MOST = 1 << 19

#: A value of the Lagrangian and its multipliers.
Found = tuple[float, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Item:
    """What one set offers.

    Args:
      places: positions of the choices in the set.
      scores: `[n]`, to be small in sum.
      costs: `[n, k]`, to be within `k` budgets in sum.
    """

    places: np.ndarray
    scores: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[float], costs: np.ndarray) -> Item:
        """Keeps what no other choice beats in score and in every cost."""
        scores = np.asarray(scores, np.float64)
        order = [int(i) for i in np.lexsort((scores, costs.sum(axis=1))) if np.isfinite(scores[i])]
        kept: list[int] = []
        for i in order:
            if not any(scores[j] <= scores[i] and (costs[j] <= costs[i]).all() for j in kept):
                kept.append(i)
        return cls(np.array(kept, int), scores[kept], costs[kept])


def choose(
    items: Sequence[Item], budgets: Sequence[float], *, gap: float = 0.0
) -> list[int] | None:
    r"""Picks one choice from each set so that the summed score is least within the budgets.

    .. math:: \min_j \sum_i s_{i j_i} \quad \text{subject to} \quad \sum_i c_{i j_i} \le B

    Sets are joined one after another. Of the partial choices only those are kept that no other
    beats in score and in every cost, and whose bound is below the best whole choice known. The
    bound is Lagrange's, with multipliers :math:`\lambda` fixed at the maximum of

    .. math:: L(\lambda) = \sum_i \min_j (s_{ij} + \lambda c_{ij}) - \lambda B:

    a partial choice ends no lower than :math:`L` and what its terms exceed their minima by.

    Args:
      items: the sets.
      budgets: `k` of them.
      gap: how far above the least sum the result may be, as a part of :math:`|L|`; with one the
        number of partial choices is bounded by the sets over it.

    Returns:
      A position in each set, or ``None`` where nothing is within the budgets.

    Raises:
      MemoryError: if too many partial choices are left.
    """
    budget = np.asarray(budgets, np.float64)
    if any(not len(item.scores) for item in items):
        return None
    if (sum(item.costs.min(axis=0) for item in items) > budget).any():
        return None
    multipliers, bound = _dual(items, budget)
    terms = [_Terms.of(item, multipliers) for item in items]
    # What is nearly a tie is decided first: soon a good whole choice is known.
    order = sorted(range(len(items)), key=lambda i: terms[i].second)
    items, terms = [items[i] for i in order], [terms[i] for i in order]
    least = _after([item.costs.min(axis=0) for item in items])
    rest_score, rest_cost = _after([t.score for t in terms]), _after([t.cost for t in terms])
    first, known = _descend(items, budget, multipliers)
    scale = abs(bound) + sum(float(np.ptp(item.scores)) for item in items)
    margin = 1e-12 * scale - gap * abs(bound) / 2
    # Half of the gap goes to the bound, the other half to what counts as the same score.
    step = gap * abs(bound) / (2 * len(items))
    score, cost, excess = np.zeros(1), np.zeros((1, len(budget))), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    best = first
    for level, (item, t) in enumerate(zip(items, terms, strict=True)):
        parent, place = np.divmod(np.arange(len(score) * len(t.excess)), len(t.excess))
        excess = excess[parent] + t.excess[place]
        cost = cost[parent] + item.costs[place]
        score = score[parent] + item.scores[place]
        fits = np.flatnonzero(
            (excess <= known - bound + margin) & (cost + least[level] <= budget).all(axis=1)
        )
        kept = fits[_front(score[fits], cost[fits], step)]
        score, cost, excess = score[kept], cost[kept], excess[kept]
        trail.append((parent[kept], place[kept]))
        if len(kept) > _MOST:
            raise MemoryError(f"{len(kept):,} partial choices")
        whole = np.where(
            (cost + rest_cost[level] <= budget).all(axis=1), score + rest_score[level], np.inf
        )
        if len(kept) and whole.min() < known:
            at = int(np.argmin(whole))
            known, best = float(whole[at]), _back(trail, at)
    if best is None:
        return None
    picked = [*best, *(t.picked for t in terms[len(best) :])]
    result = [0] * len(items)
    for i, item, place in zip(order, items, picked, strict=True):
        result[i] = int(item.places[place])
    return result


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What the terms of one set are in the Lagrangian."""

    excess: np.ndarray
    second: float
    picked: int
    score: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, item: Item, multipliers: np.ndarray) -> _Terms:
        terms = item.scores + item.costs @ multipliers
        picked = int(np.argmin(terms))
        excess = terms - terms[picked]
        second = float(np.partition(excess, 1)[1]) if len(excess) > 1 else np.inf
        return cls(excess, second, picked, item.scores[picked], item.costs[picked])


def _after(terms: Sequence[np.ndarray]) -> np.ndarray:
    """Returns for each position the sum of all terms after it."""
    sums = np.cumsum(np.asarray(terms)[::-1], axis=0)[::-1]
    return np.concatenate([sums[1:], np.zeros_like(sums[:1])])


def _back(trail: Sequence[tuple[np.ndarray, np.ndarray]], at: int) -> list[int]:
    """Returns what a partial choice picked, set by set."""
    picked = []
    for parent, place in trail[::-1]:
        picked.append(int(place[at]))
        at = int(parent[at])
    return picked[::-1]


def _front(score: np.ndarray, cost: np.ndarray, step: float) -> np.ndarray:
    """Returns the positions of what nothing else beats in score, in whole steps, and in cost."""
    score = np.floor(score / step) if step > 0 else score
    order = np.lexsort((score, *cost.T[::-1]))
    score, cost = score[order], cost[order]
    if cost.shape[1] == 1:
        before = np.minimum.accumulate(np.r_[np.inf, score[:-1]])
        return order[score < before]
    # Sorted by the first cost; of the second a staircase of falling scores is kept.
    steps: list[float] = []
    lows: list[float] = []
    kept = []
    for i, (s, c) in enumerate(zip(score.tolist(), cost[:, 1].tolist(), strict=True)):
        at = bisect.bisect_right(steps, c)
        if at and lows[at - 1] <= s:
            continue
        kept.append(i)
        end = at
        while end < len(lows) and lows[end] >= s:
            end += 1
        steps[at:end], lows[at:end] = [c], [s]
    return order[kept]


def _table(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores `[sets, most]`, infinite beyond the choices of a set, and their costs."""
    most = max(len(item.scores) for item in items)
    scores = np.full((len(items), most), np.inf)
    costs = np.zeros((len(items), most, items[0].costs.shape[1]))
    for i, item in enumerate(items):
        scores[i, : len(item.scores)], costs[i, : len(item.scores)] = item.scores, item.costs
    return scores, costs


def _units(costs: np.ndarray) -> np.ndarray:
    """Returns what all sets can cost at most, one where that is nothing."""
    most = costs.max(axis=1).sum(axis=0)
    return np.where(most > 0, most, 1)


def _dual(items: Sequence[Item], budget: np.ndarray) -> tuple[np.ndarray, float]:
    """Maximises the Lagrangian over its multipliers, the search of one inside that of another."""
    scores, costs = _table(items)
    unit = _units(costs)
    span = max(sum(float(np.ptp(item.scores)) for item in items), np.finfo(float).tiny)

    def value(multipliers: np.ndarray) -> float:
        return float((scores + costs @ multipliers).min(axis=1).sum() - multipliers @ budget)

    def inner(k: int, multipliers: np.ndarray) -> Found:
        if k < 0:
            return value(multipliers), multipliers

        def at(logarithm: float) -> Found:
            new = multipliers.copy()
            new[k] = np.exp(logarithm) * span / unit[k]
            return inner(k - 1, new)

        zero = inner(k - 1, multipliers)
        # Over a logarithm it is no longer concave, but still rises, then falls.
        return max(zero, _golden(at, -23.0, 16.0), key=lambda found: found[0])

    bound, multipliers = inner(len(budget) - 1, np.zeros(len(budget)))
    return multipliers, bound


def _golden(f: Callable[[float], Found], low: float, high: float) -> Found:
    """Returns value and argument at the maximum of a function that rises, then falls."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(60):
        if fa[0] < fb[0]:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = f(b)
        else:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = f(a)
    return max(fa, fb, key=lambda found: found[0])


def _descend(
    items: Sequence[Item], budget: np.ndarray, multipliers: np.ndarray
) -> tuple[list[int] | None, float]:
    """Finds a good choice within the budgets: what ever larger multipliers say, then swaps."""
    scores, costs = _table(items)
    rows = np.arange(len(items))
    least = np.maximum(multipliers, 1e-9 * multipliers.sum())
    cheapest = np.where(np.isfinite(scores), 0, np.inf) + costs @ (1 / _units(costs))
    for factor in (*1.3 ** np.arange(40), np.inf):
        terms = scores + costs @ (factor * least) if factor < np.inf else cheapest
        picked = np.argmin(terms, axis=1)
        used = costs[rows, picked].sum(axis=0)
        if (used <= budget).all():
            break
    else:
        return None, np.inf
    while True:
        gain = scores[rows, picked][:, None] - scores
        fits = (used - costs[rows, picked][:, None] + costs <= budget).all(axis=2)
        i, j = np.unravel_index(np.argmax(np.where(fits, gain, -np.inf)), gain.shape)
        if not gain[i, j] > 0:
            return [int(p) for p in picked], float(scores[rows, picked].sum())
        picked[i] = j
        used = costs[rows, picked].sum(axis=0)
