"""Batch normalization folded into the layer before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .._call import name_of
from .._graph import (
    LINEAR,
    PRODUCTS,
    Chain,
    Links,
    Node,
    Traced,
    Value,
    check_finite,
    finished,
    paths_of,
    traced,
)
from .._options import pattern
from .._table import Table
from .._tracked import is_tracked
from ._norms import Norm, norms

_MOVES = LINEAR | {"reshape", "squeeze", "broadcast_in_dim", "transpose", "slice", "split"}


@dataclasses.dataclass(frozen=True)
class Folding:
    """A normalization with the layers that it can be folded into.

    Args:
      norm: the normalization.
      layers: paths of kernels.
      biases: paths of their biases.
      straight: whether one layer is directly before it, so that its bias can take a sum.
      chain: what is multiplied with one number for each channel.
      number: for each channel of the normalization the number of that factor.
      why: why it cannot be folded.
    """

    norm: Norm
    layers: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    straight: bool = False
    chain: Chain | None = None
    number: np.ndarray | None = None
    why: str = ""


def foldings(t: Traced) -> list[Folding]:
    """Returns every normalization of a program, and how it can be folded."""
    found = norms(t.graph)
    links = Links(t, takes=[n.products[0] for n in found if not n.why])
    users: dict[str, set[int]] = {}
    for node in t.graph.nodes:
        for x in filter(is_tracked, node.operands):
            for path in paths_of(x):
                users.setdefault(path, set()).add(id(node))
    return [_folding(links, n, users) for n in found]


def _folding(links: Links, n: Norm, users: dict[str, set[int]]) -> Folding:
    if n.why:
        return Folding(n, why=n.why)
    shared = [p for p in n.paths if users[p] - set(map(id, n.nodes))]
    if shared:
        return Folding(n, why=f"{shared[0]} is used elsewhere, too")
    products, adds, why = _back(n.input)
    if why:
        return Folding(n, why=why)
    _, inside = links.flow.taken[id(n.products[0])]
    axes = [*(-d for d in n.loops), *n.channels]
    wide = [t for t in inside if set(t.dims) == set(axes)]
    labels = links.flow.pool.of(wide[0].ids) if len(wide) == 1 else np.zeros(1, np.int64)
    if not labels.all() or len(inside) > 1:
        why = links.flow.why(n.input) or "no one layer makes its channels"
        return Folding(n, why=f"the layer before cannot be scaled: {why}")
    labels = labels.transpose([wide[0].dims.index(d) for d in axes])
    [k, *others] = np.unique(links.rank[labels])
    size = labels.size
    if others or len(np.unique(labels)) != size:
        return Folding(n, why="several of its channels are scaled by one parameter")
    chain = links.chains[k]
    known = {m.path for m in chain.members if m.node in products or m.node in adds}
    beyond = [m.path for m in chain.members if m.path not in known | {n.mean}]
    if beyond:
        return Folding(n, why=f"its input is read elsewhere, too: it goes on to {beyond[0]}")
    layers = [m.path for m in chain.members if m.node in products]
    biases = [m.path for m in chain.members if m.node in adds]
    straight = len(layers) == len(biases) == 1 and all(
        m.node.name == "add" and m.index.min() >= 0 and m.index.size == size
        for m in chain.members
        if m.node in adds
    )
    return Folding(n, tuple(layers), tuple(biases), straight, chain, links.number[labels])


def _back(x: Value) -> tuple[list[Node], list[Node], str]:
    """Returns the layers that make a value, the sums of biases on the way, or what is between."""
    products, adds, todo = [], [], [x]
    while todo:
        made = todo.pop().made
        if made is None:
            return [], [], "its input is an argument of the function"
        if made.name in PRODUCTS and any(map(is_tracked, made.operands)):
            products.append(made)
        elif made.name in ("add", "sub", "concatenate", *_MOVES):
            if any(map(is_tracked, made.operands)):
                adds.append(made)
            todo += [x for x in made.operands if not is_tracked(x)]
        else:
            return [], [], f"no layer is directly before it, but {made.label}"
    return products, adds, ""


def fold_batchnorm(fn: Callable[..., Any], params: Any, *args: Any, only: str | None = None) -> Any:
    r"""Folds batch normalization of inference into the convolution or dense layer before it.

    A norm with running mean :math:`\mu` and variance :math:`\sigma^2`, scale :math:`\gamma` and
    bias :math:`\beta` after a layer :math:`W * x + b` is the layer

    .. math:: W' = W \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
              b' = (b - \mu) \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta

    so that what is quantized later is what is computed. ``fn`` still has the norm, which becomes
    the identity: mean 0, variance :math:`1 - \epsilon`, scale 1. Where the layer has a bias it
    takes :math:`b'` and the norm's becomes 0; where it has none the norm's takes it (a norm
    without bias: the mean, negated). :math:`\epsilon` is read from the program.

    Args:
      fn: function of `(params, ...)`, in inference mode.
      params: dense parameters and statistics together: linen's ``variables``, an nnx state, a
        dict.
      *args: other arguments, for shapes and for the check that ``fn`` returns the same.
      only: regular expression on paths; norms with a parameter that matches are folded, and
        have to be. Default: all that can be; :func:`batchnorms` lists the others.

    Returns:
      New parameters: ``fn`` of them is what it was.

    Raises:
      TypeError: if a parameter is compressed, or under a JAX transformation.
      ValueError: if there is no norm, or one of ``only``, or none that can be folded, or if a
        parameter holds NaN or Inf or a variance is negative.
      RuntimeError: if ``fn`` of the result is something else, beyond rounding.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> def fn(p, x):
      ...     return (x @ p["w"] - p["mean"]) * (jax.lax.rsqrt(p["var"] + 0.25) * p["g"]) + p["b"]
      >>> params = {"w": jnp.eye(1), "mean": jnp.ones(1), "var": jnp.full(1, 3.75)}
      >>> params |= {"g": jnp.full(1, 6.0), "b": jnp.zeros(1)}
      >>> new = jom.quant.fold_batchnorm(fn, params, jnp.ones(1))
      >>> {k: float(v.squeeze()) for k, v in new.items()}
      {'b': -3.0, 'g': 1.0, 'mean': 0.0, 'var': 0.75, 'w': 3.0}

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference <https://arxiv.org/abs/1712.05877>`_, 2018
    """
    who = "fold_batchnorm"
    t = traced(fn, params, args, who)
    chosen = _chosen(foldings(t), only, name_of(fn))
    members = [m.path for f in chosen if f.chain for m in f.chain.members]
    check_finite(t, [*members, *(p for f in chosen for p in f.norm.paths)], who)
    new: dict[str, np.ndarray] = {}
    for f in chosen:
        new |= _folded(f, t.values | new)
    return finished(t, new, who)


def _chosen(found: list[Folding], only: str | None, name: str) -> list[Folding]:
    if not found:
        raise ValueError(
            f"fold_batchnorm: {name} has no normalization by running statistics; is it in "
            "inference mode, and do params hold the statistics (the whole linen variables)?"
        )
    if only is not None:
        wanted = pattern(only, "fold_batchnorm: only")
        found = [f for f in found if any(map(wanted.fullmatch, f.norm.paths))]
        if not found:
            raise ValueError(f"fold_batchnorm: only={only!r} matches no parameter of a norm")
    fit = [f for f in found if not f.why]
    if not fit or (only is not None and len(fit) < len(found)):
        reasons = "; ".join(f"{f.norm.var}: {f.why}" for f in found if f.why)
        raise ValueError(f"fold_batchnorm: {name} has norms that cannot be folded: {reasons}")
    return fit


def _folded(f: Folding, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the new values of the parameters of one norm and its layers."""
    n, chain = f.norm, f.chain
    assert chain is not None and f.number is not None
    factor = n.factor(values).reshape(f.number.shape)
    if not np.isfinite(factor).all():
        raise ValueError(
            f"fold_batchnorm: {n.var} holds {np.min(values[n.var]):.3g}, a variance that with "
            f"epsilon {n.eps:.3g} is not positive; check the running statistics"
        )
    scale = np.empty(chain.channels)
    scale[f.number] = factor
    mean = np.asarray(values[n.mean], np.float64)
    shift = -mean * factor.reshape(mean.shape)
    for b in n.biases:
        shift = shift + np.asarray(values[b], np.float64)
    new = chain.scaled(values, scale)
    new |= {p: np.ones(np.shape(values[p])) for p in n.scales}
    new[n.var] = _unit(n, values | new)
    zero = np.zeros(mean.shape)
    if f.straight:
        each = np.empty(chain.channels)
        each[f.number] = shift.reshape(f.number.shape)
        [bias] = [m for m in chain.members if m.path == f.biases[0]]
        new[bias.path] = new[bias.path] + each[bias.index].reshape(new[bias.path].shape)
    new[n.mean] = zero if f.straight or n.biases else -shift
    new |= dict.fromkeys(n.biases, zero if f.straight else shift)
    return new


