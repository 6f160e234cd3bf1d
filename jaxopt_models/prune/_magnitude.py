"""Pruning by magnitude: single entries, blocks, n of m."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Axes, Matrix, divisors
from .._bits import wide_dtype
from .._encoded import Masked
from .._encoder import Encoder
from .._options import portion, whole
from ._select import keep_largest


@dataclasses.dataclass(frozen=True)
class Block:
    """Keeps or drops whole blocks of the `[in, out]` view of a tensor.

    Args:
      rows: consecutive inputs in a block.
      columns: consecutive outputs in a block.

    Raises:
      TypeError: for lengths that are not whole.
      ValueError: for lengths that are not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import prune
      >>> w = jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 9.0], [0.0, 0.0]])
      >>> prune.Magnitude(sparsity=0.5, structure=prune.Block(2))(w).materialize()
      Array([[1., 0.],
             [3., 0.],
             [0., 9.],
             [0., 0.]], dtype=float32)
    """

    rows: int
    columns: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            value = whole(getattr(self, name), f"Block: {name}", least=1)
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class NofM:
    """Keeps ``n`` of every ``m`` consecutive inputs of each output, for instance 2 of 4.

    Args:
      n: how many are kept.
      m: length of a run.

    Raises:
      TypeError: for numbers that are not whole.
      ValueError: unless ``0 < n < m``.

    Example:
      >>> from jaxopt_models import prune
      >>> prune.Magnitude(structure=prune.NofM(2, 4)).structure
      NofM(n=2, m=4)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            object.__setattr__(self, name, whole(getattr(self, name), f"NofM: {name}"))
        if not 0 < self.n < self.m:
            raise ValueError(f"NofM: {self.n} of {self.m}; n lies between 0 and m")


