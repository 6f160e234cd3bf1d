"""What encoders have in common that choose codes by what the inputs of a layer look like."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._axes import Axes, Matrix
from .._bits import wide_dtype
from .._divided import on_outputs
from .._encoded import Encoded
from .._encoder import Encoder
from .._options import number
from ..codebook._kmeans import KMeans
from ._centroids import Centroids
from ._format import Format
from ._rows import check_gram, join_columns, split_columns, with_squares


@dataclasses.dataclass(frozen=True)
class Solver(Encoder):
    """An encoder that chooses the codes of a format by the gram of the inputs.

    A subclass defines :meth:`solve` for one matrix and its gram. Grouped convolutions, whose
    outputs see different inputs, are taken apart here.

    Args:
      fmt: any :class:`Format`, or :class:`jaxopt_models.codebook.KMeans`.
      damp: what is added to the diagonal of the gram, as a part of its mean.
    """

    fmt: Format | KMeans
    _: dataclasses.KW_ONLY
    damp: float = 0.01

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.fmt, (Format, KMeans)):
            raise TypeError(
                f"{name}: fmt={self.fmt!r} is no format; give one such as quant.Int(bits=4), or "
                "codebook.KMeans(bits=4)"
            )
        if isinstance(self.fmt, KMeans) and self.fmt.start == "random":
            raise ValueError(f"{name}: {self.fmt!r} draws its start; use 'linear' or 'density'")
        object.__setattr__(self, "damp", number(self.damp, f"{name}: damp"))
        if self.damp < 0:
            raise ValueError(f"{name}: damp={self.damp} must not be negative")

    @property
    def format(self) -> Format:
        """The grid."""
        return Centroids.of(self.fmt) if isinstance(self.fmt, KMeans) else self.fmt

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The gram, which ``l2`` is the diagonal of, and what the observer wants else."""
        return ("gram", *(n for n in self.format.needs if n != "l2"))

    def solve(
        self, gram: jax.Array, w: jax.Array, grid: Any, keep: Any, weight: Any
    ) -> tuple[jax.Array, Any]:
        """Chooses codes of one matrix.

        Args:
          gram: `[rows, rows]`.
          w: `[rows, columns]`.
          grid: grids, arrays `[groups, columns]`, or `[groups, 1]` for all columns.
          keep: booleans `[rows, columns]`, or ``None``.
          weight: importance of the entries for the observer, `[rows, columns]`, or ``None``.

        Returns:
          Codes, `int32` `[rows, columns]`, and their grids, ``None`` if as given.
        """
        raise NotImplementedError

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Checks the statistics, and encodes."""
        check_gram(stats, axes, w.shape, type(self).__name__)
        return super().run(w, axes, keep, stats, key)

    def partition(self, spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """Divides the outputs, each of which needs all of its inputs."""
        return on_outputs(spec, shape, axes)

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Encodes one core tensor: grids first, then codes for each group of outputs."""
        fmt, true = self.format, Matrix(tuple(w.shape), axes.out)
        m = fmt.matrix(w, axes)
        outputs = Outputs(stats.groups, true)
        gram = outputs.grams(stats.states["gram"])
        x = true.view(w.astype(wide_dtype(w.dtype)))
        if "drift" in stats.states:
            drift = outputs.grams(stats.states["drift"])
            moved = functools.partial(corrected, damp=self.damp)
            x = outputs.join(outputs.each(moved, outputs.split(x), gram, drift)).astype(x.dtype)
        # Observers that weigh errors ask for norms of inputs.
        weight = fmt.weights(with_squares(stats), keep, m, axes)
        grid = fmt.fit(fmt.runs(m.view(true.unview(x)), m), weight)
        if weight is not None:
            weight = true.view(m.unview(weight.reshape(m.rows, m.columns)))
        kept = None if keep is None else true.view(keep)
        parts = jax.tree.map(outputs.split, (x, grid, kept, weight))
        codes, grids = outputs.each(self.solve, gram, *parts)
        codes = m.view(true.unview(outputs.join(codes)))
        if grids is not None:
            grid = jax.tree.map(outputs.join, grids)
        return fmt.pack(codes, grid, m, w.dtype)


class Outputs:
    """Columns sorted by the inputs they see.

    Args:
      groups: `(axis of the core, count)` for axes along which inputs differ.
      m: the view of the core tensor.
    """

    def __init__(self, groups: tuple[tuple[int, int], ...], m: Matrix):
        self.groups, self.m = groups, m
        self.n = math.prod(count for _, count in groups)

    def grams(self, gram: jax.Array) -> jax.Array:
        """Brings `[*groups, rows, rows]` into the order of the columns: `[n, rows, rows]`."""
        order = sorted(range(len(self.groups)), key=lambda i: self.groups[i][0])
        k = len(order)
        return gram.transpose(*order, k, k + 1).reshape(self.n, *gram.shape[k:])

    def each(self, f: Callable[..., Any], *args: Any) -> Any:
        """Applies a function to each group of columns, all arrays with a leading axis of these."""
        if self.n > 1:
            return jax.vmap(f)(*args)
        # Loops that are mapped take a third longer to compile.
        return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], args)))

    def split(self, x: jax.Array) -> jax.Array:
        """Sorts `[a, columns, ...]`, or `[a, 1, ...]` for all, to `[n, a, columns / n, ...]`."""
        if x.shape[1] != self.m.columns:
            return jnp.broadcast_to(x, (self.n, *x.shape))
        sort = functools.partial(split_columns, groups=self.groups, m=self.m)
        for _ in x.shape[2:]:
            sort = jax.vmap(sort, in_axes=-1, out_axes=-1)
        return sort(x)

    def join(self, x: jax.Array) -> jax.Array:
        """Undoes :meth:`split`: `[a, columns, ...]`."""
        sort = functools.partial(join_columns, groups=self.groups, m=self.m)
        for _ in x.shape[3:]:
            sort = jax.vmap(sort, in_axes=-1, out_axes=-1)
        return sort(x)


