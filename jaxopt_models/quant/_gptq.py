"""GPTQ: rounds the inputs of a layer one after another, each making up for those before it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from .._options import flag, whole
from ._format import Format
from ._rows import check_matrix
from ._solver import Solver, factor, nearest_where_better

Order = Literal["activation"] | None


@dataclasses.dataclass(frozen=True)
class GPTQ(Solver):
    r"""Rounds a tensor so that its product with the calibration inputs changes least.

    .. math:: \min_q \, \mathrm{tr} \, (W - q)^\top H (W - q), \qquad H = X^\top X,

    where :math:`W` is the `[in, out]` view of the tensor and :math:`q` takes values on the grid of
    ``fmt``. The rows of :math:`W` are rounded one after another; each is first moved to where it
    makes up best for the errors of those before it (see :func:`gptq`). The grids are chosen once,
    from the tensor itself, by the observer of ``fmt``; one that weighs errors takes the diagonal
    of :math:`H`.

    No order of rounding is best for every tensor: where the greedy result of a column has a larger
    :math:`(w - q)^\top H (w - q)` than rounding to the nearest on the same grid, the column is
    rounded to the nearest, so the error is never above it. On other inputs than those of the
    calibration it may be.

    An input that was zero in every sample leaves its weights free; they are rounded to the
    nearest (the paper sets them to zero), so that nothing is lost where later data do use it.
    Entries pruned before stay zero and their error is made up for, too. Encoding again may change
    values: no weight need be left at the end of its grid, which is then chosen smaller.

    Args:
      fmt: the grid: any :class:`Format`, or :class:`jaxopt_models.codebook.KMeans`.
      damp: what is added to the diagonal of :math:`H`, as a part of its mean; ten times more,
        repeatedly, where :math:`H` is still not positive definite.
      order: ``"activation"`` rounds the inputs of the largest square first, ``None`` keeps their
        order.
      regroup: choose the grid of a group anew from the moved weights, when its turn comes; needs
        ``order=None`` and a format with groups.

    Raises:
      TypeError: if ``fmt`` is no format.
      ValueError: for options out of range; when called, without the statistic ``gram``, if that
        holds NaN or Inf, or if it is of other axes than the rule says.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> kx, kw, kf = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(kx, (256, 8)) @ jax.random.normal(kf, (8, 32))
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jax.random.normal(kw, (32, 16))}
      >>> recipe = [jom.Rule("w", jom.quant.GPTQ(jom.quant.Int(bits=3)))]
      >>> small = jom.compress(params, recipe, stats=jom.calibrate(fn, params, [(x,)], recipe))
      >>> nearest = jom.compress(params, [jom.Rule("w", jom.quant.Int(bits=3))])
      >>> error = lambda p: jnp.mean((fn(jom.materialize(p), x) - fn(params, x)) ** 2)
      >>> bool(error(small) < error(nearest) / 2)
      True

    References:
      Frantar et al., `GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
      Transformers <https://arxiv.org/abs/2210.17323>`_, 2023
    """

    _: dataclasses.KW_ONLY
    order: Order = "activation"
    regroup: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("activation", None):
            raise ValueError(f"GPTQ: order={self.order!r} is neither 'activation' nor None")
        if not flag(self.regroup, "GPTQ: regroup"):
            return
        if self.order is not None:
            raise ValueError("GPTQ: regroup=True needs order=None: groups are done one by one")
        grids = self.format
        if grids.group is None or grids.block > 1 or isinstance(grids.scale, Format):
            raise ValueError(
                f"GPTQ: regroup=True needs groups of one output with scales of their own, such as "
                f"Int(bits=4, group=64); not {self.fmt!r}"
            )

    def solve(
        self, gram: jax.Array, w: jax.Array, grid: Any, keep: Any, weight: Any
    ) -> tuple[jax.Array, Any]:
        """Rounds `[rows, columns]`; see :func:`gptq`."""
        options = {"damp": self.damp, "order": self.order, "regroup": self.regroup}
        codes, new = gptq(w, gram, self.format, grid, keep=keep, weight=weight, **options)
        found = codes, new if self.regroup else None
        return nearest_where_better(w, gram, self.format, grid, found, keep)


def gptq(
    w: jax.Array,
    gram: jax.Array,
    fmt: Format,
    grid: Any,
    *,
    damp: float = 0.01,
    order: Order = "activation",
    block: int = 128,
    keep: jax.Array | None = None,
    regroup: bool = False,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    r"""Rounds the rows of a matrix one after another, each making up for those before it.

    With :math:`P H P^\top + \lambda I = L L^\top`, the order of rows reversed by :math:`P`, and
    :math:`d = w - q`, the error is :math:`\lVert L^\top d \rVert^2`, a sum with a term for each
    row that knows only the rows rounded before it. From the last row to the first,

    .. math:: q_i = \mathrm{round} \Bigl( w_i + \tfrac{1}{L_{ii}} \sum_{j > i} L_{ji} d_j \Bigr)

    which gives the values of the paper, whose loop moves all rows ahead by the rows of a Cholesky
    factor of :math:`H^{-1}`, with one Cholesky factor and no inverse. Sums over the rows of
    earlier blocks are taken for a whole block at once.

    Args:
      w: `[rows, columns]`.
      gram: `[rows, rows]`, symmetric, finite.
      fmt: the format.
      grid: its grids, arrays `[groups, columns]`, or `[groups, 1]` for all columns.
      damp: see :class:`GPTQ`.
      order: see :class:`GPTQ`.
      block: number of rows in a block.
      keep: booleans `[rows, columns]`; a value that is dropped becomes zero.
      regroup: see :class:`GPTQ`.
      weight: importance of the entries `[rows, columns]` for the observer, where it chooses anew.

    Returns:
      Codes, `int32` `[rows, columns]`, and the grids they are of.

    Raises:
      TypeError: if ``block`` is no whole number.
      ValueError: if the gram has another shape, or holds NaN or Inf, or ``block`` is below one.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w, gram, fmt = jnp.array([[0.3], [0.4], [7.0]]), jnp.ones((3, 3)), quant.Int(bits=4)
      >>> codes, _ = quant.gptq(w, gram, fmt, fmt.fit(w[None]), order=None)
      >>> codes.ravel()      # the nearest are 0, 0, 7: a sum of 7 in place of 7.7
      Array([0, 1, 7], dtype=int32)
    """
    check_matrix(w, gram, "gptq")
    block = whole(block, "gptq: block", least=1)
    options = {"damp": damp, "order": order, "block": block, "regroup": regroup}
    return _gptq(w, gram, fmt, grid, keep=keep, weight=weight, **options)


@functools.partial(jax.jit, static_argnames=("fmt", "damp", "order", "block", "regroup"))
def _gptq(
    w: jax.Array,
    gram: jax.Array,
    fmt: Format,
    grid: Any,
    *,
    damp: float,
    order: Order,
    block: int,
    keep: jax.Array | None,
    regroup: bool,
    weight: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Does what :func:`gptq` says."""
    rows, columns = w.shape
    groups = len(jax.tree.leaves(grid)[0])
    run = rows // groups
    real = jnp.promote_types(w.dtype, gram.dtype)
    if regroup:
        size = next(b for b in range(min(run, block), 0, -1) if run % b == 0)
    else:
        size = -(-rows // -(-rows // block))
    pad = -rows % size
    last_first = jnp.argsort(-jnp.diagonal(gram))[::-1] if order else jnp.arange(rows)[::-1]
    low = factor(gram.astype(real)[last_first][:, last_first], damp)
    # Rows of zeros with a unit diagonal come last, and concern no other.
    low = jnp.pad(low, ((pad, 0), (pad, 0))) + jnp.diag(jnp.arange(rows + pad) < pad).astype(real)
    place = jnp.pad(last_first, (pad, 0))
    group_of = place // run
    ordered = jnp.pad(w[last_first].astype(real), ((pad, 0), (0, 0)))
    kept = None if keep is None else keep[place]

    def one_row(i: jax.Array, state: Any, start: jax.Array, grid: Any, due: Any, tri: Any) -> Any:
        i = size - 1 - i
        miss, codes = state
        own = jax.tree.map(lambda a: a[group_of[start + i]], grid)
        moved = ordered[start + i] + (due[i] + _row(tri[:, i], miss)) / tri[i, i]
        here = None if kept is None else kept[start + i]
        moved = (moved if here is None else jnp.where(here, moved, 0)).astype(w.dtype)
        code = fmt.codes(moved, own)
        value = fmt.values(code, own).astype(real)
        value = value if here is None else jnp.where(here, value, 0)
        return miss.at[i].set(ordered[start + i] - value), codes.at[i].set(code)

    def one_block(k: jax.Array, state: Any) -> Any:
        miss, codes, grid = state
        start = rows + pad - (k + 1) * size
        if regroup:
            grid = lax.cond(k * size % run == 0, refit, lambda _, __, g: g, k, miss, grid)
        part = lax.dynamic_slice_in_dim(low, start, size, axis=1)
        due = _products(part, miss)
        tri = lax.dynamic_slice_in_dim(part, start, size)
        own = jnp.zeros((size, columns), real), jnp.zeros((size, columns), jnp.int32)
        own = lax.fori_loop(0, size, lambda i, s: one_row(i, s, start, grid, due, tri), own)
        miss, codes = (
            lax.dynamic_update_slice_in_dim(a, b, start, axis=0)
            for a, b in zip((miss, codes), own, strict=True)
        )
        return miss, codes, grid

    def refit(k: jax.Array, miss: jax.Array, grid: Any) -> Any:
        at, start = k * size // run, rows - k * size - run
        part = lax.dynamic_slice_in_dim(low, start, run, axis=1)
        tri = lax.dynamic_slice_in_dim(part, start, run)
        best = lax.linalg.triangular_solve(
            tri, _products(part, miss), left_side=True, lower=True, transpose_a=True
        )
        x = lax.dynamic_slice_in_dim(ordered, start, run) + best
        own = weight
        if own is not None:
            own = lax.dynamic_slice_in_dim(own, at * run, run)[None]
        new = fmt.fit(x[::-1][None].astype(w.dtype), own)
        return jax.tree.map(lambda a, b: a.at[at].set(b[0]), grid, new)

    state = jnp.zeros((rows + pad, columns), real), jnp.zeros((rows + pad, columns), jnp.int32)
    _, codes, grid = lax.fori_loop(0, (rows + pad) // size, one_block, (*state, grid))
    return jnp.zeros_like(codes[pad:]).at[last_first].set(codes[pad:]), grid


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _row(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a[None], b, precision=lax.Precision.HIGHEST)[0]
