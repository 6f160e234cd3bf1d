"""AdaRound: learns for each weight whether it is rounded down or up."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._options import number, portion, whole
from ._format import Format
from ._rows import check_matrix
from ._solver import Solver, nearest_where_better, output_error

# The sigmoid is stretched to this range and cut to [0, 1], so that it gets to both ends.
_FROM, _TO = -0.1, 1.1
# Exponents of the regulariser: of the first, nearly all may move; of the last, none stays between.
_FIRST, _LAST = 20.0, 2.0


@dataclasses.dataclass(frozen=True)
class AdaRound(Solver):
    r"""Rounds each weight down or up, whichever together changes the outputs least.

    .. math:: \min_V \, \frac{\mathrm{tr} \, d^\top H d}{\mathrm{tr} \, d_0^\top H d_0}
              + \frac{\mu}{n} \sum_{i} \bigl( 1 - |2 h_i - 1|^\beta \bigr), \qquad
              d = W - (l + h \, (u - l)), \qquad
              h = \mathrm{clip}(1.2 \, \sigma(V) - 0.1, 0, 1)

    for each output, where :math:`H = X^\top X` is the gram of its inputs, :math:`n` their number,
    :math:`l` and :math:`u` the values of the grid around :math:`W`, and :math:`d_0` the error of
    rounding to the nearest. Adam minimises it from :math:`h` between the values where :math:`W`
    is, while :math:`\beta` falls from 20 to 2, which drives all :math:`h` to 0 or 1. At last each
    weight, in the order of the rows, changes sides where that alone lowers the error.

    An output that would have a larger error than by rounding to the nearest is rounded to the
    nearest. Inputs that no sample had are, too, and entries pruned before stay zero. A step costs
    one product of :math:`H` with the tensor. Encoding again may change values, as for
    :class:`GPTQ`, which is faster, and on most layers as good or better.

    Args:
      fmt: the grid: any :class:`Format`, or :class:`jaxopt_models.codebook.KMeans`.
      damp: see :class:`GPTQ`; only for the weights that :func:`sequential` corrects.
      steps: number of steps of Adam.
      rate: its step size.
      penalty: the weight :math:`\mu` of the regulariser.
      warm: part of the steps that is taken without it.

    Raises:
      TypeError: for options of another type.
      ValueError: for options out of range, and, when called, for what :class:`GPTQ` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> kx, kw, kf = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(kx, (256, 8)) @ jax.random.normal(kf, (8, 32))
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jax.random.normal(kw, (32, 16))}
      >>> recipe = [jom.Rule("w", jom.quant.AdaRound(jom.quant.Int(bits=3)))]
      >>> small = jom.compress(params, recipe, stats=jom.calibrate(fn, params, [(x,)], recipe))
      >>> nearest = jom.compress(params, [jom.Rule("w", jom.quant.Int(bits=3))])
      >>> error = lambda p: jnp.mean((fn(jom.materialize(p), x) - fn(params, x)) ** 2)
      >>> bool(error(small) < error(nearest) / 2)
      True

    References:
      Nagel et al., `Up or Down? Adaptive Rounding for Post-Training Quantization
      <https://arxiv.org/abs/2004.10568>`_, 2020
    """

    _: dataclasses.KW_ONLY
    steps: int = 2000
    rate: float = 0.03
    penalty: float = 30.0
    warm: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", whole(self.steps, "AdaRound: steps", least=1))
        object.__setattr__(self, "warm", portion(self.warm, "AdaRound: warm"))
        for name in ("rate", "penalty"):
            value = number(getattr(self, name), f"AdaRound: {name}")
            object.__setattr__(self, name, value)
            if value <= 0:
                raise ValueError(f"AdaRound: {name}={value!r} must be positive")

    def solve(
        self, gram: jax.Array, w: jax.Array, grid: Any, keep: Any, weight: Any
    ) -> tuple[jax.Array, Any]:
        """Rounds `[rows, columns]`; see :func:`adaround`."""
        options = {n: getattr(self, n) for n in ("steps", "rate", "penalty", "warm")}
        codes = adaround(w, gram, self.format, grid, keep=keep, **options)
        return nearest_where_better(w, gram, self.format, grid, (codes, None), keep)


def adaround(
    w: jax.Array,
    gram: jax.Array,
    fmt: Format,
    grid: Any,
    *,
    steps: int = 2000,
    rate: float = 0.03,
    penalty: float = 30.0,
    warm: float = 0.2,
    keep: jax.Array | None = None,
) -> jax.Array:
    """Learns whether each entry of a matrix is rounded down or up; see :class:`AdaRound`.

    Args:
      w: `[rows, columns]`.
      gram: `[rows, rows]`, symmetric, finite.
      fmt: the format.
      grid: its grids, arrays `[groups, columns]`, or `[groups, 1]` for all columns.
      steps: see :class:`AdaRound`.
      rate: see there.
      penalty: see there.
      warm: see there.
      keep: booleans `[rows, columns]`; a value that is dropped becomes zero.

    Returns:
      Codes, `int32` `[rows, columns]`.

    Raises:
      ValueError: if the gram has another shape, or holds NaN or Inf.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w, gram, fmt = jnp.array([[0.3], [0.4], [7.0]]), jnp.ones((3, 3)), quant.Int(bits=4)
      >>> quant.adaround(w, gram, fmt, fmt.fit(w[None])).sum()    # a sum of 8 in place of 7.7
      Array(8, dtype=int32)
    """
    check_matrix(w, gram, "adaround")
    options = {"steps": steps, "rate": rate, "penalty": penalty, "warm": warm}
    return _adaround(w, gram, fmt, grid, keep=keep, **options)


@functools.partial(jax.jit, static_argnames=("fmt", "steps", "rate", "penalty", "warm"))
def _adaround(
    w: jax.Array,
    gram: jax.Array,
    fmt: Format,
    grid: Any,
    *,
    steps: int,
    rate: float,
    penalty: float,
    warm: float,
    keep: jax.Array | None,
) -> jax.Array:
    """Does what :func:`adaround` says."""
    real = jnp.promote_types(w.dtype, gram.dtype)
    x, gram = w.astype(real), gram.astype(real)
    low, high, near = neighbours(w, fmt, grid)
    value = functools.partial(_value, fmt=fmt, grid=grid, keep=keep, dtype=real)
    bottom, step = value(low), value(high) - value(low)
    scale = output_error(x - value(near), gram)
    scale = jnp.where(scale > 0, scale, 1)[None]

    def share(v: jax.Array) -> jax.Array:
        return jnp.clip(jax.nn.sigmoid(v) * (_TO - _FROM) + _FROM, 0, 1)

    def update(i: jax.Array, state: Any) -> Any:
        v, mean, square = state
        h, pull = jax.vjp(share, v)
        seen = jnp.matmul(gram, x - (bottom + h * step), precision=lax.Precision.HIGHEST)
        cold = jnp.maximum(i / steps - warm, 0) / (1 - warm)
        beta = _FIRST + (_LAST - _FIRST) * cold
        between = jnp.sign(2 * h - 1) * jnp.abs(2 * h - 1) ** (beta - 1) * -2 * beta
        slope = jnp.where(cold > 0, penalty / len(w), 0) * between - 2 * seen * step / scale
        [g] = pull(slope.astype(real))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        size = jnp.sqrt(square / (1 - 0.999 ** (i + 1))) + 1e-12
        return v - rate * mean / (1 - 0.9 ** (i + 1)) / size, mean, square

    inside = jnp.clip((x - bottom) / jnp.where(step > 0, step, 1), 0, 1)
    ratio = (inside - _FROM) / (_TO - _FROM)
    state = jnp.log(ratio / (1 - ratio)), jnp.zeros_like(x), jnp.zeros_like(x)
    v, *_ = lax.fori_loop(0, steps, update, state)
    up = one_by_one(x - bottom, step, share(v) > 0.5, gram)
    return jnp.where(up, high, low)


def _value(codes: jax.Array, *, fmt: Format, grid: Any, keep: Any, dtype: Any) -> jax.Array:
    grid = jax.tree.map(lambda a: a[:, None], grid)
    cut = codes.reshape(len(jax.tree.leaves(grid)[0]), -1, codes.shape[1])
    found = fmt.values(cut, grid).reshape(codes.shape).astype(dtype)
    return found if keep is None else jnp.where(keep, found, 0)


def one_by_one(
    above: jax.Array, step: jax.Array, up: jax.Array, gram: jax.Array, *, block: int = 128
) -> jax.Array:
    """Changes the side of each entry, row by row, where that alone lowers the error.

    Args:
      above: how far the weights are above the lower values, `[rows, columns]`.
      step: how far the upper values are.
      up: booleans, the sides to begin with.
      gram: `[rows, rows]`.
      block: number of rows for which sums over all others are taken at once.

    Returns:
      Booleans, the new sides.
    """
    rows = len(above)
    size = -(-rows // -(-rows // block))
    pad = -rows % size
    above, step, up = (jnp.pad(a, ((0, pad), (0, 0))) for a in (above, step, up))
    gram = jnp.pad(gram, ((0, pad), (0, pad)))

    def one_block(k: jax.Array, state: Any) -> Any:
        miss, up = state
        start = k * size
        part = lax.dynamic_slice_in_dim(gram, start, size)
        seen = jnp.matmul(part, miss, precision=lax.Precision.HIGHEST)
        own = lax.dynamic_slice_in_dim(part, start, size, axis=1)
        steps = lax.dynamic_slice_in_dim(step, start, size)

        def one_row(i: jax.Array, state: Any) -> Any:
            change, up = state
            more = jnp.matmul(own[i][None], change, precision=lax.Precision.HIGHEST)[0]
            turn = jnp.where(up[i], steps[i], -steps[i])
            better = 2 * turn * (seen[i] + more) + turn * turn * own[i, i] < 0
            return change.at[i].set(jnp.where(better, turn, 0)), up.at[i].set(up[i] ^ better)

        sides = lax.dynamic_slice_in_dim(up, start, size)
        change, sides = lax.fori_loop(0, size, one_row, (jnp.zeros_like(steps), sides))
        before = lax.dynamic_slice_in_dim(miss, start, size)
        miss = lax.dynamic_update_slice_in_dim(miss, before + change, start, axis=0)
        return miss, lax.dynamic_update_slice_in_dim(up, sides, start, axis=0)

    state = above - jnp.where(up, step, 0), up
    return lax.fori_loop(0, (rows + pad) // size, one_block, state)[1][:rows]


def neighbours(w: jax.Array, fmt: Format, grid: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the codes of the values below and above, and of the nearest value.

    A format says only what is nearest. The next value beyond that is where the nearest changes,
    which is found by halving.

    Args:
      w: `[rows, columns]`.
      fmt: the format.
      grid: its grids.

    Returns:
      Three arrays, `int32` `[rows, columns]`; the first two are equal beyond the ends of a grid.
    """
    grid = jax.tree.map(lambda a: a[:, None], grid)
    x = w.reshape(len(jax.tree.leaves(grid)[0]), -1, w.shape[1])
    near = fmt.codes(x, grid)
    value = fmt.values(near, grid)
    away = jnp.where(value > x, -1, 1).astype(x.dtype)

    def beyond(y: jax.Array) -> jax.Array:
        # The code is looked at, too: XLA may fuse product and difference, and what is left of
        # one and the same value is then its rounding error.
        codes = fmt.codes(y, grid)
        return (codes != near) & (away * (fmt.values(codes, grid) - value) > 0)

    def halve(_: jax.Array, state: Any) -> Any:
        inside, outside = state
        middle = inside + (outside - inside) / 2
        out = beyond(middle)
        return jnp.where(out, inside, middle), jnp.where(out, middle, outside)

    end = fmt.round(away * jnp.finfo(x.dtype).max, grid)
    _, outside = lax.fori_loop(0, 40, halve, (x, end))
    other = jnp.where(beyond(end), fmt.codes(outside, grid), near)
    low, high = jnp.where(away > 0, near, other), jnp.where(away > 0, other, near)
    return low.reshape(w.shape), high.reshape(w.shape), near.reshape(w.shape)
