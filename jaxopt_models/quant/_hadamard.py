"""Rotation before rounding: outliers are spread over all inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._axes import Axes, Matrix
from .._bits import pack_bits, wide_dtype
from .._divided import on_outputs
from .._encoded import Encoded
from .._encoder import Encoder
from ._rotated import Rotated, block_of, rotate
from ._rows import check_finite, check_stats, with_squares

# What a statistic of rotated inputs is made of.
_FROM = {"gram": "gram", "l2": "gram", "mean": "mean"}


@dataclasses.dataclass(frozen=True)
class Hadamard(Encoder):
    r"""Rotates a tensor along its inputs by random signs and a Hadamard matrix, then encodes it.

    .. math:: w = R^\top v, \qquad v \approx \mathrm{enc}(R w)

    A rotation spreads an outlier over all weights of its column, whose range gets smaller, and
    changes no squared error; see :class:`Rotated`. It is undone where the tensor is rebuilt, so
    the model stays as it is. An encoder that takes statistics gets those of rotated inputs,
    :math:`R G R^\top` for the gram :math:`G`: ``Hadamard(GPTQ(Int(bits=3)))``.

    Encoding again may move the values. Pruned tensors are refused: rotated, they have no zeros.

    Args:
      fmt: encoder of the rotated tensor.

    Raises:
      TypeError: if ``fmt`` is no encoder.
      ValueError: if ``fmt`` needs a statistic that rotated inputs have not; when called without
        ``key``, with a mask, for a tensor with an odd number of inputs, or if a statistic is
        missing or holds NaN or Inf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jax.random.normal(jax.random.key(0), (64, 8)).at[3].multiply(50)
      >>> error = lambda q: jnp.mean((w - q.materialize()) ** 2)
      >>> small = quant.Hadamard(quant.Int(bits=4))(w, key=jax.random.key(1))
      >>> small.kind(), bool(error(small) < error(quant.Int(bits=4)(w)) / 2)
      ('Rotated(Quantized)', True)

    References:
      Tseng et al., `QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice
      Codebooks <https://arxiv.org/abs/2402.04396>`_, 2024
    """

    fmt: Encoder

    def __post_init__(self) -> None:
        if not isinstance(self.fmt, Encoder):
            raise TypeError(f"Hadamard: fmt={self.fmt!r} is no encoder such as quant.Int(bits=4)")
        if unknown := [n for n in self.fmt.needs if n not in _FROM]:
            raise ValueError(
                f"Hadamard: {self.fmt!r} needs {unknown} of the rotated inputs, which only "
                f"{sorted(_FROM)} can be had of"
            )

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The statistics that those of ``fmt`` are made of."""
        return tuple(dict.fromkeys(_FROM[n] for n in self.fmt.needs))

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Checks the statistics, and encodes."""
        if self.needs:
            check_stats(stats, axes, w.shape, "Hadamard")
            if missing := [n for n in self.needs if n not in stats.states]:
                raise ValueError(
                    f"{self} needs the statistics {missing}; it was given {stats.names}"
                )
            check_finite(stats, "Hadamard")
        return super().run(w, axes, keep, stats, key)

    def partition(self, spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """Divides the outputs, each of which needs all of its inputs."""
        return on_outputs(spec, shape, axes)

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Rotated:
        """Encodes one core tensor; see :class:`Hadamard`."""
        m = Matrix(tuple(w.shape), axes.out)
        self._check(m, keep, key)
        first, second = jax.random.split(key)
        flips = jax.random.bernoulli(first, shape=(m.rows,))
        turned = m.unview(rotate(m.view(w.astype(wide_dtype(w.dtype))), flips))
        seen = _rotated(stats, flips) if self.needs else None
        values = self.fmt(turned, axes=axes, stats=seen, key=second)
        return Rotated(values, pack_bits(flips), m.core, m.out, str(jnp.dtype(w.dtype)))

    def _check(self, m: Matrix, keep: Any, key: Any) -> None:
        if keep is not None:
            raise ValueError(
                f"{self} cannot keep a pruned tensor: its zeros would not survive a rotation; use "
                f"{self.fmt!r}, or prune what is rotated: Hadamard(chain(Magnitude(...), ...))"
            )
        if key is None:
            raise ValueError(f"{self} draws signs; give key=jax.random.key(0)")
        if sum(block_of(m.rows)) == 2:
            raise ValueError(
                f"{self}: no Hadamard matrix divides {m.rows} inputs (shape {m.core}, out axes "
                f"{m.out}), an odd number; use {self.fmt!r} for this parameter"
            )


def _rotated(stats: Any, flips: jax.Array) -> Any:
    """Returns the statistics of inputs after the rotation."""

    def along(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(rotate(jnp.moveaxis(x, axis, 0), flips), 0, axis)

    states = {n: s for n, s in stats.states.items() if n == "count"}
    for n in ("gram", "drift"):  # products of inputs with inputs
        if n in stats.states:
            states[n] = along(along(stats.states[n], -1), -2)
    if "gram" in states:
        states["gram"] = (states["gram"] + states["gram"].swapaxes(-1, -2)) / 2
    if "mean" in stats.states:
        states["mean"] = along(stats.states["mean"], -1)
    found = dataclasses.replace(stats, states=states, others=())
    return with_squares(found) if "gram" in states else found
