"""Channels of the residual stream and of attention heads rotated, inside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._call import name_of
from .._compress import check_key
from .._graph import (
    SPACE_RULES,
    Chain,
    Links,
    Space,
    Spaces,
    Traced,
    check_finite,
    finished,
    traced,
)
from .._options import pattern
from .._table import Table
from ._rotated import block_of, paley

# Scales this small, beside the largest of their norm, are not divided by.
_TINY = 1e-4


def rotate(
    fn: Callable[..., Any], params: Any, *args: Any, key: jax.Array, only: str | None = None
) -> Any:
    r"""Turns channels by random orthogonal matrices that cancel, so that no channel stands out.

    What makes a vector `x` of channels is multiplied with an orthogonal :math:`Q`, what reads it
    with its transpose, :math:`x W = (x Q)(Q^\top W)`. `Q` is a randomised Hadamard matrix, so each
    new channel is a sum of all old ones, outliers are spread over them, and grids of a whole
    tensor or a row fit better. This holds for all vectors between which there are only linear
    operations and norms: the residual stream of a model that normalizes before its layers; the
    values of attention, each head by itself; queries and keys that only meet each other.

    The scale of a norm is moved into the kernels that read it first, as
    :math:`\mathrm{norm}(x Q) = \mathrm{norm}(x) \, Q` only without. A layer norm also subtracts
    the mean: there `Q` keeps the vector of ones. ``fn`` does not change, so what it does with
    single channels (gates, GELU, what is returned) is not rotated; :func:`rotations` lists it.

    Args:
      fn: function of `(params, ...)`.
      params: its dense parameters.
      *args: other arguments, for shapes and for the check that ``fn`` returns the same.
      key: random key.
      only: regular expression on paths; vectors with a parameter that matches are rotated, and
        have to be. Default: all that can be.

    Returns:
      New parameters: ``fn`` of them is what it was.

    Raises:
      TypeError: if a parameter is compressed, or under a JAX transformation, or for a key that is
        none.
      ValueError: if vectors of ``only`` cannot be rotated, or none can, or a parameter of them
        holds NaN or Inf.
      RuntimeError: if ``fn`` of the result is something else, beyond rounding.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: (x @ p["a"] + p["b"]) @ p["c"]
      >>> params = {"a": jnp.eye(4), "b": jnp.array([9.0, 0, 0, 0]), "c": jnp.eye(4)}
      >>> new = jom.quant.rotate(fn, params, jnp.ones(4), key=jax.random.key(0))
      >>> jnp.abs(new["b"])
      Array([4.5, 4.5, 4.5, 4.5], dtype=float32)

    References:
      Ashkboos et al., `QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs
      <https://arxiv.org/abs/2404.00456>`_, 2024
      Liu et al., `SpinQuant: LLM Quantization with Learned Rotations
      <https://arxiv.org/abs/2405.16406>`_, 2024
    """
    check_key(key, "rotate")
    if key is None:
        raise TypeError("rotate: key=None is no random key; give jax.random.key(0)")
    t = traced(fn, params, args, "rotate")
    found = turning(t)
    chosen = _chosen(found, only, name_of(fn))
    check_finite(t, (path for v in chosen for path, _ in v.members), "rotate")
    new: dict[str, np.ndarray] = {}
    for path in dict.fromkeys(p for v in chosen for p in sorted(v.space.needs)):
        new |= _absorbed(found.scales[path], path, t.values | new)
    for i, vectors in enumerate(found.vectors):
        if vectors in chosen:
            q = orthogonal(vectors.space.block, jax.random.fold_in(key, i), ones=vectors.space.ones)
            for path, axes in vectors.members:
                w = new.get(path, np.asarray(t.values[path], np.float64))
                new[path] = _turned(w, axes, q)
    return finished(t, new, "rotate")


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """Parameters that are turned by one matrix, each along some axes."""

    space: Space
    members: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Turning:
    """All vectors of a program, and the scales of norms that kernels can take over."""

    vectors: list[Vectors]
    scales: dict[str, Chain]


def turning(t: Traced) -> Turning:
    """Finds what can be rotated, and what cannot."""
    links = Links(t)
    scales = {}
    for chain in links.chains:
        made = chain.producers
        if len(made) == 1 and made[0].kind == "scaled" and chain.consumers:
            g = np.abs(np.asarray(t.values[made[0].path], np.float64) + made[0].shift)
            if made[0].index.min() >= 0 and g.size == chain.channels and g.min() > _TINY * g.max():
                scales[made[0].path] = chain
    spaces = Spaces(t.graph, SPACE_RULES, links.flow, set(scales))
    members: dict[Space, dict[tuple[str, tuple[int, ...]], None]] = {}
    for path, uses in spaces.uses.items():
        for use in uses:
            for axes, space in sorted(use, key=lambda role: role[0]):
                members.setdefault(space.root, {})[path, axes] = None
    found = [Vectors(s, tuple(m)) for s, m in members.items()]
    return Turning([v for v in found if v.space.size > 1], scales)


def _chosen(found: Turning, only: str | None, name: str) -> list[Vectors]:
    vectors = found.vectors
    if only is not None:
        matches = pattern(only, "rotate: only").fullmatch
        vectors = [v for v in vectors if any(matches(path) for path, _ in v.members)]
        if not vectors:
            raise ValueError(f"rotate: only={only!r} matches no parameter that makes or reads them")
    fit = [v for v in vectors if not _why(v)]
    if not fit or (only is not None and len(fit) < len(vectors)):
        reasons = "; ".join(f"{v.members[0][0]}: {_why(v)}" for v in vectors if _why(v))
        raise ValueError(f"rotate: {name} has vectors that cannot be rotated: {reasons}")
    return fit


def _why(v: Vectors) -> str:
    least = 3 if v.space.ones else 2
    small = f"its runs of {v.space.block} channels are too short" if v.space.block < least else ""
    return v.space.why or small


def _absorbed(chain: Chain, path: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Moves the scale of a norm into what reads it."""
    [scale] = [m for m in chain.producers if m.path == path]
    factors = np.empty(chain.channels)
    g = np.asarray(values[path], np.float64) + scale.shift
    factors[scale.index.ravel()] = 1 / g.transpose(scale.axes).ravel()
    return chain.scaled(values, factors)