@dataclasses.dataclass(frozen=True)
class Magnitude(Encoder):
    r"""Drops the entries of smallest magnitude, an exact number of them.

    .. math:: m_i = 1 \text{ for the } n - \lfloor s n + 1/2 \rfloor
              \text{ largest } |w_i|, \text{ else } 0

    Among equal magnitudes the lower index is kept. Blocks are scored by their mean
    magnitude. Under the mask of an earlier step only kept entries can stay.

    Args:
      sparsity: share of entries (or blocks) to drop, in [0, 1); left out for n:m.
      structure: ``None`` for single entries, :class:`Block` or :class:`NofM`.
      across_stack: rank the layers of a stack together instead of each on its own, as a
        global plan needs.

    Raises:
      TypeError: for a sparsity that is no number.
      ValueError: for a sparsity outside [0, 1), or, when called, a block or run that does
        not divide the tensor.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import prune
      >>> w = jnp.array([[3.0, -1.0], [0.5, 2.0], [-4.0, 0.0], [1.0, 1.0]])
      >>> prune.Magnitude(sparsity=0.5)(w).materialize()
      Array([[ 3., -1.],
             [ 0.,  2.],
             [-4.,  0.],
             [ 0.,  0.]], dtype=float32)
      >>> prune.Magnitude(structure=prune.NofM(2, 4))(w).keep().sum(axis=0)
      Array([2, 2], dtype=int32)

    References:
      Han et al., `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015
    """

    sparsity: float | None = None
    _: dataclasses.KW_ONLY
    structure: Block | NofM | None = None
    across_stack: bool = False

    def __post_init__(self) -> None:
        if self.across_stack and self.structure is not None:
            raise ValueError("Magnitude: across_stack ranks single entries; leave structure= out")
        if isinstance(self.structure, NofM):
            if self.sparsity is not None:
                n, m = self.structure.n, self.structure.m
                raise ValueError(f"Magnitude: {n} of {m} fixes the sparsity; leave sparsity= out")
            return
        if self.structure is not None and not isinstance(self.structure, Block):
            raise ValueError(f"Magnitude: structure={self.structure!r}; use Block or NofM")
        object.__setattr__(self, "sparsity", portion(self.sparsity, "Magnitude: sparsity"))

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Masked:
        """Encodes ``w``; see :class:`Magnitude`."""
        if self.across_stack and axes.stack:
            return _run_across(self, axes, w, keep)
        return super().run(w, axes, keep, stats, key)

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Masked:
        """Encodes one core tensor; see :class:`Magnitude`."""
        return _masked(w, self.mask(w, axes, keep))

    def mask(self, w: jax.Array, axes: Axes, keep: Any, share: Any = 1.0) -> jax.Array:
        """Marks what is kept of one core tensor.

        Args:
          w: the tensor.
          axes: resolved roles of its axes.
          keep: candidates (booleans), or ``None``.
          share: how much of the sparsity is reached, in [0, 1]; may be traced. A run of n:m
            is whole or not there, so n:m ignores it.

        Returns:
          Booleans of the shape of ``w``.
        """
        score = jnp.abs(w.astype(wide_dtype(w.dtype)))
        if self.structure is None:
            [marks] = keep_largest([score], self._kept(w.size, share), keep=[keep])
            return marks if keep is None else marks & keep
        m = Matrix(tuple(w.shape), axes.out)
        score = m.view(score)
        kept = None if keep is None else m.view(keep)
        if isinstance(self.structure, NofM):
            return m.unview(_n_of_m(score, kept, self.structure, m))
        return m.unview(self._blocks(score, kept, m, share))

    def _kept(self, size: int, share: Any) -> Any:
        drop = int(self.sparsity * size + 0.5)
        if isinstance(share, float) and share == 1.0:
            return size - drop
        part = jnp.floor(share * drop + 0.5).astype(jnp.int32)
        return size - jnp.where(share >= 1, drop, jnp.minimum(part, drop))

    def _blocks(self, score: jax.Array, keep: Any, m: Matrix, share: Any) -> jax.Array:
        rows, columns = self.structure.rows, self.structure.columns
        for n, size, name in ((rows, m.rows, "inputs"), (columns, m.columns, "outputs")):
            if size % n:
                raise ValueError(
                    f"blocks of {rows} x {columns} do not divide the {size} {name} of shape "
                    f"{m.core}; lengths that do: {divisors(size)}"
                )
        tiles = (m.rows // rows, rows, m.columns // columns, columns)
        mean = jnp.sum(score.reshape(tiles), axis=(1, 3))
        alive = None if keep is None else jnp.any(keep.reshape(tiles), axis=(1, 3))
        [marks] = keep_largest([mean], self._kept(mean.size, share), keep=[alive])
        spread = jnp.broadcast_to(marks[:, None, :, None], tiles).reshape(m.rows, m.columns)
        return spread if keep is None else spread & keep


def _masked(w: jax.Array, marks: jax.Array) -> Masked:
    return Masked.of(marks, jnp.where(marks, w, jnp.zeros((), w.dtype)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_across(encoder: Magnitude, axes: Axes, w: jax.Array, keep: Any) -> Masked:
    masked = _masked
    for _ in range(axes.stack):
        masked = jax.vmap(masked)
    return masked(w, encoder.mask(w, axes, keep))


def _n_of_m(score: jax.Array, keep: Any, structure: NofM, m: Matrix) -> jax.Array:
    run = structure.m
    if m.rows % run:
        raise ValueError(
            f"runs of {run} do not divide the {m.rows} inputs of shape {m.core}; runs that do: "
            f"{divisors(m.rows)}"
        )
    if keep is not None:
        score = jnp.where(keep, score, -jnp.ones((), score.dtype))
    s = score.reshape(m.rows // run, run, m.columns)
    mine, other = s[:, :, None], s[:, None, :]
    index = jnp.arange(run)
    earlier = (index[None, :] < index[:, None])[None, :, :, None]
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2)
    marks = (rank < structure.n).reshape(m.rows, m.columns)
    return marks if keep is None else marks & keep
