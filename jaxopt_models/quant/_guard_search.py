"""The search behind the guard of accuracy: trees that were tried, and what to try next."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._paths import flatten
from .._recipe import Rule, check_recipe
from ._allocate import allocate, check_usable, recipe_of, storage
from ._choices import Candidate, Sensitivity, stored_bits

# Budgets that are looked at, evenly spread; six evaluations find one among so many.
_RUNGS = 64
# How far the sum of scores may be above the least: scores are not as exact as this.
_GAP = 1e-4


@dataclasses.dataclass(frozen=True)
class Rung:
    """A recipe, what it is made of, and its size in bits as far as that is known."""

    recipe: list[Rule]
    picks: tuple[Candidate, ...] = ()
    bits: int = 0

    @classmethod
    def of(cls, sensitivity: Sensitivity, picks: Sequence[Candidate]) -> Rung:
        """Makes a recipe of one candidate for each parameter."""
        bits = sensitivity.others + sum(k.bits for k in picks)
        return cls(recipe_of(sensitivity, picks), tuple(picks), bits)


@dataclasses.dataclass(frozen=True)
class Limit:
    """How far a score may fall, how sure that has to be, and for how many trees at once."""

    drop: float
    confidence: float
    tries: int

    def allows(self, dense: np.ndarray, scores: np.ndarray) -> bool:
        """Says whether scores, of samples or a single one, are near enough to the dense ones."""
        if scores.size == 1:
            return bool(scores >= dense - self.drop)
        both = np.stack([dense, scores])
        # Where samples agree their deviation is zero, however few they are.
        lost = np.append(dense - scores, np.ptp(both) or np.max(np.abs(both)))
        sure = -statistics.NormalDist().inv_cdf((1 - self.confidence) / self.tries)
        return bool(lost.mean() + sure * lost.std(ddof=1) / math.sqrt(lost.size) <= self.drop)


@dataclasses.dataclass
class Tried:
    """A tree that was evaluated; dropped unless it is the best."""

    rung: Rung
    small: Any
    bits: int
    score: float
    good: bool


class Search:
    """The trees that were tried, and the best."""

    def __init__(
        self,
        params: Any,
        evaluate: Callable[[Any], Any],
        limit: Limit,
        compress: Callable[[Any, list[Rule]], Any],
        save: Any,
    ):
        self.params, self.evaluate, self.limit, self.compress = params, evaluate, limit, compress
        self.save = save
        self.rows: list[tuple] = []
        self.tried: list[Tried] = []
        self.saved: Tried | None = None
        self.best: Any = None
        self.interrupted = False

    def start(self, advance: Callable[[str], None]) -> None:
        """Evaluates the dense tree; ``advance`` is called after each evaluation, all kept."""
        self.advance = advance
        self.samples = self._scores(self.params)
        self.dense = float(np.mean(self.samples))
        if not math.isfinite(self.dense):
            raise ValueError(f"guard: evaluate gives {self.dense} for the dense tree")
        self.best = self._record("dense", Rung([]), self.params, self.samples, good=True)
        self._advance(self.best)

    def _scores(self, tree: Any) -> np.ndarray:
        """Returns the scores of all samples, or the one score there is."""
        found = self.evaluate(tree)
        try:
            if found is None or isinstance(found, str):
                raise TypeError("it is no number")
            numbers = np.asarray(found, np.float64)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"guard: evaluate gives {type(found).__name__}; give a score, or one for each "
                f"sample ({e})"
            ) from e
        if numbers.ndim > 1 or not numbers.size:
            raise ValueError(
                f"guard: evaluate gives shape {numbers.shape}; give a score, or one for each sample"
            )
        return numbers

    def _good(self, scores: np.ndarray) -> bool:
        if scores.shape != self.samples.shape:
            raise ValueError(
                f"guard: evaluate gives scores of shape {scores.shape}, for the dense tree "
                f"{self.samples.shape}; give those of the same samples each time"
            )
        return self.limit.allows(self.samples, scores)

    def _record(
        self, what: str, rung: Rung, small: Any, scores: np.ndarray, *, good: bool
    ) -> Tried:
        bits = sum(stored_bits(p.value) for p in flatten(small)[0])
        score = float(np.mean(scores))
        new = Tried(rung, small, bits, score, good)
        self.rows.append((what, -(-bits // 8), score, self.dense - score, good))
        self.tried.append(new)
        return new

    def _advance(self, tried: Tried) -> None:
        self.advance(f"{tried.bits / 8:,.0f} bytes, {self.dense - tried.score:.4g} below")

    def attempt(self, what: str, rung: Rung) -> Tried:
        """Evaluates a recipe, once, and keeps the tree where it is the best."""
        for old in self.tried:
            if old.rung.recipe == rung.recipe:
                return old
        small = self.compress(self.params, list(rung.recipe))
        scores = self._scores(small)
        new = self._record(what, rung, small, scores, good=self._good(scores))
        worse = new
        if new.good and new.bits < self.best.bits:
            worse, self.best = self.best, new
            self.keep()
        worse.small = None
        self._advance(new)
        return new

    def keep(self) -> None:
        """Writes the best tree, if it is not written already."""
        if self.save is not None and self.saved is not self.best:
            from .. import artifact

            artifact.save(self.save, self.best.small, recipe=self.best.rung.recipe)
            self.saved = self.best

    def halve(self, what: str, rungs: Sequence[Rung]) -> None:
        """Looks for the first recipe that is good enough, as if all after it were."""
        low, high = -1, len(rungs)
        sizes: dict[int, int] = {}
        while high - low > 1:
            middle = (low + high) // 2
            tree = self.attempt(what, rungs[middle])
            sizes[middle] = tree.bits
            if not rungs[middle].picks:
                _check_order(sizes)
            if tree.good:
                high = middle
            else:
                low = middle

    def largest_failure(self) -> Rung | None:
        """Returns the largest tree that was not good enough and is smaller than the best."""
        failed = [t for t in self.tried if not t.good and t.bits < self.best.bits]
        return max(failed, key=lambda t: t.bits).rung if failed else None


def most_tries(rungs: Sequence[Rung], candidates: Any) -> int:
    """Returns the largest number of trees that :func:`guard` evaluates, the dense one aside."""
    mends = 0
    if isinstance(candidates, Sensitivity):
        mends = sum(len(choices.candidates) for choices in candidates)
    # Bisection among n needs at most as many steps as n has binary digits.
    return len(rungs).bit_length() + mends.bit_length()


def _check_order(sizes: dict[int, int]) -> None:
    """Refuses recipes of a caller that do not go from the smallest tree to the largest."""
    for (i, a), (j, b) in itertools.pairwise(sorted(sizes.items())):
        if a > b:
            raise ValueError(
                f"guard: candidates[{i}] gives {a / 8:,.0f} bytes and candidates[{j}] "
                f"{b / 8:,.0f}; give the recipe of the smallest tree first"
            )


def rungs_of(candidates: Any) -> list[Rung]:
    """Returns recipes from the smallest to the largest."""
    if isinstance(candidates, Sensitivity):
        return _assignments(candidates)
    if not isinstance(candidates, Sequence) or isinstance(candidates, str | Rule):
        raise TypeError(
            f"guard: candidates={candidates!r:.80}; give what sensitivity(...) returns, or a list "
            "of recipes"
        )
    found = [Rung(check_recipe(recipe, who="guard")) for recipe in candidates]
    if not found:
        raise ValueError("guard: there is no recipe to choose from")
    return found


def _assignments(sensitivity: Sensitivity) -> list[Rung]:
    """Returns the best assignments for budgets from the least that is possible to the best."""
    check_usable(sensitivity, "guard")
    least = sum(min(k.bits for k in c.candidates if math.isfinite(k.score)) for c in sensitivity)
    largest = sum(max(k.bits for k in c.candidates) for c in sensitivity)
    free = allocate(sensitivity, [storage(sensitivity, largest)], gap=_GAP)
    most = sum(c.candidates[k].bits for c, k in zip(sensitivity, free, strict=True))
    found: dict[tuple[int, ...], None] = {}
    for step in range(_RUNGS):
        budget = least + (most - least) * step / (_RUNGS - 1)
        picked = allocate(sensitivity, [storage(sensitivity, budget)], gap=_GAP)
        found[tuple(picked)] = None
    return [
        Rung.of(sensitivity, [c.candidates[k] for c, k in zip(sensitivity, picks, strict=True)])
        for picks in found
    ]


def mended(sensitivity: Sensitivity, search: Search) -> list[Rung]:
    """Returns what a failed recipe becomes as its worst parameters get more bits, one by one."""
    failed = search.largest_failure()
    picks = [] if failed is None else list(failed.picks)
    found = []
    while any(k.encoder is not None for k in picks):
        at = max(
            (i for i, k in enumerate(picks) if k.encoder is not None), key=lambda i: picks[i].score
        )
        choices = sensitivity.choices[at]
        larger = [k for k in choices.candidates if k.bits > picks[at].bits]
        better = [k for k in larger if k.score < picks[at].score]
        dense = Candidate(None, choices.dense, 0.0)
        picks[at] = min(better, key=lambda k: k.bits, default=dense)
        rung = Rung.of(sensitivity, picks)
        if rung.bits >= search.best.bits:
            break
        found.append(rung)
    return found
