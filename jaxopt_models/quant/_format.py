"""What number formats have in common: runs of weights, their grids, and how these are kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._axes import Axes, Matrix, divisors
from .._bits import pack_codes, wide_dtype
from .._divided import on_one_axis, on_outputs
from .._encoded import Encoded
from .._encoder import Encoder
from .._options import whole
from ._grid import Grid, positive, power_of_two
from ._observers import AbsMax, MinMax, Observer
from ._rows import by_column, check_stats

_SCALES = ("float32", "bfloat16", "float16", "power_of_two")


@dataclasses.dataclass(frozen=True)
class Format(Encoder):
    """A number format: rounds a tensor to the values that codes of few bits can mean.

    In the `[in, out]` view of the tensor each column is cut into runs of ``group`` inputs, and
    ``block`` neighbouring columns may share theirs; each run has a grid of its own. A subclass
    says which grid spans a range (:meth:`grid`), which code is nearest (:meth:`codes`), what a
    code means (:meth:`values`), which leaf keeps them (:meth:`pack`), and, if so, that no code
    means zero (:attr:`has_zero`); solvers such as :class:`GPTQ` ask for nothing else, so each
    works with every format.

    Args:
      per: ``"channel"``, grids for each output; ``"tensor"``, one for everything.
      group: number of consecutive inputs that share a grid; ``None`` for all.
      block: number of consecutive outputs (of the last output axis) that share a grid.
      scale: how scales are kept: ``"float32"``, ``"bfloat16"``, ``"float16"``,
        ``"power_of_two"`` (8 bits each), or a format in which they are encoded themselves. Scales
        that 16 bits cannot hold raise; under `jit` they become the nearest that these can.
      observer: how the range of a grid is chosen.
    """

    _: dataclasses.KW_ONLY
    per: Literal["channel", "tensor"] = "channel"
    group: int | None = None
    block: int = 1
    scale: str | Format = "float32"
    observer: Observer = MinMax()  # noqa: RUF009 (a frozen value)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.group is not None:
            object.__setattr__(self, "group", whole(self.group, f"{name}: group"))
        object.__setattr__(self, "block", whole(self.block, f"{name}: block"))
        if self.per not in ("channel", "tensor"):
            raise ValueError(f"{name}: per={self.per!r} is neither 'channel' nor 'tensor'")
        if self.group is not None and (self.group < 1 or self.per == "tensor"):
            raise ValueError(f"{name}: group={self.group} needs to be positive and per='channel'")
        if self.block < 1 or (self.block > 1 and self.per == "tensor"):
            raise ValueError(f"{name}: block={self.block} needs to be positive and per='channel'")
        if not isinstance(self.scale, Format) and self.scale not in _SCALES:
            raise ValueError(
                f"{name}: scale={self.scale!r} is none of {', '.join(_SCALES)}, and no format"
            )
        if isinstance(self.scale, Format) and not self.scale.has_zero:
            raise ValueError(
                f"{name}: scale={self.scale!r} has no zero, the scale of a run of zeros; give "
                "one that has, such as Int(bits=8)"
            )
        if not isinstance(self.observer, Observer):
            raise TypeError(f"{name}: observer={self.observer!r} is no observer such as MSE()")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Statistics that the observer wants."""
        return self.observer.needs

    @property
    def magnitudes(self) -> int:
        """Number of magnitudes that codes can mean, for :class:`Entropy`."""
        raise NotImplementedError

    @property
    def has_zero(self) -> bool:
        """Whether a code means zero."""
        return True

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """Returns the grid that spans ranges `[low, high]`, zero among them."""
        raise NotImplementedError

    def codes(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the `int32` codes nearest to ``x``; entry by entry, shapes broadcast."""
        raise NotImplementedError

    def values(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """Returns what codes mean; entry by entry, shapes broadcast."""
        raise NotImplementedError

    def pack(self, codes: jax.Array, grid: Grid, m: Matrix, dtype: Any) -> Encoded:
        """Returns the leaf of codes `[rows, columns]` in the view ``m``."""
        raise NotImplementedError

    def round(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the nearest values."""
        return self.values(self.codes(x, grid), grid)

    def fit(self, x: jax.Array, weight: jax.Array | None = None) -> Grid:
        """Chooses a grid for each run.

        Args:
          x: runs `[groups, run, columns]`, at least `float32`.
          weight: importance of the entries, of a shape that broadcasts to that of ``x``; zero
            where an entry is pruned. ``None``: all alike.

        Returns:
          The grids, `[groups, columns]`.
        """
        groups, run, columns = x.shape
        if self.block > 1:
            x = _blocks(x, self.block)
            weight = (
                None
                if weight is None
                else _blocks(jnp.broadcast_to(weight, (groups, run, columns)), self.block)
            )
        grid = self.fit_runs(x, weight)
        return jax.tree.map(lambda a: jnp.repeat(a, self.block, axis=-1), grid)

    def fit_runs(self, x: jax.Array, weight: jax.Array | None) -> Grid:
        """Chooses a grid for each column of each group of ``x``; see :meth:`fit`."""
        return self.grid(*self.observer.range(x, self, weight))

    def matrix(self, w: Any, axes: Axes) -> Matrix:
        """Returns the view of a core tensor, its runs checked."""
        out = axes.out if self.per == "channel" else ()
        m = Matrix(tuple(w.shape), out)
        if m.rows % (self.group or m.rows):
            raise ValueError(
                f"group={self.group} does not divide the {m.rows} inputs of shape "
                f"{tuple(w.shape)} (out axes {out}); groups that do: {divisors(m.rows)}"
            )
        if self.block > 1 and (not m.out_shape or m.out_shape[-1] % self.block):
            last = m.out_shape[-1] if m.out_shape else 1
            raise ValueError(
                f"block={self.block} does not divide the {last} outputs of shape "
                f"{tuple(w.shape)} (out axes {out}); blocks that do: {divisors(last)}"
            )
        return m

    def runs(self, x: jax.Array, m: Matrix) -> jax.Array:
        """Cuts `[rows, columns]` into `[groups, run, columns]`."""
        run = self.group or m.rows
        return x.reshape(m.rows // run, run, x.shape[-1])

    def weights(self, stats: Any, keep: jax.Array | None, m: Matrix, axes: Axes) -> Any:
        """Returns the importance of each entry, as :meth:`fit` takes it."""
        weight = None
        if self.observer.needs:
            weight = jnp.square(by_column(stats, "l2", m, axes))
        if keep is not None:
            kept = m.view(keep)
            weight = kept if weight is None else jnp.where(kept, weight, 0)
        return None if weight is None else self.runs(weight, m)

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Checks the statistics, where the observer wants some, and encodes."""
        if self.observer.needs:
            check_stats(stats, axes, w.shape, type(self).__name__)
        return super().run(w, axes, keep, stats, key)

    def partition(self, spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """Divides so that no run is: by outputs, or by the first axis where all is one run."""
        if self.per == "tensor":
            return on_one_axis(spec, axes.stack, 0)
        return on_outputs(spec, shape, axes) if self.group is None else spec

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Encodes one core tensor: the nearest value on the grid of its run."""
        m = self.matrix(w, axes)
        x = self.runs(m.view(w.astype(wide_dtype(w.dtype))), m)
        grid = self.fit(x, self.weights(stats, keep, m, axes))
        codes = self.codes(x, jax.tree.map(lambda a: a[:, None, :], grid))
        return self.pack(codes.reshape(m.rows, m.columns), grid, m, w.dtype)

    def slices(self, shape: tuple[int, ...], axes: Axes) -> int | None:
        """Returns in what slices a tensor can be encoded: whole runs, ranges without sums."""
        cls, observer = type(self), type(self.observer)
        own = (cls.run, cls.encode, cls.fit, cls.fit_runs)
        if own != (Format.run, Format.encode, Format.fit, Format.fit_runs):
            return None
        if observer.range not in (Observer.range, AbsMax.range):
            return None
        if isinstance(self.scale, Format):
            return None
        if axes.stack:
            return 1
        m = Matrix(shape, axes.out or ())
        if self.per == "tensor" or len(shape) < 2:
            return shape[0] if shape else None
        if 0 in m.out:
            return self.block if m.out == (0,) else 1
        if self.group is None:
            return shape[0]
        return self.group // math.gcd(self.group, m.rows // shape[0])

    def leaf(
        self, codes: jax.Array, scale: jax.Array, m: Matrix, dtype: Any, *, bits: int, signed: bool
    ) -> dict[str, Any]:
        """Returns what leaves of packed codes with scales have in common, by field."""
        return {
            "codes": pack_codes(jnp.atleast_1d(m.unview(codes)), bits=bits, signed=signed),
            "scale": self.pack_scale(scale, m),
            "core": m.core,
            "out": m.out,
            "bits": bits,
            "dtype_name": str(jnp.dtype(dtype)),
            "block": self.block,
        }

    def place(self, per_run: jax.Array, m: Matrix) -> jax.Array:
        """Arranges what belongs to runs, `[groups, columns]`, as `[*out, groups]`."""
        out = m.out_shape
        shape = (*out[:-1], out[-1] // self.block) if out else ()
        return per_run[:, :: self.block].T.reshape(*shape, per_run.shape[0])

    def kept_scale(self, scale: jax.Array) -> jax.Array:
        """Returns scales `[groups, columns]` as they will be read back.

        An all-zero run has the scale one and the code of zero. Where no code means zero, or a one
        among the scales would spoil how they are encoded, its scale is zero: so are its values.
        (The least power of two, 1e-38, where scales are such and no code means zero.)
        """
        some = scale >= jnp.finfo(scale.dtype).tiny  # what is less, XLA flushes to zero
        if isinstance(self.scale, Format):
            scale = jnp.where(some, scale, 0)
            return self._encoded_scale(scale.T).rebuild().T
        if self.scale == "power_of_two":
            least = 1.0 if self.has_zero else float(jnp.finfo(scale.dtype).tiny)
            return power_of_two(jnp.where(some, scale, least), up=True)
        if self.scale != "float32":
            kept, real = jnp.finfo(self.scale), scale.dtype
            # What is beyond the type becomes its end: see :meth:`Grouped.lost`.
            scale = jnp.minimum(scale, jnp.array(kept.max, real)).astype(self.scale).astype(real)
            least = jnp.array(max(kept.smallest_subnormal, jnp.finfo(real).tiny), real)
            scale = jnp.where(some, jnp.maximum(scale, least), scale)
        return positive(scale) if self.has_zero else jnp.where(some, scale, 0)

    def pack_scale(self, scale: jax.Array, m: Matrix) -> Any:
        """Returns scales `[groups, columns]` as a leaf keeps them: `[*out, groups]`."""
        scale = self.place(scale, m)
        if isinstance(self.scale, Format):
            return self._encoded_scale(scale)
        if self.scale == "power_of_two":
            return scale.astype(jnp.float8_e8m0fnu)
        return scale if self.scale == "float32" else scale.astype(self.scale)

    def _encoded_scale(self, scale: jax.Array) -> Encoded:
        """Encodes scales `[..., groups]`."""
        axes = Axes(out=tuple(range(scale.ndim - 1)))
        try:
            return self.scale.encode(scale, axes=axes, keep=None, stats=None, key=None)
        except ValueError as e:
            raise ValueError(
                f"{self.scale!r}, which encodes the scales {list(scale.shape)}: {e}"
            ) from e


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """Brings blocks of columns into the runs: `[groups, run * block, columns / block]`."""
    groups, run, columns = x.shape
    x = x.reshape(groups, run, columns // block, block)
    return x.transpose(0, 1, 3, 2).reshape(groups, run * block, columns // block)
