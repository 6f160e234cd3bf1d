"""Guard of accuracy: the smallest tree that a measured score allows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from .._compress import compress as compress_
from .._options import number
from .._progress import bar
from .._recipe import Rule
from .._table import Table
from ._choices import Sensitivity
from ._guard_search import Limit, Search, mended, most_tries, rungs_of


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
    evaluate: Callable[[Any], Any],
    drop: float,
    confidence: float = 0.95,
    compress: Callable[[Any, list[Rule]], Any] | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> GuardResult:
    r"""Finds the smallest tree whose score is at most ``drop`` below that of the dense one.

    Bisection comes first, among 64 budgets between the smallest and the largest assignment, each
    spent by :func:`allocate_bits`. It takes for granted that more bits are never worse, which
    need not be so: a layer may do harm that its score does not show. So then the largest tree
    that failed is mended: the parameter with the worst score gets its next larger candidate, or
    stays dense, then the next, and bisection finds how many such steps are needed, among the
    trees that are smaller than the best so far. Where no assignment is good enough, this looks
    for what has to stay dense. The dense tree itself is always good enough. About a dozen trees
    are evaluated.

    The best tree is chosen by the scores it is then judged by: evaluate on validation data, never
    on those of the final test. Let ``evaluate`` give a score for each sample, and the drop is held
    on others, too, with the ``confidence``: with differences :math:`d_i` to the dense tree, sample
    by sample, and one more difference as large as the scores can differ, a tree is good enough if

    .. math:: \mathrm{mean}(d) + z \, \mathrm{std}(d) / \sqrt{n + 1} \le \mathrm{drop}, \qquad
              z = \Phi^{-1}\left(1 - (1 - c) / m\right)

    with the ``confidence`` `c` and the largest number `m` of trees that may be tried on these
    samples: the bound is about one for all of them at once (Bonferroni), so also for the one that
    is returned because it passed. The sample that was added keeps few samples, none of them
    worse, from being taken for a proof. With right and wrong answers a drop of half a percent
    wants thousands.

    Args:
      params: the dense parameters (or pruned ones), to which everything is compared.
      candidates: what :func:`sensitivity` measured, or recipes to choose from, the one that
        gives the smallest tree first.
      evaluate: `(small) -> score`, higher is better: a number, or `[n]`, one for each sample, in
        the same order each time. Called with ``params`` first. Call
        :func:`jaxopt_models.materialize` before a jitted function, so that one compilation serves
        all trees.
      drop: how far the score (the mean, of several) may fall.
      confidence: how sure it has to be that the drop holds for other samples, from 0.5 to below
        1; only for scores of samples. Give their mean if only these samples count.
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
      ValueError: if ``drop`` is negative, ``confidence`` out of range, the score of the dense
        tree not finite, scores are of other samples than before, there is nothing to choose
        from, or of the recipes that were tried a later one gives a smaller tree.
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
    confidence = number(confidence, "guard: confidence")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"guard: confidence={confidence} is not in [0.5, 1)")
    for name, f in (("evaluate", evaluate), ("compress", compress or compress_)):
        if not callable(f):
            raise TypeError(f"guard: {name} is {type(f).__name__}; give a function")
    if save is not None and not isinstance(save, (str, os.PathLike)):
        raise TypeError(f"guard: save is {type(save).__name__}; give the path of a file")
    if save is not None and not os.path.isdir(os.path.dirname(os.path.abspath(save))):
        raise FileNotFoundError(f"guard: save={os.fspath(save)!r}: there is no such folder")
    rungs = rungs_of(candidates)
    limit = Limit(drop, confidence, most_tries(rungs, candidates))
    search = Search(params, evaluate, limit, compress or compress_, save)
    try:
        with bar("guard", None, show=progress) as advance:
            search.start(advance)
            search.halve("budget", rungs)
            if isinstance(candidates, Sensitivity):
                search.halve("mended", mended(candidates, search))
    except KeyboardInterrupt:
        if search.best is None:
            raise
        search.interrupted = True
    return _result(search)


def _result(search: Search) -> GuardResult:
    """Returns the best tree, and writes it if nothing better than the dense one was found."""
    search.keep()
    best, dense = search.best, search.tried[0]
    notes = [
        f"best: {best.bits / 8:,.0f} of {dense.bits / 8:,.0f} bytes, "
        f"{search.dense - best.score:.4g} below the dense tree"
    ]
    if search.samples.size > 1:
        limit = search.limit
        notes.append(
            f"good: with confidence {limit.confidence:g} for all of at most {limit.tries} trees"
        )
    if search.interrupted:
        notes.append("interrupted: not all was tried")
    columns = ("tried", "bytes", "score", "below", "good")
    table = Table(columns, search.rows, title="guard", notes=notes)
    return GuardResult(
        list(best.rung.recipe), best.small, best.score, search.dense, table, search.interrupted
    )
