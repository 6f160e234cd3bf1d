"""Statistics of batch normalization estimated anew, after quantization has moved its inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._call import Frame, check_function, name_of, take_apart, trace
from .._graph import Graph
from .._options import portion
from .._paths import flatten
from .._rewrite import like
from .._tracked import is_tracked
from .._walk import ENTERING, Emitted, Walk
from ._norms import Norm, norms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean, and sum of squared distances from the mean; `[*loops, *channels]` each."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    def plus(self, other: Moments) -> Moments:
        """Returns the moments of both."""
        count = self.count + other.count
        part = other.count / (count + (count == 0))
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.count * part
        return Moments(count, self.mean + apart * part, squares)

    @property
    def variance(self) -> jax.Array:
        """Mean of the squared distances."""
        return self.squares / (self.count + (self.count == 0))


@dataclasses.dataclass
class Measuring(Walk):
    """A walk that emits the moments of what is normalized.

    Args:
      sites: norms by the trail of the operation that subtracts the mean, with their numbers.
      turns: whether every norm goes on with its input less its mean, divided by its deviation.
    """

    sites: dict[tuple[int, ...], tuple[int, Norm]] = dataclasses.field(default_factory=dict)
    turns: bool = False
    collects = True
    rules = ENTERING

    def wants(self, eqn: Any) -> bool:
        trail = self.trail(eqn)
        return any(t[: len(trail)] == trail for t in self.sites)

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        site = self.sites.get(self.trail(eqn))
        if site is None:
            return super().use(eqn, operands)
        number, norm = site
        x, mean = operands
        axes = tuple(a for a in range(x.ndim) if a not in norm.channels)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        center = jnp.mean(wide, axis=axes, keepdims=True)
        squares = jnp.sum((wide - center) ** 2, axis=axes, keepdims=True)
        count = jnp.full(center.shape, math.prod(x.shape[a] for a in axes), wide.dtype)
        found = [jnp.squeeze(v, axes) for v in (count, center, squares)]
        scans = [i + 1 for i, e in enumerate(self.loops) if e.primitive.name == "scan"]
        self.emit(f"{number:06d}", Moments(*found), tuple(scans[d - 1] for d in norm.loops))
        if self.turns:
            wide = (wide - center) * jax.lax.rsqrt(squares / count + norm.eps)
            x = wide.astype(x.dtype)
        return super().use(eqn, [x, mean])

    def zero(self, e: Any) -> Any:
        return Emitted(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), e.value), e.loops)

    def merge(self, a: Any, b: Any) -> Any:
        return Emitted(a.value.plus(b.value), a.loops)

    def over_mesh(self, name: str, e: Any, axes: tuple[str, ...], typed: bool) -> Any:
        m = e.value
        count = jax.lax.psum(m.count, axes)
        mean = jax.lax.psum(m.mean * m.count, axes) / jnp.maximum(count, 1)
        squares = jax.lax.psum(m.squares + m.count * (m.mean - mean) ** 2, axes)
        return Emitted(Moments(count, mean, squares), e.loops)


def reestimate_batchnorm(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    small: Any = None,
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
      momentum: part of the old statistics that is kept at each batch, as in training,
        :math:`\mu \leftarrow m \mu + (1 - m) \mu_b`; ``None`` forgets them and averages.

    Returns:
      The tree ``small``, or ``params``, with new means and variances.

    Raises:
      TypeError: if a batch is no tuple, or an option has another type.
      ValueError: if there is no batch, no such norm, statistics that no norm uses, a norm that is
        folded and no ``small``, or an input that is NaN or Inf.

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
    tree = params if small is None else small
    old, _ = _values(params)
    run = _Run(fn)
    totals: tuple[dict[Key, Moments], dict[Key, Moments]] = ({}, {})
    last: dict[Key, tuple[Any, Any]] = {}
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(
                f"{WHO}: a batch is {type(batch).__name__}; give the tuple of the arguments "
                "after params: [(x,) for x in ...]"
            )
        before = None if small is None else run(params, batch, None)
        stats = run.statistics(tree, batch, old, before)
        after = run(tree, batch, stats)
        for total, found in zip(totals, (after, before or {}), strict=True):
            total |= {k: total[k].plus(m) if k in total else m for k, m in found.items()}
        if momentum is not None:
            for key, new in run.corrected(after, before, old).items():
                kept = last.get(key, [_wide(old[p], new[0]) for p in key])
                last[key] = tuple(
                    momentum * a + (1 - momentum) * b for a, b in zip(kept, new, strict=True)
                )
    if not totals[0]:
        raise ValueError(f"{WHO}: there is no batch; give at least one tuple of arguments")
    final = last or run.corrected(totals[0], totals[1] or None, old)
    return _replaced(fn, tree, final)


WHO = "reestimate_batchnorm"
# Paths of the mean and the variance of a norm.
Key = tuple[str, str]


class _Run:
    """Runs batches through a function, compiled once for each form of its parameters."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.norms: list[Norm] = []
        self.eps: dict[Key, float] = {}
        self.compiled = jax.jit(self._measure, static_argnums=0)

    def __call__(
        self, params: Any, batch: tuple[Any, ...], stats: dict[str, Any] | None
    ) -> dict[Key, Moments]:
        """Returns the moments of every norm's input, normalized with statistics if given."""
        frame, arrays = take_apart(params, batch, {})
        if any(isinstance(a, jax.core.Tracer) for a in arrays):
            raise TypeError(f"{WHO} runs on data: call it outside of jit, grad and vmap")
        found = (self.compiled if frame.hashable() else self._measure)(frame, arrays, stats)
        side: dict[Key, Moments] = {}
        for i, n in enumerate(self.norms):
            m = jax.tree.map(lambda a: np.asarray(a, np.float64), found[f"{i:06d}"])
            if not (np.all(np.isfinite(m.mean)) and np.all(np.isfinite(m.squares))):
                raise ValueError(f"{WHO}: what is normalized by {n.mean} is NaN or Inf")
            key = (n.mean, n.var)
            side[key] = side[key].plus(m) if key in side else m
        return side

    def _measure(self, frame: Frame, arrays: list[Any], stats: Any) -> dict[str, Any]:
        params, _, _ = frame.restore(arrays)
        program = trace(self.fn, frame, arrays, who=WHO, every=True)
        values, _ = _values(params)
        self._find(program, values)
        walk = Measuring(
            sites={n.nodes[0].trail: (i, n) for i, n in enumerate(self.norms)},
            turns=stats is not None,
        )
        operands = list(program.operands)
        for i, path in enumerate(values):
            if path in (stats or {}):
                x = operands[i]
                operands[i] = (
                    dataclasses.replace(x, value=stats[path]) if is_tracked(x) else stats[path]
                )
        walk.run(program.jaxpr, program.consts, operands)
        return {k: e.value for k, e in walk.side.items()}

    def _find(self, program: Any, values: dict[str, Any]) -> None:
        found = norms(Graph(program, values))
        if not found:
            raise ValueError(
                f"{WHO}: {name_of(self.fn)} has no normalization by running statistics; is it in "
                "inference mode, and do params hold the statistics (the whole linen variables)?"
            )
        if any(n.why for n in found):
            [why, *_] = [f"{n.var}: {n.why}" for n in found if n.why]
            raise ValueError(f"{WHO}: the statistics of a norm cannot be told: {why}")
        self.norms = found
        self.eps = {(n.mean, n.var): n.eps for n in found}

    def statistics(
        self, params: Any, batch: Any, old: dict[str, Any], before: dict[Key, Moments] | None
    ) -> dict[str, Any]:
        """Returns statistics to run on, where inputs come with mean zero and variance one.

        Without moments of the float model they leave these as they are; with, they make the
        norm return what the moments make it return there.
        """
        if not self.norms:
            frame, arrays = take_apart(params, batch, {})
            self._find(trace(self.fn, frame, arrays, who=WHO, every=True), _values(params)[0])
        if before is None:
            self._check_folded(old)
        elif len(self.eps) < len(self.norms):
            raise ValueError(f"{WHO}: with small= each norm has to be used once")
        found: dict[str, Any] = {}
        for key, eps in self.eps.items():
            mean, var = key
            if before is None:
                pair = (0.0, 1.0 - eps)
            else:
                m = before[key]
                spread = m.variance + eps
                pair = (
                    (_wide(old[mean], m.mean) - m.mean) / np.sqrt(spread),
                    (_wide(old[var], m.mean) + eps) / spread - eps,
                )
            for path, new in zip(key, pair, strict=True):
                w = old[path]
                found[path] = like(w, np.reshape(new, w.shape) if before else np.full(w.shape, new))
        return found

    def _check_folded(self, old: dict[str, Any]) -> None:
        for n in self.norms:
            var = np.asarray(old[n.var], np.float64)
            ones = all(np.all(np.asarray(old[p]) == 1) for p in n.scales)
            if ones and np.max(np.abs(var + n.eps - 1)) < 3e-7:
                raise ValueError(
                    f"{WHO}: {n.mean} and {n.var} are those of a norm that is folded, and not of "
                    "its input; pass the float parameters, and the compressed ones as small="
                )

    def corrected(
        self, after: dict[Key, Moments], before: dict[Key, Moments] | None, old: dict[str, Any]
    ) -> dict[Key, tuple[Any, Any]]:
        """Returns new means and variances."""
        if before is None:
            return {k: (m.mean, m.variance) for k, m in after.items()}
        found = {}
        for key, m in after.items():
            eps, b = self.eps[key], before[key]
            mean, var = (_wide(old[p], m.mean) for p in key)
            square = (m.variance + eps) / (b.variance + eps)
            new = m.mean - (b.mean - mean) * np.sqrt(square)
            found[key] = new, np.maximum((var + eps) * square - eps, 0.0)
        return found


def _values(params: Any) -> tuple[dict[str, Any], Any]:
    leaves, unflatten = flatten(params)
    return {p.path: p.value for p in leaves if hasattr(p.value, "shape")}, unflatten


def _wide(x: Any, m: np.ndarray) -> np.ndarray:
    return np.reshape(np.asarray(x, np.float64), np.shape(m))


def _replaced(fn: Any, tree: Any, final: dict[Key, tuple[Any, Any]]) -> Any:
    leaves, unflatten = flatten(tree)
    found = {p: v for key, pair in final.items() for p, v in zip(key, pair, strict=True)}
    lost = [
        p.path
        for p in leaves
        if p.reason in ("collection 'batch_stats'", "nnx.BatchStat") and p.path not in found
    ]
    if lost:
        raise ValueError(
            f"{WHO}: no norm of {name_of(fn)} subtracts or divides by {', '.join(lost)}; is it in "
            "inference mode?"
        )
    new = [
        like(p.value, np.reshape(found[p.path], p.value.shape)) if p.path in found else p.value
        for p in leaves
    ]
    return unflatten(new)
