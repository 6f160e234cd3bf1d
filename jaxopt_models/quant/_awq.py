"""AWQ: a scale for each input moves the precision of the codes to the inputs that are large."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._axes import Axes, Matrix
from .._bits import wide_dtype
from .._divided import on_outputs
from .._encoded import Encoded
from .._encoder import Encoder
from .._options import flag, whole
from ._format import Format
from ._grid import Grid, quotient
from ._observers import whole_range
from ._rows import check_gram, with_squares
from ._scaled import SCALES, Scaled
from ._solver import Outputs

# The largest part that is clipped off, and the number of factors on the way, as in the paper.
_LEAST, _SHRINKS = 0.5, 10


@dataclasses.dataclass(frozen=True)
class AWQ(Encoder):
    r"""Scales the inputs of a tensor before it is rounded, and clips its ranges.

    .. math:: \hat w_{ij} = Q(s_i w_{ij}) / s_i, \qquad
              s_i = a_i^r / \sqrt{\max_k a_k^r \, \min_k a_k^r}

    where :math:`a_i` is the root mean square of input `i` as a part of the largest (the paper takes
    the mean magnitude), and `r` one of `0, 1/steps, 2/steps, ...` below 1: that of the least error
    of the output,

    .. math:: \mathrm{tr} \, (W - \hat W)^\top G (W - \hat W), \qquad G = X^\top X,

    which the gram gives exactly for all samples seen. Then the range of each group is shrunk by the
    factor of `1, 0.95, ..., 0.5` with the least error of the group alone, by its block of
    :math:`G`, and clipped columns are kept where they lower the error of the whole. Rounding to the
    nearest, `r = 0` and no clipping, is among what is compared, as it is stored: the error on the
    samples of calibration is never above it.

    The scales are undone in the leaf, so no layer before has to change. Entries pruned before stay
    zero. Encoding again may move the values.

    Args:
      fmt: the format.
      steps: number of exponents.
      clip: whether ranges are clipped.
      scale: how the scales of inputs are kept: ``"float16"``, ``"bfloat16"``, ``"float32"``.

    Raises:
      TypeError: if ``fmt`` is no format, or for options of another type.
      ValueError: for options out of range; when called, without the statistic ``gram``, if that
        holds NaN or Inf, or if it is of other axes than the rule says.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> kx, kw = jax.random.split(jax.random.key(0))
      >>> x = jax.random.normal(kx, (256, 64)).at[:, 5].multiply(30)
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jax.random.normal(kw, (64, 16))}
      >>> recipe = [jom.Rule("w", jom.quant.AWQ(jom.quant.Int(bits=3)))]
      >>> small = jom.compress(params, recipe, stats=jom.calibrate(fn, params, [(x,)], recipe))
      >>> nearest = jom.compress(params, [jom.Rule("w", jom.quant.Int(bits=3))])
      >>> error = lambda p: jnp.mean((fn(jom.materialize(p), x) - fn(params, x)) ** 2)
      >>> small["w"].kind(), bool(error(small) < error(nearest) / 2)
      ('Scaled(Quantized)', True)

    References:
      Lin et al., `AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration
      <https://arxiv.org/abs/2306.00978>`_, 2023
    """

    fmt: Format
    _: dataclasses.KW_ONLY
    steps: int = 20
    clip: bool = True
    scale: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if not isinstance(self.fmt, Format):
            raise TypeError(f"AWQ: fmt={self.fmt!r} is no format; give one such as Int(bits=4)")
        object.__setattr__(self, "steps", whole(self.steps, "AWQ: steps", least=1))
        flag(self.clip, "AWQ: clip")
        if self.scale not in SCALES:
            raise ValueError(f"AWQ: scale={self.scale!r} is none of {', '.join(SCALES)}")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The gram, which ``l2`` is the diagonal of, and what the observer wants else."""
        return ("gram", *(n for n in self.fmt.needs if n != "l2"))

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Checks the statistics, and encodes."""
        check_gram(stats, axes, w.shape, "AWQ")
        return super().run(w, axes, keep, stats, key)

    def partition(self, spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """Divides the outputs, each of which needs all of its inputs."""
        return on_outputs(spec, shape, axes)

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Scaled:
        """Encodes one core tensor: the scales first, then the ranges."""
        layer = _Layer(self.fmt, w, axes, keep, stats)
        ratios = jnp.arange(self.steps, dtype=layer.x.dtype) / self.steps

        def error(r: jax.Array) -> jax.Array:
            scale = self._scale(layer.size, r)
            return jnp.sum(layer.errors(scale, layer.fit(scale)))

        scale = self._scale(layer.size, ratios[jnp.argmin(lax.map(error, ratios))])
        grid = layer.clipped(scale) if self.clip else layer.fit(scale)
        return layer.leaf(scale, grid, self.scale)

    def _scale(self, size: jax.Array, r: jax.Array) -> jax.Array:
        """Returns what values are multiplied with, `1 / s`, as it is read back."""
        s = jnp.maximum(size**r, 1e-4)
        s = quotient(s, jnp.sqrt(jnp.max(s) * jnp.min(s)))
        return (1 / s).astype(self.scale).astype(size.dtype)


class _Layer:
    """One core tensor and its inputs, and what rounding it on a grid costs.

    Args:
      fmt: the format.
      w: the tensor.
      axes: roles of its axes.
      keep: mask of an earlier step, or ``None``.
      stats: statistics of its inputs.
    """

    def __init__(self, fmt: Format, w: jax.Array, axes: Axes, keep: Any, stats: Any):
        self.fmt, self.dtype = fmt, w.dtype
        self.true, self.m = Matrix(tuple(w.shape), axes.out), fmt.matrix(w, axes)
        self.fine = self.m.out == self.true.out  # else one grid serves all columns
        self.x = self.true.view(w.astype(wide_dtype(w.dtype)))
        self.keep = None if keep is None else self.true.view(keep)
        self.outputs = Outputs(stats.groups, self.true)
        self.gram = self.outputs.grams(stats.states["gram"])
        known = with_squares(stats)
        self.weight = fmt.weights(known, keep, self.m, axes)
        size = jnp.sqrt(jnp.mean(known.states["l2"].reshape(-1, self.true.rows), axis=0))
        top = jnp.max(size)
        # Where nothing was seen all inputs are alike.
        size = jnp.where(top > 0, quotient(size, jnp.where(top > 0, top, 1)), 1)
        self.size = size.astype(self.x.dtype)

    def runs(self, x: jax.Array) -> jax.Array:
        """Cuts `[rows, columns]` into the runs of the format."""
        return self.fmt.runs(x if self.fine else self.m.view(self.true.unview(x)), self.m)

    def matrix(self, x: jax.Array) -> jax.Array:
        """Undoes :meth:`runs`."""
        x = x.reshape(self.m.rows, self.m.columns)
        return x if self.fine else self.true.view(self.m.unview(x))

    def scaled(self, scale: jax.Array) -> jax.Array:
        """Returns the runs of what is rounded."""
        return self.runs(quotient(self.x, scale[:, None]))

    def fit(self, scale: jax.Array, part: jax.Array | None = None) -> Grid:
        """Chooses grids for ranges shrunk to a part, `[groups, columns]`."""
        x, weight = self.scaled(scale), self.weight
        if part is not None:
            low, high = (bound * part for bound in whole_range(x))
            x = jnp.clip(x, low[:, None, :], high[:, None, :])
        if weight is not None and weight.dtype != jnp.bool_:
            # Observers weigh by the squares of what the values are multiplied with.
            weight = weight * self.runs(jnp.broadcast_to(scale[:, None] ** 2, self.x.shape))
        return self.fmt.fit(x, weight)

    def errors(self, scale: jax.Array, grid: Grid, run: int | None = None) -> jax.Array:
        r"""Returns :math:`d^\top G d` of runs of rows by themselves, `[rows / run, columns]`."""
        spread = jax.tree.map(lambda a: a[:, None, :], grid)
        found = self.matrix(self.fmt.round(self.scaled(scale), spread)) * scale[:, None]
        miss = self.x - found.astype(self.dtype).astype(self.x.dtype)
        miss = miss if self.keep is None else jnp.where(self.keep, miss, 0)
        rows = self.true.rows
        run = run or rows
        n, parts = len(self.gram), rows // run
        d = self.outputs.split(miss).reshape(n, parts, run, -1).astype(self.gram.dtype)
        at = jnp.arange(parts)
        blocks = self.gram.reshape(n, parts, run, parts, run)[:, at, :, at, :].swapaxes(0, 1)
        seen = jnp.einsum("nprs,npsc->nprc", blocks, d, precision=lax.Precision.HIGHEST)
        return self.outputs.join(jnp.sum(d * seen, axis=2))

    def clipped(self, scale: jax.Array) -> Grid:
        """Chooses the range of each group by itself, where that lowers the error of the whole."""
        plain = self.fit(scale)
        errors = self.errors(scale, plain)
        run = self.fmt.group if self.fine else None
        parts = 1 - (1 - _LEAST) * jnp.arange(_SHRINKS + 1, dtype=self.x.dtype) / _SHRINKS
        shape = plain.scale.shape

        def cost(part: jax.Array) -> jax.Array:
            return self.shared(self.errors(scale, self.fit(scale, jnp.full(shape, part)), run))

        best = parts[jnp.argmin(lax.map(cost, parts), axis=0)]
        shrunk = self.shared(self.errors(scale, self.fit(scale, best)))
        found = self.fit(scale, jnp.where(shrunk < self.shared(errors), best, 1))
        # Grids may hang on each other, as under one scale of scales; so the sum has to be seen.
        lower = jnp.sum(self.errors(scale, found)) <= jnp.sum(errors)
        return jax.tree.map(lambda a, b: jnp.where(lower, a, b), found, plain)

    def shared(self, errors: jax.Array) -> jax.Array:
        """Gives each column the sum over those that share a grid."""
        if not self.fine:
            return jnp.sum(errors, keepdims=True)
        sums = jnp.sum(errors.reshape(len(errors), -1, self.fmt.block), axis=-1)
        return jnp.repeat(sums, self.fmt.block, axis=-1)

    def leaf(self, scale: jax.Array, grid: Grid, kept: str) -> Scaled:
        """Returns the leaf of a grid."""
        codes = self.fmt.codes(self.scaled(scale), jax.tree.map(lambda a: a[:, None, :], grid))
        codes = codes.reshape(self.m.rows, self.m.columns)
        values = self.fmt.pack(codes, grid, self.m, self.x.dtype)
        name = str(jnp.dtype(self.dtype))
        return Scaled(values, scale.astype(kept), self.true.core, self.true.out, name)
