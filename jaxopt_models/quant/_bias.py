"""Biases corrected for what quantized kernels shift."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._axes import Axes, Matrix
from .._bits import wide_dtype
from .._calibrate import Stats, calibrate
from .._call import name_of
from .._encoded import is_encoded
from .._graph import like, traced
from .._options import pattern
from .._paths import flatten, match_paths
from ._biases import Biased, biased
from ._rows import by_column


def correct_bias(
    fn: Callable[..., Any],
    params: Any,
    small: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    inputs: Literal["dense", "compressed"] = "dense",
    only: str | None = None,
) -> Any:
    r"""Corrects biases for the mean by which compressed kernels move their outputs.

    Rounding errors of a kernel do not average out over inputs whose mean is not zero, as after a
    ReLU. Each output is moved by a constant, which its bias can take back,

    .. math:: b \leftarrow b + (W - \hat W)^\top \, \mathrm{E}[x]

    with the `[in, out]` view of a kernel and the mean of its inputs. Which bias is added to the
    product with a kernel is found in the program; :func:`biases` lists it, and the kernels that
    have none. Where the running mean of a normalization is taken from the product instead, that is
    moved.

    Every position counts as an input, padding, too: texts are best cut to one length without any.

    Args:
      fn: function of `(params, ...)`, in inference mode.
      params: the dense parameters.
      small: what became of them; any leaf is a kernel, pruned ones, too.
      batches: tuples of the arguments after ``params``.
      inputs: of which model the means are: ``"dense"``, or ``"compressed"``, the inputs that the
        kernels see before the biases of earlier layers are corrected.
      only: regular expression on paths of kernels; those that match are corrected for, and have to
        be. Default: all that can be.

    Returns:
      ``small`` with other biases.

    Raises:
      TypeError: if ``params`` are compressed, or a batch is no tuple.
      ValueError: if there is no batch, the trees differ, no kernel has a bias, or one of ``only``
        has none.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn, params = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.full((2, 1), 0.4)}
      >>> params |= {"w": params["w"].at[0].set(1), "b": jnp.zeros((1, 1))}
      >>> small = jom.compress(params, [jom.Rule("w", jom.quant.Int(bits=2))])
      >>> x = jnp.array([[0.0, 1.0], [0.0, 3.0]])
      >>> new = jom.quant.correct_bias(fn, params, small, [(x,)])
      >>> new["b"]       # 0.4 became 0, times a mean of 2
      Array([[0.8]], dtype=float32)

    References:
      Nagel et al., `Data-Free Quantization Through Weight Equalization and Bias Correction
      <https://arxiv.org/abs/1906.04721>`_, 2019
    """
    who = "correct_bias"
    if inputs not in ("dense", "compressed"):
        raise ValueError(f"{who}: inputs={inputs!r} is neither 'dense' nor 'compressed'")
    batches = iter(batches)
    first = next(batches, None)
    if not isinstance(first, tuple):
        raise (ValueError if first is None else TypeError)(
            f"{who}: batches begin with {first!r:.60}; give tuples of the arguments after params: "
            "[(x,) for x in ...]"
        )
    t = traced(fn, params, first, who)
    leaves, unflatten = flatten(small)
    dense = match_paths(params, leaves, who=who)
    values = {p.path: p.value for p in leaves}
    found = biased(t.graph, {p: v.shape for p, v in t.values.items()})
    kernels = _chosen(found, values, only, name_of(fn))
    seen = params if inputs == "dense" else small
    stats = calibrate(fn, seen, itertools.chain([first], batches), ["mean"])
    shifts: dict[str, np.ndarray] = {}
    for path, kernel in kernels.items():
        if path not in stats:
            raise ValueError(f"{who}: {path} has no statistics: {stats.missing.get(path)}")
        shift = np.asarray(_shift(dense[path], values[path], stats[path]), np.float64).reshape(-1)
        for a in kernel.added:
            total = shifts.setdefault(a.path, np.zeros(np.size(values[a.path])))
            total[a.entries] += a.sign * shift[a.outputs]
    for path, shift in shifts.items():
        old = np.asarray(values[path], np.float64)
        values[path] = like(values[path], old + shift.reshape(old.shape))
    return unflatten([values[p.path] for p in leaves])


def _chosen(
    found: dict[str, Biased], values: dict[str, Any], only: str | None, name: str
) -> dict[str, Biased]:
    """Returns the kernels to correct for."""
    kernels = {p: k for p, k in found.items() if is_encoded(values[p])}
    if only is not None:
        matches = pattern(only, "correct_bias: only").fullmatch
        kernels = {p: k for p, k in kernels.items() if matches(p)}
    if not kernels:
        which = "no kernel is compressed" if only is None else f"only={only!r} matches none"
        compressed = [p for p, v in values.items() if is_encoded(v)]
        raise ValueError(f"correct_bias: {which} of {name}; compressed are {compressed}")
    why = {p: k.why or _stored(k, values) for p, k in kernels.items()}
    fit = {p: k for p, k in kernels.items() if not why[p]}
    if not fit or (only is not None and len(fit) < len(kernels)):
        reasons = "; ".join(f"{p}: {w}" for p, w in why.items() if w)
        raise ValueError(f"correct_bias: {name} has kernels without a bias to correct: {reasons}")
    return fit


def _stored(kernel: Biased, values: dict[str, Any]) -> str:
    found = [a.path for a in kernel.added if is_encoded(values[a.path])]
    return f"its bias {found[0]} is compressed; keep it dense" if found else ""


def _shift(w: Any, small: Any, stats: Stats) -> jax.Array:
    """Returns by how much the mean of each output is too low, `[*stack, *out]`."""
    axes = stats.axes.resolve(w.ndim)
    core = Axes(axes.out)

    def one(w: jax.Array, found: jax.Array, stats: Stats) -> jax.Array:
        wide = wide_dtype(w.dtype)
        m = Matrix(tuple(w.shape), axes.out)
        miss = m.view(w.astype(wide) - found.astype(wide))
        return jnp.sum(miss * by_column(stats, "mean", m, core), axis=0)

    for _ in range(axes.stack):
        one = jax.vmap(one)
    return jax.jit(one)(jnp.asarray(w), small.materialize(), stats)