def _unit(n: Norm, values: dict[str, Any]) -> np.ndarray:
    """Returns the variance of which the root with epsilon is one, exactly where it can be."""
    old = values[n.var]
    guess = np.asarray(1.0 - n.eps, old.dtype)
    tried = []
    for steps in (0, 1, -1, 2, -2):
        new = np.full(old.shape, guess + steps * np.spacing(guess))
        known = {p: np.ones(np.shape(values[p]), old.dtype) for p in n.scales}
        off = np.max(np.abs(n.factor(known | {n.var: new}) - 1.0))
        tried.append((off, abs(steps), new))
    return min(tried, key=lambda t: t[:2])[2]


def batchnorms(fn: Callable[..., Any], params: Any, *args: Any) -> Table:
    """Lists every batch normalization of a function, and what it can be folded into.

    Args:
      fn: function of `(params, ...)`, in inference mode.
      params: its dense parameters and statistics.
      *args: its other arguments.

    Returns:
      A row for each: paths of mean, variance, scale and bias, epsilon, the kernels and biases of
      the layers before it, or why it cannot be folded.

    Raises:
      TypeError: if a parameter is compressed, or under a JAX transformation.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: (jnp.tanh(x @ p["w"]) - p["m"]) / jnp.sqrt(p["v"] + 1e-3)
      >>> params = {"w": jnp.eye(2), "m": jnp.ones(2), "v": jnp.ones(2)}
      >>> [row] = jom.quant.batchnorms(fn, params, jnp.ones(2))
      >>> row["mean"], row["epsilon"], row["note"]
      ('m', 0.001, 'no layer is directly before it, but tanh')
    """
    rows = []
    for f in foldings(traced(fn, params, args, "batchnorms")):
        n = f.norm
        parts = (", ".join(n.scales), ", ".join(n.biases))
        into = ", ".join((*f.layers, *f.biases))
        rows.append((n.mean, n.var, *parts, float(f"{n.eps:.7g}"), into, f.why))
    columns = ("mean", "variance", "scale", "bias", "epsilon", "into", "note")
    return Table(columns, rows, title=f"batch normalization of {name_of(fn)}")
