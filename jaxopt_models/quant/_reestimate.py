"""Statistics of batch normalization estimated anew, after quantization has moved its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .._call import check_batch, check_function, name_of, no_batch
from .._graph import like, values_of
from .._options import portion
from .._paths import flatten
from ._moments import WHO, Key, Moments, Run


def reestimate_batchnorm(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    small: Any = None,
    sequential: bool = False,
    momentum: float | None = None,
) -> Any:
    r"""Estimates the running statistics of batch normalization anew.

    Quantized weights move the mean and variance of what a norm sees away from those that it
    subtracts and divides by. Here each batch is run once, in inference mode, with every norm
    using the mean and variance of its own input, as in training. The statistics are those of all
    batches together,

    .. math:: \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
              \sigma^2 = \frac{\sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2)}{\sum_b n_b}

    of `n` entries a batch; one large batch gives exactly what inference will see then.

    With ``small`` the statistics of the float parameters are not replaced by those of the batches
    but corrected by what changed on these: of norms with running mean `m` and variance `v`, and
    moments :math:`\mu, \sigma^2` of the float and :math:`\hat\mu, \hat\sigma^2` of the small
    model,

    .. math:: r^2 = \frac{\hat\sigma^2 + \epsilon}{\sigma^2 + \epsilon}, \qquad
              \hat m = \hat\mu - (\mu - m) \, r, \qquad
              \hat v + \epsilon = (v + \epsilon) \, r^2,

    so that every norm returns the mean and variance that it returned before. That needs few
    batches, and no layer has to have kept its norm: it works after :func:`fold_batchnorm`, too.
    Norms are found in the program: no training mode, no change of the model is needed.

    Args:
      fn: function of `(params, ...)`, in inference mode.
      params: parameters and statistics together; compressed or not, if ``small`` is not given.
      batches: tuples of the arguments after ``params``.
      small: what became of ``params``, whose statistics are corrected.
      sequential: find the statistics of one norm after the other, each with those before it in
        place: what one batch of all data would give, at a run of all batches for each norm.
      momentum: part of the old statistics that is kept at each batch, as in training,
        :math:`\mu \leftarrow m \mu + (1 - m) \mu_b`; ``None`` forgets them and averages.

    Returns:
      The tree ``small``, or ``params``, with new means and variances.

    Raises:
      TypeError: if a batch is no tuple, or an option has another type.
      ValueError: if there is no batch, no such norm, statistics that no norm uses, a norm that is
        folded and no ``small``, ``momentum`` with ``sequential``, or an input is NaN or Inf.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: (x @ p["w"] - p["mean"][None]) * jax.lax.rsqrt(p["var"] + 1e-3)[None]
      >>> params = {"w": jnp.eye(1), "mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> batches = [(jnp.array([[1.0], [3.0]]),), (jnp.array([[5.0], [3.0]]),)]
      >>> new = jom.quant.reestimate_batchnorm(fn, params, batches)
      >>> new["mean"], new["var"]
      (Array([3.], dtype=float32), Array([2.], dtype=float32))

    References:
      Nagel et al., `Data-Free Quantization Through Weight Equalization and Bias Correction
      <https://arxiv.org/abs/1906.04721>`_, 2019
      Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015
    """
    check_function(fn, WHO)
    if momentum is not None:
        momentum = portion(momentum, f"{WHO}: momentum")
        if sequential:
            raise ValueError(f"{WHO}: momentum is for one batch after another, not sequential=True")
    tree, old, run = params if small is None else small, values_of(params), Run(fn)
    batches = (check_batch(b, WHO) for b in batches)
    if sequential:
        return _replaced(fn, tree, _one_by_one(run, params, small, list(batches), old))
    total, total_before = _Total(), _Total()
    kept: dict[Key, Any] = {}
    for batch in batches:
        before = None if small is None else run(params, batch, None)
        run.prepare(tree, batch)
        after = run(tree, batch, _neutral(run, old, before))
        total.add(after)
        total_before.add(before or {})
        if momentum is not None:
            for key, new in _statistics(run, after, before, old).items():
                last = kept.get(key, [_wide(old[p], new[0]) for p in key])
                kept[key] = [
                    momentum * a + (1 - momentum) * b for a, b in zip(last, new, strict=True)
                ]
    final = kept or _statistics(run, total, None if small is None else total_before, old)
    return _replaced(fn, tree, final)


class _Total(dict[Key, Moments]):
    """Moments of all batches."""

    def add(self, found: dict[Key, Moments]) -> None:
        """Adds those of one more."""
        for key, m in found.items():
            self[key] = self[key].plus(m) if key in self else m


def _one_by_one(
    run: Run, params: Any, small: Any, batches: list[Any], old: dict[str, Any]
) -> dict[Key, Any]:
    """Finds the statistics of each norm with those of the norms before it in place."""
    tree, before, final = params if small is None else small, _Total(), {}
    for batch in batches:
        run.prepare(tree, batch)
        before.add({} if small is None else run(params, batch, None))
    _neutral(run, old, None if small is None else before)  # for its checks
    for key in run.eps:
        after = _Total()
        for batch in batches:
            found = run(_replaced(run.fn, tree, final, every=False), batch, None)
            after.add({key: found[key]})
        final |= _statistics(run, after, None if small is None else before, old)
    return final


def _neutral(run: Run, old: dict[str, Any], before: dict[Key, Moments] | None) -> dict[str, Any]:
    """Returns statistics to run on, where inputs come with mean zero and variance one.

    Without moments of the float model they leave these as they are; with, they make the norm
    return what the moments make it return there.
    """
    if before is None:
        _check_folded(run, old)
    elif len(run.eps) < len(run.norms):
        raise ValueError(f"{WHO}: with small= each norm has to be used once")
    found: dict[str, Any] = {}
    for key, eps in run.eps.items():
        mean, var = (np.asarray(old[p], np.float64) for p in key)
        if before is None:
            mean, var = np.zeros(mean.shape), np.full(var.shape, 1.0 - eps)
        else:
            m = before[key]
            spread = np.reshape(m.variance + eps, var.shape)
            mean = (mean - np.reshape(m.mean, mean.shape)) / np.sqrt(spread)
            var = (var + eps) / spread - eps
        found |= {p: like(old[p], w) for p, w in zip(key, (mean, var), strict=True)}
    return found


def _check_folded(run: Run, old: dict[str, Any]) -> None:
    for n in run.norms:
        var = np.asarray(old[n.var], np.float64)
        ones = all(np.all(np.asarray(old[p]) == 1) for p in n.scales)
        if ones and np.max(np.abs(var + n.eps - 1)) < 3e-7:
            raise ValueError(
                f"{WHO}: {n.mean} and {n.var} are those of a norm that is folded, and not of "
                "its input; pass the float parameters, and the compressed ones as small="
            )


def _statistics(
    run: Run, after: dict[Key, Moments], before: dict[Key, Moments] | None, old: dict[str, Any]
) -> dict[Key, Any]:
    """Returns new means and variances."""
    if not after:
        raise no_batch(WHO)
    if before is None:
        return {k: (m.mean, m.variance) for k, m in after.items()}
    found = {}
    for key, m in after.items():
        eps, b = run.eps[key], before[key]
        mean, var = (_wide(old[p], m.mean) for p in key)
        square = (m.variance + eps) / (b.variance + eps)
        new = m.mean - (b.mean - mean) * np.sqrt(square)
        found[key] = new, np.maximum((var + eps) * square - eps, 0.0)
    return found


def _wide(x: Any, m: np.ndarray) -> np.ndarray:
    """Returns a parameter in the shape of moments."""
    return np.reshape(np.asarray(x, np.float64), np.shape(m))


def _replaced(fn: Any, tree: Any, final: dict[Key, Any], *, every: bool = True) -> Any:
    leaves, unflatten = flatten(tree)
    found = {p: v for key, pair in final.items() for p, v in zip(key, pair, strict=True)}
    statistics = ("collection 'batch_stats'", "nnx.BatchStat")
    lost = [p.path for p in leaves if p.reason in statistics and p.path not in found]
    if lost and every:
        raise ValueError(
            f"{WHO}: no norm of {name_of(fn)} subtracts or divides by {', '.join(lost)}; is it in "
            "inference mode?"
        )
    new = [
        like(p.value, np.reshape(found[p.path], p.value.shape)) if p.path in found else p.value
        for p in leaves
    ]
    return unflatten(new)
