"""Learned steps: integer grids whose scale, and perhaps offset, training finds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._bits import wide_dtype
from .._encoded import Encoded
from ._format import Format
from ._grid import Grid, bounded, mean, quotient, steady
from ._int import Int
from ._observers import Bounds, Observer, Rounding, whole_range


@dataclasses.dataclass(frozen=True)
class MeanAbs(Observer):
    r"""The range from which learned steps start, by the mean magnitude.

    .. math:: \pm 2 \, \mathrm{mean}|v| \sqrt{Q_p}, \qquad
              \text{so that } s = 2 \, \mathrm{mean}|v| / \sqrt{Q_p}

    with :math:`Q_p` the largest code. An asymmetric grid does not go beyond the values.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jnp.array([[7.0], [-7.0]])
      >>> quant.Int(bits=4, observer=quant.MeanAbs())(w).scale        # 2 * 7 / sqrt(7)
      Array([[5.2915025]], dtype=float32)

    References:
      Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_, 2020
    """

    def range(self, x: jax.Array, fmt: Format, weight: jax.Array | None) -> Bounds:
        """Chooses ranges of weights; pruned entries do not count."""
        kept = jnp.ones((), bool) if weight is None else weight > 0
        size = jnp.where(kept, jnp.abs(x), 0)
        count = jnp.sum(jnp.broadcast_to(kept, x.shape), axis=-2)
        middle = steady(mean(size, jnp.maximum(count, 1), fmt.block))
        top = bounded(2 * middle * math.sqrt(max(1, fmt.magnitudes - 1)))
        if getattr(fmt, "symmetric", True):
            return -top, top
        low, high = whole_range(x)
        return jnp.maximum(low, -top), jnp.minimum(high, top)

    def of_input(self, seen: Any, rounding: Rounding, levels: int) -> Bounds:
        """Chooses the range by the histogram seen."""
        edges, counts = seen.edges, seen.counts
        middle = jnp.abs(edges[:-1] + edges[1:]) / 2
        average = jnp.sum(middle * counts) / jnp.maximum(jnp.sum(counts), 1)
        top = 2 * average * math.sqrt(max(1, levels - 1))
        low = jnp.min(jnp.where(counts > 0, edges[:-1], 0))
        return jnp.maximum(low, -top), top


@dataclasses.dataclass(frozen=True)
class LSQ(Int):
    r"""Integers on a grid whose step is learned together with the weights.

    .. math:: \hat w = s \, \mathrm{round}(\mathrm{clip}(w / s, -Q_n, Q_p)), \qquad
              \frac{\partial \hat w}{\partial s} = \begin{cases}
                \mathrm{round}(w / s) - w / s & -Q_n < w / s < Q_p \\
                -Q_n & w / s \le -Q_n \\ Q_p & w / s \ge Q_p \end{cases}

    with :math:`Q_n = 2^{b-1}` and :math:`Q_p = 2^{b-1} - 1`. The derivative by `w` is one inside
    the range and zero outside. That by `s` is multiplied by :math:`1 / \sqrt{N Q_p}`, with `N` the
    number of weights that share a step, so that steps and weights learn equally fast.

    With ``symmetric=False`` an offset is learned, too (LSQ+): codes go from 0 to
    :math:`Q_p = 2^b - 1` and mean :math:`s q + \beta`, kept as :math:`s (q - z)` with
    :math:`z = -\beta / s` in `float16`, between the codes; the derivative by :math:`\beta` is one
    where a weight is clipped and zero elsewhere, multiplied like that by `s`.

    Training starts with :func:`jaxopt_models.prepare`, at the grid that ``observer`` chooses;
    without it a tensor is encoded on that grid. What is learned is ``step``, of the shape of the
    scales of :class:`Quantized`, and ``offset``. A step counts by its magnitude. Encoding again
    moves the values, as the grid starts anew.

    Args:
      bits: width of a code, 2 to 8.
      symmetric: whether zero is a code, or an offset is learned.
      per: see :class:`Int`, as are ``group``, ``block`` and ``scale``.
      group: see there.
      block: see there.
      scale: see there.
      observer: how the first grid is chosen.

    Raises:
      TypeError: for options of another type.
      ValueError: for what :class:`Int` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> w = jnp.array([[1.0], [0.25], [-1.0]])
      >>> latent = jom.prepare({"w": w}, [jom.Rule("w", jom.quant.LSQ(bits=2))])["w"]
      >>> latent.learned["step"]                          # 2 mean|w|
      Array([[1.5]], dtype=float32)
      >>> latent.materialize().ravel()
      Array([ 1.5,  0. , -1.5], dtype=float32)

    References:
      Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_, 2020;
      Bhalgat et al., `LSQ+ <https://arxiv.org/abs/2004.09576>`_, 2020
    """

    _: dataclasses.KW_ONLY
    observer: Observer = MeanAbs()

    @property
    def edges(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if self.symmetric:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def codes(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the nearest codes; see :class:`LSQ`."""
        return jnp.clip(jnp.round(_place(x, grid)), *self.edges).astype(jnp.int32)

    def pack_zero(self, zero: jax.Array, m: Matrix) -> jax.Array:
        """Returns zero points as a leaf keeps them: `float16`."""
        return self.place(zero, m).astype(jnp.float16)

    def latent(self, w: jax.Array, **given: Any) -> dict[str, Any]:
        """Returns the first grid: ``step``, and ``offset`` where one is learned."""
        m = self.matrix(w, given["axes"])
        x = self.runs(m.view(w.astype(wide_dtype(w.dtype))), m)
        grid = self.fit(x, self.weights(given["stats"], given["keep"], m, given["axes"]))
        # From a step of zero nothing could be learned.
        some = jnp.min(grid.scale, where=grid.scale > 0, initial=jnp.inf)
        some = jnp.where(some < jnp.inf, some, jnp.ones((), some.dtype))
        learned = {"step": self.place(jnp.where(grid.scale > 0, grid.scale, some), m)}
        if grid.zero is not None:
            learned["offset"] = self.place(-grid.zero * grid.scale, m)
        return learned

    def show(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> jax.Array:
        """Rounds one core tensor, with the derivatives of :class:`LSQ`."""
        m = self.matrix(w, given["axes"])
        x = self.runs(m.view(w.astype(wide_dtype(w.dtype))), m)
        kept = None if given["keep"] is None else self.runs(m.view(given["keep"]), m)
        low, high = self.edges
        share = 1 / math.sqrt(x.shape[1] * self.block * high)

        @jax.custom_jvp
        def rounded(x: jax.Array, learned: dict[str, Any], kept: Any) -> jax.Array:
            return self.round(x, _by_entry(self._grid(learned, m)))

        @rounded.defjvp
        def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            x, learned, kept = primals
            grid = _by_entry(self._grid(learned, m))
            place, code = _place(x, grid), self.codes(x, grid).astype(x.dtype)
            inside = (place > low) & (place < high)
            turn = {n: self._spread(share * d, m) for n, d in tangents[1].items()}
            slope = jnp.where(inside, code - place, code)
            step = slope * turn["step"] * jnp.sign(self._spread(learned["step"], m))
            if "offset" in turn:
                step = step + jnp.where(inside, 0, turn["offset"])
            step = step if kept is None else jnp.where(kept, step, 0)
            return rounded(*primals), jnp.where(inside, tangents[0], 0) + step

        shown = rounded(x, learned, kept)
        return m.unview(shown.reshape(m.rows, m.columns)).astype(w.dtype)

    def ship(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> Encoded:
        """Encodes one core tensor on the learned grid."""
        m = self.matrix(w, given["axes"])
        x = self.runs(m.view(w.astype(wide_dtype(w.dtype))), m)
        grid = self._grid(learned, m)
        codes = self.codes(x, _by_entry(grid)).reshape(m.rows, m.columns)
        return self.pack(codes, grid, m, w.dtype)

    def _grid(self, learned: dict[str, Any], m: Matrix) -> Grid:
        """Returns the grid of what is learned, `[groups, columns]`, as it will be read back."""
        step = self.kept_scale(jnp.abs(self._runs_of(learned["step"])))
        step = jnp.repeat(step, self.block, axis=-1)
        if self.symmetric:
            return Grid(step)
        offset = jnp.repeat(self._runs_of(learned["offset"]), self.block, axis=-1)
        zero = jnp.clip(quotient(-offset, step), *self.edges)
        return Grid(step, zero.astype(jnp.float16).astype(step.dtype))

    def _runs_of(self, placed: jax.Array) -> jax.Array:
        """Undoes :meth:`place`, but for the blocks: `[groups, columns / block]`."""
        return placed.reshape(-1, placed.shape[-1]).T

    def _spread(self, placed: jax.Array, m: Matrix) -> jax.Array:
        return jnp.repeat(self._runs_of(placed), self.block, axis=-1)[:, None, :]


def _by_entry(grid: Grid) -> Grid:
    return jax.tree.map(lambda a: a[:, None, :], grid)


def _place(x: jax.Array, grid: Grid) -> jax.Array:
    """Returns where values lie on a grid, in codes."""
    place = quotient(x, grid.scale)
    return place if grid.zero is None else place + grid.zero