def _turned(w: np.ndarray, axes: tuple[int, ...], q: np.ndarray) -> np.ndarray:
    """Multiplies runs of the channels along axes with a matrix from the right."""
    moved = np.moveaxis(w, axes, range(w.ndim - len(axes), w.ndim))
    turned = (moved.reshape(-1, len(q)) @ q).reshape(moved.shape)
    return np.moveaxis(turned, range(w.ndim - len(axes), w.ndim), axes)


def orthogonal(n: int, key: jax.Array, *, ones: bool) -> np.ndarray:
    """Returns a random orthogonal matrix in which all entries are about as large.

    Args:
      n: its order.
      key: random key.
      ones: whether it keeps the vector of ones.
    """
    signs, mix = jax.random.split(key)
    power, order = block_of(n)
    block = power * order
    h = paley(order) if order > 1 else np.ones((1, 1))
    while len(h) < block:
        h = np.kron([[1, 1], [1, -1]], h)
    # Blocks that Hadamard matrices do not fill are mixed by a matrix that is random.
    r, triangle = np.linalg.qr(np.asarray(jax.random.normal(mix, (n // block,) * 2), np.float64))
    flips = np.asarray(jax.random.rademacher(signs, (n, 1)), np.float64)
    q = flips * np.kron(r * np.sign(np.diag(triangle)), h) * block**-0.5
    if not ones:
        return q
    # A reflection takes the image of the vector of ones back to where it was.
    v = np.ones(n) @ q / n**0.5 - n**-0.5
    length = v @ v
    return q if length < 1e-20 else q - np.outer(q @ v, v) * (2 / length)


def rotations(fn: Callable[..., Any], params: Any, *args: Any) -> Table:
    """Lists the vectors of channels in a function, and which of them :func:`rotate` turns.

    Args:
      fn: function of `(params, ...)`.
      params: its dense parameters.
      *args: its other arguments.

    Returns:
      A row for the channels of each layer, those that are added up together: the parameters that
      make or read them, how many there are, the order of the matrix (of one head, say), whether it
      keeps the vector of ones, the scales that move into kernels, or why they are not turned.

    Raises:
      TypeError: if a parameter is compressed, or under a JAX transformation.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"] @ p["b"]) @ p["c"]
      >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3)), "c": jnp.ones((3, 2))}
      >>> table = jom.quant.rotations(fn, params, jnp.ones((1, 2)))
      >>> [(row["parameters"], row["order"], row["note"]) for row in table][:2]
      [('a, b', 4, ''), ('b', None, 'it goes through tanh')]
    """
    t = traced(fn, params, args, "rotations")
    rows = []
    for v in turning(t).vectors:
        why, s = _why(v), v.space
        paths = ", ".join(dict.fromkeys(path for path, _ in v.members))
        how = (None, None, "") if why else (s.block, s.ones, ", ".join(sorted(s.needs)))
        rows.append((paths, s.size, *how, why))
    columns = ("parameters", "channels", "order", "keeps ones", "scales", "note")
    return Table(columns, rows, title=f"rotations of {name_of(fn)}")
