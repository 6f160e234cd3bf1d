"""Parameters that also say how their input is quantized."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .._axes import Axes
from .._bits import is_concrete, wide_dtype
from .._encoded import Encoded, divided, faults, is_encoded, leaf, rebuilt, static
from .._encoder import Encoder, check_keep, check_tensor, masked
from .._jaxpr import varying
from .._options import flag, width
from .._statistics import Bins
from ._grid import divide, positive, quotient
from ._observers import MinMax, Observer
from ._rows import check_shape


class Reader(Encoded):
    """A parameter, dense or compressed, that says what becomes of the input it is multiplied with.

    A subclass has the fields ``values``, array or leaf `[*stack, *core]`, and ``core``; each other
    part is an array `[*stack]`. :meth:`materialize` sees the values only.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values",)
    around: ClassVar[bool] = True
    values: Any

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the values."""
        return self.values.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the values."""
        return tuple(self.values.shape[: len(self.values.shape) - len(self.core)])

    def rebuild(self) -> jax.Array:
        """Returns the values of one core tensor."""
        return rebuilt(self.values)

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides the values as the tensor, and all else with the stack."""
        values = divided(self.values, spec, local)
        grid = PartitionSpec(*[*spec][: len(self.stack)])
        rest = {k: grid for k in self.parts() if k != "values"}
        return None if values is None else dataclasses.replace(self, values=values, **rest)

    def check(self) -> list[str]:
        """Checks the values, and the shapes of the other parts."""
        wrong = faults(self.values)
        for name, part in self.parts().items():
            if name != "values" and tuple(part.shape) != self.stack:
                wrong.append(f"{name} has shape {tuple(part.shape)}, not {self.stack}")
        return wrong


@leaf
class WithInput(Reader):
    """A parameter, dense or compressed, and the integers its input is rounded to.

    :meth:`materialize` sees the values only. The input is rounded where the parameter is
    multiplied with one, in :func:`jaxopt_models.accelerate` and
    :func:`jaxopt_models.simulate`; see :class:`Input`.

    Args:
      values: array `[*stack, *core]`, or a leaf of that shape.
      scale: `float32` `[*stack]`; ``None`` where each input has its own.
      zero_point: `float32` `[*stack]`; ``None`` if symmetric or ``scale`` is ``None``.
      core: shape of the core tensor.
      bits: width of an input.
      per: see :class:`Input`.
      symmetric: see :class:`Input`.
    """

    values: Any
    scale: jax.Array | None
    zero_point: jax.Array | None
    core: tuple[int, ...] = static()
    bits: int = static()
    per: str = static()
    symmetric: bool = static()

    def read(self, x: jax.Array, row: tuple[int, ...], over: tuple[str, ...]) -> jax.Array:
        """Rounds an input to the grid."""
        wide = x.astype(wide_dtype(x.dtype))
        scale, zero = self.grid(wide, row, over)
        return _round(wide, scale, zero, self.bits, self.symmetric).astype(x.dtype)

    def grid(
        self, x: jax.Array, row: tuple[int, ...], over: tuple[str, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns scale and zero point of an input of at least `float32`; see :meth:`read`."""
        scale, zero = self.scale, self.zero_point
        if scale is None:
            axes = row if self.per == "row" else tuple(range(x.ndim))
            low = jnp.min(x, axis=axes, keepdims=True, initial=0)
            high = jnp.max(x, axis=axes, keepdims=True, initial=0)
            low, high = jax.lax.stop_gradient((low, high))
            # The whole input is that of all devices which have a part of it.
            over = over if self.per == "row" else tuple(sorted(varying(x)))
            if over:
                low, high = -jax.lax.pmax(-low, over), jax.lax.pmax(high, over)
            return grid(low, high, self.bits, self.symmetric)
        if scale.size > 1:
            raise ValueError(
                f"an input scale for each of {scale.shape} stacked tensors, used at once; use "
                "per='row' or 'tensor' for this parameter"
            )
        return scale, zero


