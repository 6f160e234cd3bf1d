"""Outliers of activations moved into the weights that meet them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._axes import Matrix
from .._call import check_args, name_of
from .._graph import Chain, Links, Member, check_finite, finished, traced
from .._options import pattern, portion


def smooth(
    fn: Callable[..., Any],
    params: Any,
    *,
    stats: Mapping[str, Any],
    args: Sequence[Any],
    alpha: float = 0.5,
    only: str | None = None,
) -> Any:
    r"""Divides the channels of activations by factors that the weights are multiplied with.

    A few channels of a transformer's activations are much larger than the rest, which 8-bit
    grids of a whole tensor then cannot resolve. With

    .. math:: s_j = \max |X_j|^\alpha \, / \, \max |W_j|^{1 - \alpha}

    for the input channel `j`, maxima over all kernels that take it in, these kernels are
    multiplied with `s` and what makes the channel (the scale and bias of a norm, the kernel and
    bias of a layer) is divided by it: ``fn`` returns what it did. Both are found in the program;
    :func:`links` lists them, and the kernels whose input cannot be scaled. A channel that is zero
    in all data or weights keeps its scale.

    Args:
      fn: function of `(params, ...)`.
      params: its dense parameters.
      stats: of :func:`jaxopt_models.calibrate`, with ``absmax``.
      args: tuple of other arguments, for shapes and for the check that ``fn`` returns the same.
      alpha: how much of the difference moves into the weights, 0 to 1.
      only: regular expression on paths of kernels that take channels in; those that match, and
        others that share their input, are smoothed, and have to be. Default: all that can be.

    Returns:
      New parameters: ``fn`` of them is what it was.

    Raises:
      TypeError: if a parameter is compressed, under a JAX transformation, or if ``args`` is no
        tuple.
      ValueError: if ``alpha`` is out of range, statistics are missing, a kernel of ``only``
        cannot be smoothed, or none can, or a parameter holds NaN or Inf.
      RuntimeError: if ``fn`` of the result is something else, beyond rounding.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: (x * p["scale"]) @ p["w"]
      >>> params = {"scale": jnp.array([1.0, 64.0]), "w": jnp.ones((2, 1))}
      >>> x = jnp.ones(2)
      >>> stats = jom.calibrate(fn, params, [(x,)], ["absmax"])
      >>> new = jom.quant.smooth(fn, params, stats=stats, args=(x,))
      >>> new["scale"], new["w"][:, 0]
      (Array([1., 8.], dtype=float32), Array([1., 8.], dtype=float32))

    References:
      Xiao et al., `SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models <https://arxiv.org/abs/2211.10438>`_, 2022
    """
    alpha = portion(alpha, "smooth: alpha", closed=True)
    t = traced(fn, params, check_args(args, "smooth"), "smooth")
    links = Links(t)
    new: dict[str, np.ndarray] = {}
    chains = chosen(links, only, "smooth", name_of(fn))
    check_finite(t, (m.path for c in chains for m in c.members), "smooth")
    for chain in chains:
        values = t.values | new
        lows = np.zeros(chain.channels)
        x, w = lows, lows
        for m in chain.consumers:
            kernel = np.abs(np.asarray(values[m.path], np.float64))
            w = np.maximum(w, m.channels(np.maximum, kernel, chain.channels, 0.0))
            seen = np.broadcast_to(_absmax(stats, m, kernel.shape), kernel.shape)
            x = np.maximum(x, m.channels(np.maximum, seen, chain.channels, 0.0))
        known = (x > 0) & (w > 0)
        s = np.where(known, x, 1.0) ** alpha / np.where(known, w, 1.0) ** (1 - alpha)
        new |= chain.scaled(values, 1 / np.maximum(s, 1e-5))
    return finished(t, new, "smooth")


def chosen(
    links: Links, only: str | None, who: str, name: str, kinds: Sequence[str] = ()
) -> list[Chain]:
    """Returns chains of kernels that match, each channel of a kernel once.

    Args:
      links: all chains.
      only: pattern of those that have to have one, or ``None``.
      who: the public function.
      name: the name of the user's.
      kinds: what has to make the channels; empty for anything.
    """

    def fits(c: Chain) -> bool:
        return any(not kinds or m.kind in kinds for m in c.producers)

    every = links.consumers()
    wanted = set(every)
    if only is not None:
        matches = pattern(only, f"{who}: only").fullmatch
        wanted = {p for p in every if matches(p)}
        if not wanted:
            raise ValueError(
                f"{who}: only={only!r} matches no kernel that takes channels in; {name} has "
                f"{', '.join(every)}"
            )
    found: list[Chain] = []
    served: set[str] = set()
    why = {p: reason for p, (_, reason) in every.items()}
    for path in [p for p in every if p in wanted]:
        for chain in every[path][0]:
            if fits(chain) and not any(c is chain for c in found) and not _taken(chain, found):
                found.append(chain)
            if any(c is chain for c in found):
                served |= {m.path for m in chain.consumers}
    lost = [p for p in every if p in wanted and p not in served]
    if not found or (only is not None and lost):
        kind = f" made by {' or '.join(kinds)}" if kinds else ""
        reasons = "; ".join(
            f"{p}: {why[p] or f'no channels{kind} that are its alone'}" for p in lost
        )
        raise ValueError(f"{who}: {name} has kernels whose input cannot be scaled: {reasons}")
    return found


def _taken(chain: Chain, found: list[Chain]) -> bool:
    """Says whether a channel of a kernel is in a chain that was chosen."""
    before = [(m.path, m.axes, m.index >= 0) for c in found for m in c.consumers]
    for m in chain.consumers:
        for path, axes, mine in before:
            if path == m.path and (axes != m.axes or np.any(mine & (m.index >= 0))):
                return True
    return False


def _absmax(stats: Mapping[str, Any], m: Member, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the largest input of each entry of a kernel, with an axis for each of its axes."""
    found = stats.get(m.path)
    if found is None or "absmax" not in found.names:
        raise ValueError(
            f"smooth: {m.path} has no statistics 'absmax'; pass stats=jaxopt_models.calibrate(fn, "
            "params, batches), or leave it out with only="
        )
    axes = found.axes.resolve(len(shape))
    n, core = axes.stack, shape[axes.stack :]
    matrix = Matrix(core, axes.out or ())
    groups = dict(found.groups)
    if set(groups) & set(matrix.inner):
        raise ValueError(f"smooth: {m.path} shares axes with its input; leave it out with only=")
    x = np.asarray(found.absmax, np.float64)
    x = x.reshape(*shape[:n], *groups.values(), *matrix.in_shape)
    for i, (axis, count) in enumerate(groups.items()):
        x = np.repeat(x, core[axis] // count, axis=n + i)
    order = [*groups, *matrix.inner]
    x = x.transpose(*range(n), *(n + i for i in np.argsort(order)))
    return x.reshape([*shape[:n], *(s if a in order else 1 for a, s in enumerate(core))])
