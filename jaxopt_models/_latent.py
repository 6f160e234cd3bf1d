"""The leaf of a parameter in training: still a float, seen as what it will be stored as."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._axes import Axes
from ._bits import array_bits, packed_length, unpack_bits
from ._coded import Coded
from ._encoded import Encoded, Masked, is_encoded, leaf, static


@leaf
class Latent(Encoded):
    r"""A parameter in training: the float tensor, and what its encoder learns beside it.

    .. math:: \hat w = \mathrm{show}(w, \theta)

    :meth:`materialize` gives what the compressed parameter will hold, bit for bit, with the
    derivative that the encoder defines: that of its scales, offsets or clips where it learns
    some, and for the tensor the identity, perhaps inside a range only. Made by
    :func:`jaxopt_models.prepare`; :func:`jaxopt_models.compress` with the same recipe makes the
    stored leaf of it.

    Args:
      w: floating tensor `[*stack, *core]`.
      learned: arrays by name, each `[*stack, ...]`, or dicts of these.
      mask: packed as in :class:`Masked`; ``None`` if every entry is kept.
      stats: statistics that the encoder reads each time, or ``None``.
      key: random keys `[*stack]`, or ``None``.
      core: shape of the core tensor.
      out: its output axes.
      encoder: the method.
    """

    trainable: ClassVar[tuple[str, ...]] = ("w", "learned")
    w: jax.Array
    learned: dict[str, Any]
    mask: jax.Array | None
    stats: Any
    key: jax.Array | None
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    encoder: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor."""
        return self.w.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the tensor."""
        return tuple(self.w.shape[: self.w.ndim - len(self.core)])

    def keep(self) -> jax.Array | None:
        """Unpacks the mask: booleans of the shape of the tensor, or ``None``."""
        if self.mask is None:
            return None
        return unpack_bits(self.mask, self.core[-1] if self.core else 1).reshape(self.shape)

    def rebuild(self) -> jax.Array:
        """Shows one core tensor as it will be stored, with the derivative of its encoder."""
        w, given = self._given()
        shown = self.encoder.show(w, self.learned, **given)
        keep = given["keep"]
        return shown if keep is None else jnp.where(keep, shown, jnp.zeros((), shown.dtype))

    def ship(self) -> Encoded:
        """Returns the leaf to store, which holds what :meth:`materialize` shows."""
        return _ship(self)

    def _ship(self) -> Encoded:
        w, given = self._given()
        shipped = self.encoder.ship(w, self.learned, **given)
        keep = given["keep"]
        if keep is None or isinstance(shipped, Masked):
            return shipped
        return Masked.of(keep, shipped.hidden(keep))

    def _given(self) -> tuple[jax.Array, dict[str, Any]]:
        keep = self.keep()
        w = self.w if keep is None else jnp.where(keep, self.w, jnp.zeros((), self.w.dtype))
        axes = Axes(self.out)
        return w, {"axes": axes, "keep": keep, "stats": self.stats, "key": self.key}

    def specs(self, spec: Any, local: tuple[int, ...]) -> Latent:
        """Divides the tensor as said, and what is learned as the scales of the leaf to store.

        Where these cannot be divided, what is learned is only divided with the stack, as is all
        else but the mask. A shard of this is no leaf for a shard of the tensor: an encoder may
        look at all entries to show one.
        """
        axes, n = [*spec, *[None] * (self.ndim - len(spec))], len(self.stack)
        *before, last = axes[n:] or [None]
        if last is not None and local[-1] % 8:
            last = None  # a mask is divided in whole bytes
        beside = PartitionSpec(*axes[:n])
        stored = jax.eval_shape(_ship, self)
        known = dict(_meanings(stored, stored.specs(spec, local)))
        return dataclasses.replace(
            self,
            w=spec,
            learned=jax.tree.map(lambda x: known.get(tuple(x.shape), beside), self.learned),
            mask=None if self.mask is None else PartitionSpec(*axes[:n], *before, last),
            stats=jax.tree.map(lambda _: beside, self.stats),
            key=None if self.key is None else beside,
        )

    def bits_by_part(self) -> dict[str, int]:
        """Counts everything that training holds."""
        return {n: sum(map(_bits, jax.tree.leaves(part))) for n, part in self.parts().items()}

    def check(self) -> list[str]:
        """Checks the shapes of the parts, and that what is learned is finite."""
        wrong = []
        if self.mask is not None:
            n = self.core[-1] if self.core else 1
            want = self.stack + self.core[:-1] + (packed_length(n),)
            if tuple(self.mask.shape) != want:
                wrong.append(f"mask has shape {tuple(self.mask.shape)}, not {want}")
        stack = self.stack
        for path, x in jax.tree_util.tree_flatten_with_path(self.learned)[0]:
            name = f"learned{jax.tree_util.keystr(path)}"
            if tuple(x.shape[: len(stack)]) != stack:
                wrong.append(f"{name} has shape {tuple(x.shape)} for the stack {stack}")
            elif not bool(jnp.all(jnp.isfinite(x))):
                wrong.append(f"{name} holds NaN or Inf")
        return wrong


def _meanings(stored: Encoded, specs: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yields the shape of what codes mean in a leaf, and how it is divided, where it can be."""
    if specs is None:
        return
    if isinstance(stored, Coded):
        yield tuple(stored.meaning.shape), specs.meaning
        return
    for name, part in stored.parts().items():
        if is_encoded(part):
            yield from _meanings(part, getattr(specs, name))


def _bits(x: Any) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return math.prod(x.shape) * 8 * x.dtype.itemsize
    return array_bits(x)


def holds_latent(x: Any) -> bool:
    """Says whether a value is in training, perhaps with something around it."""
    while isinstance(x, Encoded) and x.around:
        x = x.values  # type: ignore[attr-defined]
    return isinstance(x, Latent)


@jax.jit
def _ship(latent: Latent) -> Encoded:
    ship = Latent._ship
    for _ in latent.stack:
        ship = jax.vmap(ship)
    return ship(latent)