@dataclasses.dataclass(frozen=True)
class Input(Encoder):
    r"""Rounds the input of a parameter to integers; the parameter stays as it is.

    .. math:: \hat x = s \, (\mathrm{clip}(\mathrm{round}(x / s) + z) - z)

    Composed with an encoder of the values it makes both operands of a product integers:
    ``chain(quant.Int(bits=8), quant.Input(bits=8))``. The derivative passes where the input is
    inside the grid.

    Args:
      bits: width of an input, 2 to 8.
      per: what shares a grid: ``"row"``, one sample (a token; an example of a convolution);
        ``"tensor"``, the whole input (under `vmap` that of each element), both chosen anew for
        every input; ``"static"``, all inputs, chosen from the statistics of calibration.
      symmetric: a grid around zero, or one between the least and the greatest input.
      observer: how a static range is chosen; by default all of it.

    Raises:
      TypeError: for options of another type.
      ValueError: for a width outside 2 to 8, another ``per``, or, when called, a static grid
        without statistics, or of a parameter that calibration did not reach.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"w": jnp.eye(2)}, [jom.Rule("w", jom.quant.Input(bits=2))])
      >>> jom.simulate(lambda p, x: x @ p["w"])(small, jnp.array([[1.0, -0.9], [0.1, 0.2]]))
      Array([[ 1. , -1. ],
             [ 0. ,  0.2]], dtype=float32)

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference <https://arxiv.org/abs/1712.05877>`_, 2018
    """

    around: ClassVar[bool] = True
    bits: int
    _: dataclasses.KW_ONLY
    per: Literal["row", "tensor", "static"] = "row"
    symmetric: bool = True
    observer: Observer = MinMax()  # noqa: RUF009 (a frozen value)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", width(self.bits, "Input: bits"))
        if not isinstance(self.observer, Observer):
            raise TypeError(f"Input: observer={self.observer!r} is no observer such as MSE()")
        if self.per not in ("row", "tensor", "static"):
            raise ValueError(f"Input: per={self.per!r} is not 'row', 'tensor' or 'static'")
        flag(self.symmetric, "Input: symmetric")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The range of the input, where it is fixed."""
        return (self.observer.watches,) if self.per == "static" else ()

    def __call__(
        self,
        w: Any,
        *,
        axes: Axes | None = None,
        keep: Any = None,
        stats: Any = None,
        key: Any = None,
    ) -> WithInput:
        """Puts the grid around ``w``; see :class:`Input`."""
        if stats is None and self._made(w):
            return w
        values, stack = inside(w, axes, keep, str(self))
        scale = zero = None
        if self.per == "static":
            bounds = self.bounds(stats, tuple(values.shape), stack)
            scale, zero = _grid(*bounds, self.bits, self.symmetric)
        core = tuple(values.shape[stack:])
        return WithInput(values, scale, zero, core, self.bits, self.per, self.symmetric)

    def _made(self, w: Any) -> bool:
        """Says whether a leaf has this grid around it."""
        mine = (self.bits, self.per, self.symmetric)
        return isinstance(w, WithInput) and (w.bits, w.per, w.symmetric) == mine

    def missing(self, w: Any, stats: Any) -> list[str]:
        """Returns the statistics that are needed and not there."""
        return [] if stats is None and self._made(w) else super().missing(None, stats)

    def bounds(
        self, stats: Any, shape: tuple[int, ...], stack: int, *, instead: str = "per='row'"
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the range of a static grid for each stacked tensor, zero in it.

        Args:
          stats: of the inputs of the parameter.
          shape: its shape.
          stack: number of its stack axes.
          instead: the option that needs no statistics, for messages.
        """
        watched = self.observer.watches
        if stats is None or watched not in stats.names:
            raise ValueError(f"{self} needs the statistics {[watched]}; calibrate first")
        check_shape(stats, shape, stack)
        _check_seen(stats, stack, instead)
        return _bounds(self, stack, getattr(stats, watched))


