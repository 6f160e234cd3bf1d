"""Encoders applied one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ._encoded import Encoded, Masked
from ._encoder import Encoder
from ._latent import holds_latent


@dataclasses.dataclass(frozen=True)
class Chain(Encoder):
    """Encoders applied one after another; made by :func:`chain`."""

    encoders: tuple[Encoder, ...]

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Statistics that any of the encoders wants."""
        return tuple(dict.fromkeys(n for e in self.encoders for n in e.needs))

    def sides(self) -> tuple[Encoder | None, tuple[Encoder, ...]]:
        """Returns the encoders of the values as one, and the others."""
        sides = [e.sides() for e in self.encoders]
        values = [v for v, _ in sides if v is not None]
        return (chain(*values) if values else None), tuple(e for _, more in sides for e in more)

    def missing(self, w: Any, stats: Any) -> list[str]:
        """Returns the names of statistics that any of the encoders lacks."""
        return list(dict.fromkeys(n for e in self.encoders for n in e.missing(w, stats)))

    def latent(self, w: jax.Array, **given: Any) -> dict[str, Any]:
        """Returns what each encoder learns, by its number."""
        learned: dict[str, Any] = {}
        for i, encoder, x, now in self._each(w, learned, given):
            if found := encoder.latent(x, **now):
                learned[str(i)] = found
        return learned

    def show(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> jax.Array:
        """Shows what the last encoder makes of what those before it show."""
        for i, encoder, x, now in self._each(w, learned, given):
            shown = encoder.show(x, learned.get(str(i), {}), **now)
        return _hide(shown, now["keep"])

    def ship(self, w: jax.Array, learned: dict[str, Any], **given: Any) -> Encoded:
        """Encodes as :meth:`show` shows it."""
        for i, encoder, x, now in self._each(w, learned, given):
            shipped = encoder.ship(x, learned.get(str(i), {}), **now)
        keep = now["keep"]
        if keep is given["keep"] or isinstance(shipped, Masked):
            return shipped
        return Masked.of(keep, shipped.hidden(keep))

    def _each(
        self, w: jax.Array, learned: dict[str, Any], given: dict[str, Any]
    ) -> Iterator[tuple[int, Encoder, jax.Array, dict[str, Any]]]:
        """Yields each encoder and what it is given; ``learned`` holds its part afterwards."""
        key = given["key"]
        for i, encoder in enumerate(self.encoders):
            k = None if key is None else jax.random.fold_in(key, i)
            given = {**given, "key": k}
            yield i, encoder, w, given
            if i + 1 == len(self.encoders):
                break
            part = learned.get(str(i), {})
            shipped = encoder.ship(w, part, **given)
            w = _hide(encoder.show(w, part, **given), given["keep"])
            if isinstance(shipped, Masked):
                given = {**given, "keep": shipped.keep()}

    def __call__(self, w, *, axes=None, keep=None, stats=None, key=None) -> Encoded:
        """Encodes ``w`` by each encoder in turn; see :meth:`Encoder.__call__`."""
        if holds_latent(w):
            values, around = self.sides()
            if values is not None:
                w = values._again(w, axes=axes, keep=keep, stats=stats, key=key)
            for encoder in around:
                w = encoder(w, axes=axes, stats=stats, key=key)
            return w
        for i, encoder in enumerate(self.encoders):
            k = None if key is None else jax.random.fold_in(key, i)
            w = encoder(w, axes=axes, keep=keep, stats=stats, key=k)
            keep = None  # from here on the leaf carries its mask
        return w

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.encoders))})"


def chain(*encoders: Encoder) -> Encoder:
    """Composes encoders: each re-encodes the values of the leaf before it, under its mask.

    Args:
      *encoders: pruning first, then quantization or a codebook.

    Returns:
      One encoder. Compressing twice, with the first and then the second, does the same.

    Raises:
      TypeError: if anything but encoders is given.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import chain, prune, quant
      >>> small = chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=3))(jnp.arange(4.0))
      >>> small.kind()
      'Masked(Quantized)'
      >>> small.materialize()
      Array([0., 0., 2., 3.], dtype=float32)
    """
    for e in encoders:
        if not isinstance(e, Encoder):
            raise TypeError(f"chain takes encoders such as quant.Int(bits=8), got {e!r}")
    flat: list[Encoder] = []
    for e in encoders:
        flat.extend(e.encoders if isinstance(e, Chain) else [e])
    if not flat:
        raise TypeError("chain needs at least one encoder")
    return flat[0] if len(flat) == 1 else Chain(tuple(flat))


def _hide(x: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Zeroes what a mask drops; derivatives pass, as the mask may be another one next time."""
    if keep is None:
        return x

    @jax.custom_jvp
    def hidden(x: jax.Array, keep: jax.Array) -> jax.Array:
        return jnp.where(keep, x, jnp.zeros((), x.dtype))

    @hidden.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        return hidden(*primals), tangents[0]

    return hidden(x, keep)
