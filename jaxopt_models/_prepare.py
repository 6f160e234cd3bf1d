"""From parameters to what training with learned quantizers needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Axes
from ._bits import pack_bits
from ._chain import Chain
from ._compress import check_key, encode
from ._encoded import Encoded, Masked, is_encoded, rebuilt
from ._encoder import Encoder, check_keep, check_tensor
from ._latent import Latent
from ._paths import flatten
from ._recipe import Rule, decide


def prepare(
    params: Any,
    recipe: Sequence[Rule],
    *,
    stats: Any = None,
    key: jax.Array | None = None,
) -> Any:
    r"""Replaces the parameters a recipe names by floats that are seen as what they will become.

    Each of them becomes a :class:`Latent`, which holds the float tensor and what its encoder
    learns, such as the steps of :class:`jaxopt_models.quant.LSQ`. :func:`materialize` gives the
    values that the compressed parameter will hold, bit for bit, with the derivative that the
    encoder defines. So any training loop can be used:

    .. code-block:: python

       trainable, rest = jom.partition(jom.prepare(params, recipe))
       loss = lambda t, x: loss_of(jom.simulate(fn)(jom.combine(t, rest), x))
       ...                                                   # any optax optimizer on trainable
       small = jom.compress(jom.combine(trainable, rest), recipe)

    Encoders of inputs are put around it, as :func:`compress` does. A pruned parameter keeps its
    mask; one that is compressed otherwise begins at its rebuilt values, and one that was prepared
    before at its float tensor.

    Args:
      params: pytree of arrays, or compressed.
      recipe: rules, as for :func:`compress`.
      stats: ``{path: statistics}`` from calibration, for encoders that need them.
      key: random key for encoders that draw. They draw the same each time the tree is shown;
        where each step should draw anew, call ``prepare`` in the step, or
        :func:`straight_through`.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: for what :func:`compress` raises, and for pruning across the layers of a stack.
      TypeError: for an encoder that is neither of values nor of inputs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> recipe = [jom.Rule("w", jom.quant.LSQ(bits=4))]
      >>> latents = jom.prepare({"w": jnp.array([[0.1], [-0.7], [0.4]])}, recipe)
      >>> trainable, rest = jom.partition(latents)
      >>> loss = lambda t: jnp.sum(jom.materialize(jom.combine(t, rest))["w"] ** 2)
      >>> sorted(jax.grad(loss)(trainable)["w"].learned)
      ['step']
      >>> small = jom.compress(latents, recipe)
      >>> bool((small["w"].materialize() == latents["w"].materialize()).all())
      True
    """
    check_key(key, "prepare")
    leaves, unflatten = flatten(params)
    values = []
    for d in decide(leaves, recipe, who="prepare"):
        if d.rule is not None and d.encoder is not None:
            rule = dataclasses.replace(d.rule, encoder=_Preparing(d.encoder))
            d = dataclasses.replace(d, rule=rule)
            values.append(encode(d, stats=stats, key=key, who="prepare"))
        else:
            values.append(d.parameter.value)
    return unflatten(values)


@dataclasses.dataclass(frozen=True)
class _Preparing(Encoder):
    """Puts a parameter into training instead of encoding it."""

    encoder: Encoder

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.encoder.needs

    def __call__(
        self, w: Any, *, axes: Any = None, keep: Any = None, stats: Any = None, key: Any = None
    ) -> Encoded:
        values, around = self.encoder.sides()
        if values is not None:
            w = _latent(values, w, axes, keep, stats, key)
        for encoder in around:
            w = encoder(w, axes=axes, stats=stats, key=key)
        return w

    def __repr__(self) -> str:
        return repr(self.encoder)


def _latent(encoder: Encoder, w: Any, axes: Any, keep: Any, stats: Any, key: Any) -> Encoded:
    if is_encoded(w):
        axes = axes or Axes(stack=len(w.stack))
        if axes.stack != len(w.stack):
            raise ValueError(f"axes say stack={axes.stack}, the leaf has stack axes {w.stack}")
        if w.around:
            values = _latent(encoder, w.values, axes, keep, stats, key)
            return dataclasses.replace(w, values=values)
        if isinstance(w, (Masked, Latent)):
            kept = w.keep()
            keep = kept if keep is None or kept is None else jnp.logical_and(kept, keep)
        values = w.values if isinstance(w, Masked) else w.w if isinstance(w, Latent) else w
        w = rebuilt(values)
    check_tensor(w)
    w, given = jnp.asarray(w), axes
    axes = (axes or Axes()).resolve(w.ndim)
    if keep is not None:
        check_keep(keep, w.shape)
        w = jnp.where(keep, w, jnp.zeros((), w.dtype))
    steps = encoder.encoders if isinstance(encoder, Chain) else (encoder,)
    _check(steps, axes)
    # What compress would refuse is refused now.
    jax.eval_shape(lambda w: encoder(w, axes=given, keep=keep, stats=stats, key=key), w)
    if key is not None and axes.stack:
        key = jax.random.split(key, w.shape[: axes.stack])
    learned = _begin(encoder, axes, w, keep, stats, key)
    each_time = [e for e in steps if type(e).show is Encoder.show]
    return Latent(
        w,
        learned,
        None if keep is None else pack_bits(jnp.atleast_1d(keep)),
        stats if any(e.needs for e in each_time) else None,
        key if each_time else None,
        core=tuple(w.shape[axes.stack :]),
        out=axes.out,
        encoder=encoder,
    )


def _check(steps: Sequence[Encoder], axes: Axes) -> None:
    for e in steps:
        if type(e).encode is Encoder.encode and type(e).ship is Encoder.ship:
            raise TypeError(f"{e} encodes no values, and cannot be prepared")
        if getattr(e, "across_stack", False) and axes.stack:
            raise ValueError(
                f"{e} ranks the layers of a stack together, which a loop over them cannot; prune "
                "first, and prepare what is left"
            )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(encoder: Encoder, axes: Axes, w: Any, keep: Any, stats: Any, key: Any) -> Any:
    def one(w: Any, keep: Any, stats: Any, key: Any) -> dict[str, Any]:
        return encoder.latent(w, axes=Axes(axes.out), keep=keep, stats=stats, key=key)

    for _ in range(axes.stack):
        one = jax.vmap(one)
    return one(w, keep, stats, key)
