"""Encoders: compression methods as values."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._axes import Axes
from ._bits import is_concrete
from ._divided import division, encode_divided
from ._encoded import Encoded, Masked, is_encoded, rebuilt
from ._latent import Latent, holds_latent
from ._options import Brief


@dataclasses.dataclass(frozen=True)
class Encoder(Brief):
    """A compression method with its options: callable on one tensor.

    Subclasses are frozen dataclasses whose options are hashable, and define
    :meth:`encode` for one core tensor. Checking, stack axes, leaves encoded before and
    compilation are done here, once.
    """

    #: Names of the statistics that :meth:`encode` wants in ``stats``.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Whether this only puts something around a parameter, whose values others encode.
    around: ClassVar[bool] = False

    def encode(
        self,
        w: jax.Array,
        *,
        axes: Axes,
        keep: jax.Array | None,
        stats: Any,
        key: jax.Array | None,
    ) -> Encoded:
        """Encodes one core tensor; must be traceable by `jit` and `vmap`.

        Args:
          w: floating tensor, zero wherever ``keep`` is false.
          axes: resolved roles of its axes (no stack).
          keep: booleans of the shape of ``w``, the mask of an earlier step, or ``None``.
          stats: statistics of this parameter, or ``None``.
          key: random key, or ``None``.

        Returns:
          A leaf with ``core == w.shape``.
        """
        raise NotImplementedError

    def latent(self, w: jax.Array, **given: Any) -> dict[str, Any]:
        """Returns what training learns beside one core tensor, as it begins.

        Args:
          w: floating tensor, zero wherever ``keep`` is false.
          **given: ``axes``, ``keep``, ``stats`` and ``key``, as for :meth:`encode`.

        Returns:
          Arrays by name; by default none.
        """
        return {}

    def show(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> jax.Array:
        """Returns what one core tensor will be, with the derivative that training sees.

        Args:
          w: floating tensor, zero wherever ``keep`` is false.
          learned: of the structure that :meth:`latent` returned.
          **given: as for :meth:`encode`.

        Returns:
          What :meth:`ship` stores, bit for bit. By default derivatives pass to ``w`` as if
          nothing had happened.
        """

        @jax.custom_jvp
        def shown(w: jax.Array, learned: Any, keep: Any, stats: Any, key: Any) -> jax.Array:
            rest = {"keep": keep, "stats": stats, "key": key}
            return self.ship(w, learned, axes=given["axes"], **rest).rebuild()

        @shown.defjvp
        def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            return shown(*primals), tangents[0]

        return shown(w, learned, given["keep"], given["stats"], given["key"])

    def ship(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> Encoded:
        """Encodes one core tensor with what was learned; see :meth:`show`."""
        return self.encode(w, **given)

    def sides(self) -> tuple[Encoder | None, tuple[Encoder, ...]]:
        """Returns what encodes the values of a parameter, and what goes around them."""
        return (None, (self,)) if self.around else (self, ())

    def slices(self, shape: tuple[int, ...], axes: Axes) -> int | None:
        """Returns in slices of how many entries along the first axis a tensor can be encoded.

        Slices of any multiple of that number, encoded one by one, give the codes of the whole
        tensor, bit for bit; what belongs to runs goes side by side.

        Args:
          shape: of the tensor, stack axes included.
          axes: resolved roles of its axes.

        Returns:
          The number; that of all entries where only the whole tensor can be encoded, but in one
          program without statistics or key; ``None`` where neither is known.
        """
        return None

    def missing(self, w: Any, stats: Any) -> list[str]:
        """Returns the names of needed statistics that are not there; a trained leaf needs none."""
        if holds_latent(w):
            return []
        return [n for n in self.needs if stats is None or n not in stats.names]

    def __call__(
        self,
        w: jax.Array | Encoded,
        *,
        axes: Axes | None = None,
        keep: jax.Array | None = None,
        stats: Any = None,
        key: jax.Array | None = None,
    ) -> Encoded:
        """Encodes a tensor, or re-encodes what an earlier encoder made of it.

        Args:
          w: floating tensor, or a leaf. The values of a :class:`Masked` leaf are encoded
            under its mask; a :class:`Latent` leaf made by this encoder becomes what it shows; any
            other leaf is rebuilt and encoded anew.
          axes: roles of the axes; default: last is out, no stack.
          keep: booleans of the shape of ``w``; entries that are false become zero and stay
            so, in a :class:`Masked` leaf.
          stats: statistics from calibration, for encoders with ``needs``.
          key: random key, for encoders that draw.

        Returns:
          The leaf that stands for ``w``.

        Raises:
          TypeError: if ``w`` is not floating.
          ValueError: if ``w`` is empty, holds NaN or Inf, or the options do not fit it.
        """
        if is_encoded(w):
            return self._again(w, axes=axes, keep=keep, stats=stats, key=key)
        new = self._encode(w, axes=axes, keep=keep, stats=stats, key=key)
        if keep is None or isinstance(new, Masked):
            return new
        return masked(keep, new, len(new.stack))

    def _encode(self, w: jax.Array, *, axes: Any, keep: Any, stats: Any, key: Any) -> Encoded:
        check_tensor(w)
        axes = (axes or Axes()).resolve(w.ndim)
        if keep is not None:
            check_keep(keep, w.shape)
            w = jnp.where(keep, w, jnp.zeros((), w.dtype))
        return _held(self.run(jnp.asarray(w), axes, keep, stats, key))

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Encoded:
        """Runs :meth:`encode` over the stack axes, compiled once for each shape."""
        if (sharding := division(w)) is None:
            return _run(self, axes, w, keep, stats, key)
        run = _run_of(axes)
        return encode_divided(self, run, sharding, axes, w, keep, stats, key)

    def partition(self, spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """Returns how a tensor is best divided while it is encoded.

        Args:
          spec: how it is divided, an entry for each axis.
          shape: its shape.
          axes: resolved roles of its axes.

        Returns:
          A partition in which :meth:`encode` needs no entry of another shard, or few of them.
        """
        return spec

    def over(self, sharding: NamedSharding) -> Encoder:
        """Returns the encoder that encodes a tensor divided so; it gives the same bits."""
        return self

    def _again(self, old: Encoded, *, axes: Any, keep: Any, stats: Any, key: Any) -> Encoded:
        axes = axes or Axes(stack=len(old.stack))
        if axes.stack != len(old.stack):
            raise ValueError(f"axes say stack={axes.stack}, the leaf has stack axes {old.stack}")
        if old.around:
            values = self(old.values, axes=axes, keep=keep, stats=stats, key=key)
            return dataclasses.replace(old, values=values)
        if isinstance(old, Latent):
            return self._trained(old, keep)
        if not isinstance(old, Masked):
            new = self._encode(old.materialize(), axes=axes, keep=keep, stats=stats, key=key)
            if isinstance(new, Masked):
                raise ValueError(
                    f"{self} would prune a {old.kind()} leaf and lose its codes; prune first, "
                    f"then encode: chain({type(self).__name__}(...), ...)"
                )
            return new if keep is None else masked(keep, new, len(old.stack))
        if keep is not None:
            check_keep(keep, old.shape)
        mask = old.keep() if keep is None else jnp.logical_and(old.keep(), keep)
        values = rebuilt(old.values)
        new = self._encode(values, axes=axes, keep=mask, stats=stats, key=key)
        if isinstance(new, Masked):
            if is_encoded(old.values):
                raise ValueError(
                    f"{self} would prune a {old.kind()} leaf and lose its codes; prune first"
                )
            return new
        if keep is not None:
            return masked(mask, new, len(old.stack))
        return Masked(old.mask, new, old.core)

    def _trained(self, old: Latent, keep: Any) -> Encoded:
        if old.encoder != self:
            raise ValueError(
                f"it was prepared for {old.encoder}, not for {self}; compress it with the recipe "
                "that prepare was given"
            )
        if keep is not None:
            raise ValueError("a prepared parameter keeps the mask it has; give keep= to prepare")
        return _held(old.ship())


def _held(leaf: Encoded) -> Encoded:
    """Returns a leaf, or raises if its parts cannot hold what was encoded."""
    if why := leaf.lost():
        raise ValueError(why)
    return leaf


def masked(keep: jax.Array, values: Any, stack: int) -> Masked:
    """Puts a mask over values with so many stack axes."""
    of = Masked.of
    for _ in range(stack):
        of = jax.vmap(of)
    return of(keep, values)


@functools.lru_cache(maxsize=64)
def _run_of(axes: Axes) -> Any:
    """Returns :func:`_run` for given axes, the same each time: programs are kept by it."""
    return lambda encoder, *args: _run(encoder, axes, *args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(encoder: Encoder, axes: Axes, w: Any, keep: Any, stats: Any, key: Any) -> Encoded:
    core = Axes(axes.out)
    if key is not None and axes.stack:
        key = jax.random.split(key, w.shape[: axes.stack])

    def one(w, keep, stats, key):
        leaf = encoder.encode(w, axes=core, keep=keep, stats=stats, key=key)
        return leaf if keep is None else leaf.hidden(keep)

    for _ in range(axes.stack):
        one = jax.vmap(one)
    return one(w, keep, stats, key)


def check_keep(keep: Any, shape: tuple[int, ...]) -> None:
    """Raises unless ``keep`` is a boolean array of the shape of the tensor."""
    if getattr(keep, "dtype", None) != jnp.bool_:
        raise TypeError(f"keep must be a boolean array, got {type(keep).__name__}: {keep!r:.60}")
    if tuple(keep.shape) != tuple(shape):
        raise ValueError(f"keep has shape {tuple(keep.shape)}, the tensor has {tuple(shape)}")


def check_tensor(w: Any) -> None:
    """Raises unless ``w`` is a floating, non-empty and (where it can be seen) finite tensor."""
    if not hasattr(w, "dtype") or not hasattr(w, "shape"):
        raise TypeError(f"expected an array, got {type(w).__name__}: {w!r:.60}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"expected a real floating tensor, got {w.dtype}; keep it dense (None)")
    if math.prod(w.shape) == 0:
        raise ValueError(f"the tensor is empty, shape {tuple(w.shape)}; keep it dense (None)")
    # Under a trace even the count of a constant is not known yet.
    bad = not_finite(w) if is_concrete(w) else 0
    if is_concrete(bad) and int(bad):
        raise ValueError(
            f"{int(bad)} of {math.prod(w.shape)} entries are NaN or Inf; repair the weights first "
            "(a diverged training run, or a mask applied as -inf)"
        )


@jax.jit
def not_finite(w: jax.Array) -> jax.Array:
    """Counts NaN and Inf."""
    return jnp.sum(~jnp.isfinite(w))