def _check_seen(stats: Any, stack: int, instead: str) -> None:
    """Raises where a parameter, or one of a stack, met no input, as far as that can be seen."""
    tally = stats.states.get("count")
    if tally is None or not (is_concrete(tally.low) and is_concrete(tally.high)):
        return
    seen = (np.asarray(tally.low) > 0) | (np.asarray(tally.high) > 0)
    seen = seen.any(axis=tuple(range(stack, seen.ndim)))
    if seen.all():
        return
    which = "it"
    if stack:
        names = [str(i[0] if stack == 1 else tuple(i)) for i in np.argwhere(~seen).tolist()]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        which = f"{', '.join(names[:8])}{more} of its stack {seen.shape}"
    raise ValueError(
        f"calibration did not reach {which}, so there is no range to start from; calibrate on "
        f"batches that do, or give {instead}"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bounds(encoder: Input, stack: int, seen: Any) -> tuple[jax.Array, jax.Array]:
    """Chooses a range for each stacked tensor; grouped inputs share one."""
    bits, symmetric = encoder.bits, encoder.symmetric
    if isinstance(seen, Bins):
        seen = seen.pooled(tuple(range(stack, seen.exponent.ndim)))

    def rounding(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return _round(x, *grid(low, high, bits, symmetric), bits, symmetric)

    def one(seen: Any) -> tuple[jax.Array, jax.Array]:
        low, high = encoder.observer.of_input(seen, rounding, 2 ** (bits - symmetric))
        # No input was seen: that has raised, unless under jit; then any grid will do.
        hit = low <= high
        low, high = jnp.where(hit, low, 0), jnp.where(hit, high, 0)
        return jnp.minimum(low, 0), jnp.maximum(high, 0)

    for _ in range(stack):
        one = jax.vmap(one)
    return one(seen)


def inside(w: Any, axes: Axes | None, keep: Any, who: str) -> tuple[Any, int]:
    """Returns the values that something is put around, and the number of their stack axes."""
    if is_encoded(w):
        if keep is not None:
            raise ValueError(f"{who} keeps the values as they are; give keep= to their encoder")
        stack = len(w.stack)
        if axes is not None and axes.stack != stack:
            raise ValueError(f"axes say stack={axes.stack}, the leaf has stack axes {w.stack}")
        return w.values if isinstance(w, Reader) else w, stack
    check_tensor(w)
    values, stack = jnp.asarray(w), (axes or Axes()).resolve(jnp.ndim(w)).stack
    if keep is not None:
        check_keep(keep, w.shape)
        values = masked(keep, jnp.where(keep, values, jnp.zeros((), w.dtype)), stack)
    return values, stack


def grid(low: Any, high: Any, bits: int, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """Returns scale and zero point of the integers between two values, zero among them."""
    if symmetric:
        return positive(divide(jnp.maximum(-low, high), 2 ** (bits - 1) - 1)), None
    scale = positive(divide(high - low, 2**bits - 1))
    return scale, jnp.round(-low / scale)


_grid = functools.partial(jax.jit, static_argnums=(2, 3))(grid)


def _round(x: jax.Array, scale: Any, zero: Any, bits: int, symmetric: bool) -> jax.Array:
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    scale = scale.reshape((1,) * x.ndim if scale.size == 1 else scale.shape)
    zero = jnp.zeros_like(scale) if zero is None else zero.reshape(scale.shape)

    @jax.custom_jvp
    def rounded(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        return scale * (jnp.clip(jnp.round(quotient(x, scale)) + zero, low, high) - zero)

    @rounded.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x, scale, zero = primals
        q = quotient(x, scale) + zero
        inside = (q >= low - 0.5) & (q <= high + 0.5)
        return rounded(*primals), jnp.where(inside, tangents[0], 0)

    return rounded(x, scale, zero)
