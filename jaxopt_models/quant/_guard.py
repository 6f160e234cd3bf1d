"""Guard of accuracy: the smallest tree that a measured score allows."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from .._compress import compress as compress_
from .._options import number
from .._paths import flatten
from .._progress import bar
from .._recipe import Rule, check_recipe
from .._table import Table
from ._allocate import allocate, check_usable, recipe_of, storage
from ._choices import Candidate, Sensitivity, stored_bits

# Budgets that are looked at, evenly spread; six evaluations find one among so many.
_RUNGS = 64


@dataclasses.dataclass(frozen=True, repr=False)
class GuardResult:
    """What :func:`guard` found.

    Args:
      recipe: the recipe; empty where nothing but the dense tree was good enough.
      small: the tree it gives.
      score: what ``evaluate`` said of it.
      dense: what ``evaluate`` said of the dense tree.
      history: a row for each evaluation: what was tried, bytes, score, how far below the dense
        tree, and whether that was good enough.
      interrupted: whether Ctrl-C ended the search early.
    """

    recipe: list[Rule]
    small: Any
    score: float
    dense: float
    history: Table
    interrupted: bool

    def __repr__(self) -> str:
        return repr(self.history)

    def _repr_html_(self) -> str:
        return self.history._repr_html_()


def guard(
    params: Any,
    candidates: Sensitivity | Sequence[Sequence[Rule]],
    *,
    evaluate: Callable[[Any], float],
    drop: float,
    compress: Callable[[Any, list[Rule]], Any] | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> GuardResult:
    """Finds the smallest tree whose score is at most ``drop`` below that of the dense one.

    Bisection comes first, among 64 budgets between the smallest and the largest assignment, each
    spent by :func:`allocate_bits`. It takes for granted that more bits are never worse, which
    need not be so: a layer may do harm that its score does not show. So then the largest tree
    that failed is mended: the parameter with the worst score gets its next larger candidate, or
    stays dense, then the next, and bisection finds how many such steps are needed, among the
    trees that are smaller than the best so far. Where no assignment is good enough, this looks
    for what has to stay dense. The dense tree itself is always good enough. About a dozen trees
    are evaluated.

    The best tree is chosen by the scores it is then judged by: evaluate on validation data, never
    on those of the final test, and on enough of them that ``drop`` is no matter of chance.

    Args:
      params: the dense parameters (or pruned ones), to which everything is compared.
      candidates: what :func:`sensitivity` measured, or recipes to choose from, the one that
        gives the smallest tree first.
      evaluate: `(small) -> score`, higher is better. Called with ``params`` first. Call
        :func:`jaxopt_models.materialize` before a jitted function, so that one compilation serves
        all trees.
      drop: how far the score may fall.
      compress: `(params, recipe) -> small`; default: :func:`jaxopt_models.compress` without
        statistics. With solvers: ``lambda p, r: jom.compress(p, r, stats=stats)``.
      save: file to which each best tree is written as soon as it is known, by
        :func:`jaxopt_models.save`, so that it is there whatever happens.
      progress: show a bar, a step for each evaluation.

    Returns:
      :class:`GuardResult`. Ctrl-C ends the search and returns the best so far; before the dense
      tree is evaluated it is raised.

    Raises:
      TypeError: for arguments of another type.
      ValueError: if ``drop`` is negative, the score of the dense tree not finite, or there is
        nothing to choose from.
      FileNotFoundError: if the folder of ``save`` does not exist.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.array([[0.1, 1.0], [-0.7, 0.2]]), "b": jnp.array([[2.0], [-0.3]])}
      >>> x = jax.random.normal(jax.random.key(0), (64, 2))
      >>> formats = [jom.quant.Int(bits=b) for b in (2, 3, 4, 6, 8)]
      >>> found = jom.quant.sensitivity(fn, params, [(x,)], formats)
      >>> near = lambda p: -float(jnp.mean((fn(jom.materialize(p), x) - fn(params, x)) ** 2))
      >>> result = jom.quant.guard(params, found, evaluate=near, drop=0.01)
      >>> result.score >= result.dense - 0.01, [rule.path for rule in result.recipe]
      (True, ['a', 'b'])
    """
    drop = number(drop, "guard: drop")
    if drop < 0:
        raise ValueError(f"guard: drop={drop} is how far the score may fall, 0 or more")
    for name, f in (("evaluate", evaluate), ("compress", compress or compress_)):
        if not callable(f):
            raise TypeError(f"guard: {name} is {type(f).__name__}; give a function")
    if save is not None and not os.path.isdir(os.path.dirname(os.path.abspath(save))):
        raise FileNotFoundError(f"guard: save={os.fspath(save)!r}: there is no such folder")
    rungs = _rungs(candidates)
    with bar("guard", None, show=progress) as advance:
        search = _Search(params, evaluate, drop, compress or compress_, save, advance)
        try:
            search.halve("budget", rungs)
            if isinstance(candidates, Sensitivity):
                search.halve("mended", _mended(candidates, search))
        except KeyboardInterrupt:
            search.interrupted = True
            search.keep()
    return search.result()


@dataclasses.dataclass(frozen=True)
class _Rung:
    """A recipe, what it is made of, and its size in bits as far as that is known."""

    recipe: list[Rule]
    picks: tuple[Candidate, ...] = ()
    bits: int = 0

    @classmethod
    def of(cls, sensitivity: Sensitivity, picks: Sequence[Candidate]) -> _Rung:
        """Makes a recipe of one candidate for each parameter."""
        bits = sensitivity.others + sum(k.bits for k in picks)
        return cls(recipe_of(sensitivity, picks), tuple(picks), bits)


@dataclasses.dataclass
class _Tried:
    """A tree that was evaluated; dropped unless it is the best."""

    rung: _Rung
    small: Any
    bits: int
    score: float
    good: bool


class _Search:
    """The trees that were tried, and the best."""

    def __init__(
        self,
        params: Any,
        evaluate: Callable[[Any], float],
        drop: float,
        compress: Callable[[Any, list[Rule]], Any],
        save: Any,
        advance: Callable[[str], None],
    ):
        self.params, self.evaluate, self.drop, self.compress = params, evaluate, drop, compress
        self.save, self.advance = save, advance
        self.rows: list[tuple] = []
        self.tried: list[_Tried] = []
        self.saved: _Tried | None = None
        self.interrupted = False
        self.dense = float(evaluate(params))
        if not math.isfinite(self.dense):
            raise ValueError(f"guard: evaluate gives {self.dense} for the dense tree")
        self.best = self._record("dense", _Rung([]), params, self.dense)

    def _record(self, what: str, rung: _Rung, small: Any, score: float) -> _Tried:
        bits = sum(stored_bits(p.value) for p in flatten(small)[0])
        new = _Tried(rung, small, bits, score, score >= self.dense - self.drop)
        self.rows.append((what, -(-bits // 8), score, self.dense - score, new.good))
        self.tried.append(new)
        self.advance(f"{bits / 8:,.0f} bytes, {self.dense - score:.4g} below")
        return new

    def good(self, what: str, rung: _Rung) -> bool:
        """Evaluates a recipe, once, and keeps the tree where it is the best."""
        for old in self.tried:
            if old.rung.recipe == rung.recipe:
                return old.good
        small = self.compress(self.params, list(rung.recipe))
        new = self._record(what, rung, small, float(self.evaluate(small)))
        worse = new
        if new.good and new.bits < self.best.bits:
            worse, self.best = self.best, new
            self.keep()
        worse.small = None
        return new.good

    def keep(self) -> None:
        """Writes the best tree, if it is not written already."""
        if self.save is not None and self.saved is not self.best:
            from .. import artifact

            artifact.save(self.save, self.best.small, recipe=self.best.rung.recipe)
            self.saved = self.best

    def halve(self, what: str, rungs: Sequence[_Rung]) -> None:
        """Looks for the first recipe that is good enough, as if all after it were."""
        low, high = -1, len(rungs)
        while high - low > 1:
            middle = (low + high) // 2
            if self.good(what, rungs[middle]):
                high = middle
            else:
                low = middle

    def largest_failure(self) -> _Rung | None:
        """Returns the largest tree that was not good enough and is smaller than the best."""
        failed = [t for t in self.tried if not t.good and t.bits < self.best.bits]
        return max(failed, key=lambda t: t.bits).rung if failed else None

    def result(self) -> GuardResult:
        """Returns the best tree, and writes it if nothing better than the dense one was found."""
        self.keep()
        best, dense = self.best, self.tried[0]
        notes = [
            f"best: {best.bits / 8:,.0f} of {dense.bits / 8:,.0f} bytes, "
            f"{self.dense - best.score:.4g} below the dense tree"
        ]
        if self.interrupted:
            notes.append("interrupted: not all was tried")
        columns = ("tried", "bytes", "score", "below", "good")
        table = Table(columns, self.rows, title="guard", notes=notes)
        return GuardResult(
            list(best.rung.recipe), best.small, best.score, self.dense, table, self.interrupted
        )


def _rungs(candidates: Any) -> list[_Rung]:
    """Returns recipes from the smallest to the largest."""
    if isinstance(candidates, Sensitivity):
        return _assignments(candidates)
    if not isinstance(candidates, Sequence) or isinstance(candidates, str | Rule):
        raise TypeError(
            f"guard: candidates={candidates!r:.80}; give what sensitivity(...) returns, or a list "
            "of recipes"
        )
    found = [_Rung(check_recipe(recipe, who="guard")) for recipe in candidates]
    if not found:
        raise ValueError("guard: there is no recipe to choose from")
    return found


def _assignments(sensitivity: Sensitivity) -> list[_Rung]:
    """Returns the best assignments for budgets from the least that is possible to the best."""
    check_usable(sensitivity, "guard")
    least = sum(min(k.bits for k in c.candidates if math.isfinite(k.score)) for c in sensitivity)
    largest = sum(max(k.bits for k in c.candidates) for c in sensitivity)
    free = allocate(sensitivity, [storage(sensitivity, largest)])
    most = sum(c.candidates[k].bits for c, k in zip(sensitivity, free, strict=True))
    found: dict[tuple[int, ...], None] = {}
    for step in range(_RUNGS):
        budget = least + (most - least) * step / (_RUNGS - 1)
        picked = allocate(sensitivity, [storage(sensitivity, budget)], gap=1e-4)
        found[tuple(picked)] = None
    return [
        _Rung.of(sensitivity, [c.candidates[k] for c, k in zip(sensitivity, picks, strict=True)])
        for picks in found
    ]


def _mended(sensitivity: Sensitivity, search: _Search) -> list[_Rung]:
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
        rung = _Rung.of(sensitivity, picks)
        if rung.bits >= search.best.bits:
            break
        found.append(rung)
    return found