def factor(gram: jax.Array, damp: float) -> jax.Array:
    r"""Returns the lower Cholesky factor of a damped gram.

    .. math:: L L^\top = H + 10^k \lambda \, \mathrm{mean}(\mathrm{diag} H) I

    with the least `k` for which there is one. Inputs that were always zero do not count in the
    mean, and get that on the diagonal: they concern no other input.

    Args:
      gram: `[rows, rows]`, symmetric.
      damp: the part :math:`\lambda` of the mean.

    Returns:
      Lower triangular, `[rows, rows]`; NaN if that was not enough.
    """
    squares = jnp.diagonal(gram)
    live = squares > 0
    mean = jnp.sum(jnp.where(live, squares, 0)) / jnp.maximum(jnp.sum(live), 1)
    mean = jnp.where(mean > 0, mean, 1)

    def attempt(part: jax.Array) -> jax.Array:
        added = jnp.where(live, part * mean, mean)
        return lax.linalg.cholesky(gram + jnp.diag(added), symmetrize_input=False)

    def again(state: Any) -> Any:
        k, _, part = state
        part = 10 * jnp.maximum(part, 1e-6).astype(gram.dtype)
        return k + 1, attempt(part), part

    def failed(state: Any) -> jax.Array:
        k, low, _ = state
        return (k < _ATTEMPTS) & ~jnp.all(jnp.isfinite(low))

    first = jnp.asarray(damp, gram.dtype)
    return lax.while_loop(failed, again, (0, attempt(first), first))[1]


# With ten million times the mean on the diagonal any gram of so many rows is positive definite.
_ATTEMPTS = 13


def output_error(miss: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Returns the squared error of each output, :math:`d^\top H d`, over the samples of a gram.

    Args:
      miss: errors of weights, `[rows, columns]`.
      gram: `[rows, rows]`.

    Returns:
      `[columns]`.
    """
    miss = miss.astype(gram.dtype)
    seen = jnp.matmul(gram, miss, precision=lax.Precision.HIGHEST)
    # As a product: XLA on a CPU goes down each column in a sum, ten times slower.
    ones = jnp.ones((1, len(miss)), miss.dtype)
    return jnp.matmul(ones, miss * seen, precision=lax.Precision.HIGHEST)[0]


def corrected(w: jax.Array, gram: jax.Array, drift: jax.Array, damp: float) -> jax.Array:
    r"""Returns the weights that on changed inputs give most nearly the outputs of before.

    .. math:: W + (\tilde X^\top \tilde X + \lambda I)^{-1} \tilde X^\top (X - \tilde X) W
              = \arg\min_V \, \lVert \tilde X V - X W \rVert^2 + \lambda \lVert V - W \rVert^2

    Args:
      w: `[rows, columns]`.
      gram: :math:`\tilde X^\top \tilde X` of the changed inputs, `[rows, rows]`.
      drift: :math:`\tilde X^\top (X - \tilde X)`, `[rows, rows]`.
      damp: see :func:`factor`.

    Returns:
      `[rows, columns]`.
    """
    w = w.astype(gram.dtype)
    missing = jnp.matmul(drift, w, precision=lax.Precision.HIGHEST)
    return w + jax.scipy.linalg.cho_solve((factor(gram, damp), True), missing)


def nearest_where_better(
    w: jax.Array,
    gram: jax.Array,
    fmt: Format,
    grid: Any,
    found: tuple[jax.Array, Any],
    keep: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Returns codes and grids that were found, or the nearest codes in columns they suit better.

    Args:
      w: `[rows, columns]`.
      gram: `[rows, rows]`.
      fmt: the format.
      grid: grids for the nearest, as for :meth:`Solver.solve`.
      found: codes, and their grids, ``None`` for ``grid``.
      keep: booleans `[rows, columns]`, or ``None``.

    Returns:
      Codes and grids, ``None`` for ``grid``.
    """
    groups = len(jax.tree.leaves(grid)[0])
    cut = (groups, len(w) // groups, w.shape[1])
    x = w if keep is None else jnp.where(keep, w, 0)
    near = fmt.codes(x.reshape(cut), jax.tree.map(lambda a: a[:, None], grid)).reshape(w.shape)

    def error(codes: jax.Array, grid: Any) -> jax.Array:
        values = fmt.values(codes.reshape(cut), jax.tree.map(lambda a: a[:, None], grid))
        values = values.reshape(w.shape)
        values = values if keep is None else jnp.where(keep, values, 0)
        return output_error(w - values, gram)

    codes, grids = found
    better = error(near, grid) < error(codes, grid if grids is None else grids)

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(1, -1, *[1] * (a.ndim - 2)), a, b)

    return chosen(near, codes), None if grids is None else jax.tree.map(chosen, grid, grids)
