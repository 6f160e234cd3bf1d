"""Applying a recipe to a tree of parameters."""

from __future__ import annotations

import collections
import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Axes
from ._bits import is_concrete
from ._encoded import is_encoded
from ._encoder import Encoder
from ._paths import flatten
from ._progress import bar
from ._recipe import Decision, Rule, decide


def compress(
    params: Any,
    recipe: Sequence[Rule],
    *,
    stats: Any = None,
    key: jax.Array | None = None,
    donate: bool = False,
    progress: bool = False,
) -> Any:
    """Replaces the parameters a recipe names by their encodings.

    The path of every floating parameter is matched against the rules in order, and the
    first match decides. Batch statistics, counters and random keys pass through, as does
    what no rule names. Nothing is mutated.

    Args:
      params: pytree of arrays: a linen ``variables`` or ``variables["params"]``, an nnx state,
        a dict; or a tree that is compressed already. NumPy arrays count as what JAX makes of
        them: `float64` as `float32` unless x64 is enabled.
      recipe: rules, most specific first.
      stats: ``{path: statistics}`` from calibration, for encoders that need them.
      key: random key for encoders that draw; each path gets its own.
      donate: delete each dense array once its last use is encoded, so that the peak is that of the
        compressed tree plus one leaf. ``params`` must not be used afterwards.
      progress: show a bar, a step for each leaf.

    Returns:
      A tree of the same structure with :class:`Encoded` leaves where a rule applied.

    Raises:
      ValueError: if a rule decides no leaf, or a parameter cannot be encoded as told; the
        message names the path.
      TypeError: if the recipe is none, the key is none, or a rule names a complex parameter.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> small = jom.compress(params, [jom.Rule(".*/kernel", jom.quant.Int(bits=8))])
      >>> type(small["dense"]["kernel"]).__name__
      'Quantized'
      >>> jom.compress(params, [jom.Rule(".*/kernl", jom.quant.Int(bits=8))])
      Traceback (most recent call last):
        ...
      ValueError: compress: rule 0 ('.*/kernl'): it matches no parameter. Paths are: dense/bias, dense/kernel
    """  # noqa: E501
    check_key(key, "compress")
    leaves, unflatten = flatten(params)
    decisions = decide(leaves, recipe, who="compress")
    values = []
    uses = collections.Counter(id(p.value) for p in leaves)  # tied weights are one array
    with bar("compress", len(decisions), show=progress) as advance:
        for d in decisions:
            new = old = d.parameter.value
            if d.encoder is not None:
                new = encode(d, stats=stats, key=key, who="compress")
                uses[id(old)] -= 1
                if donate and not uses[id(old)] and isinstance(old, jax.Array) and is_concrete(old):
                    jax.block_until_ready(new)
                    _delete(old, new)
            values.append(new)
            advance(d.parameter.path)
    return unflatten(values)


def encode(d: Decision, *, stats: Any, key: jax.Array | None, who: str) -> Any:
    """Applies the encoder of one decision, naming the path in every error."""
    path, encoder = d.parameter.path, d.encoder
    assert encoder is not None and d.rule is not None
    with named(f"{who}: {path}"):
        found = None if stats is None else stats.get(path)
        if missing := encoder.missing(d.parameter.value, found):
            raise ValueError(f"{encoder} needs the statistics {missing}; calibrate and pass stats=")
        axes = d.rule.axes or seen_axes(found, d.parameter.value)
        return encoder(d.parameter.value, axes=axes, stats=found, key=fold(key, path))


def seen_axes(stats: Any, w: Any) -> Axes | None:
    """Returns the roles of axes that statistics say, or raises if those are of another tensor."""
    axes: Axes | None = getattr(stats, "axes", None)
    if axes is not None and hasattr(w, "ndim"):
        try:
            axes.resolve(w.ndim)
        except ValueError as e:
            raise ValueError(
                f"the statistics are of a parameter with {axes}, its shape is {tuple(w.shape)}; "
                "calibrate this model"
            ) from e
    return axes


def check_key(key: Any, who: str) -> None:
    """Raises unless ``key`` is one random key, or ``None``."""
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    if key is None or (ndim == 0 and jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        return
    if not (ndim == 1 and dtype == jnp.uint32):  # a key of `jax.random.PRNGKey`
        what = f"{key!r:.60}" if dtype is None else f"{dtype}{list(key.shape)}"
        raise TypeError(f"{who}: key={what} is no random key; give jax.random.key(0)")


def fold(key: jax.Array | None, path: str) -> jax.Array | None:
    """Derives the key of a path, the same in every process."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()))


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Puts ``where`` before the message of a `ValueError` or `TypeError`."""
    try:
        yield
    except (ValueError, TypeError) as e:
        if type(e) not in (ValueError, TypeError):  # JAX's own, which take more than a message
            e.add_note(where)
            raise
        raise type(e)(f"{where}: {e}") from e


def _delete(dense: jax.Array, new: Any) -> None:
    # A leaf may hold the very array (values that nothing dropped); then it lives on.
    if not any(part is dense for part in jax.tree.leaves(new)) and not dense.is_deleted():
        dense.delete()


def straight_through(recipe: Sequence[Rule]) -> Callable[..., Any]:
    r"""Makes the function that shows training what a recipe does to the parameters.

    .. math:: w \mapsto \mathrm{materialize}(\mathrm{enc}(w)), \qquad
              \partial w \mapsto \partial w

    Forward values are bit for bit those of the compressed tree; derivatives pass as if
    nothing had happened, in forward and in reverse mode. Inserted before a loss it gives
    quantization-aware, pruned and shared-weight training.

    Args:
      recipe: rules, as for :func:`compress`.

    Returns:
      ``(params, key=None) -> params``, dense to dense.

    Raises:
      ValueError: when called, for what :func:`compress` raises.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> show = jom.straight_through([jom.Rule("w", jom.prune.Magnitude(sparsity=0.5))])
      >>> loss = lambda params: jnp.sum(show(params)["w"] ** 2)
      >>> jax.grad(loss)({"w": jnp.array([1.0, -3.0])})["w"]
      Array([ 0., -6.], dtype=float32)

    References:
      Bengio et al., `Estimating or Propagating Gradients Through Stochastic Neurons
      <https://arxiv.org/abs/1308.3432>`_, 2013
    """

    def show(params: Any, key: jax.Array | None = None) -> Any:
        check_key(key, "straight_through")
        leaves, unflatten = flatten(params)
        values = []
        for d in decide(leaves, recipe, who="straight_through"):
            value, path = d.parameter.value, d.parameter.path
            if d.encoder is not None:
                if is_encoded(value):
                    raise TypeError(
                        f"straight_through: {path} is {value.kind()}, encoded already; train "
                        "its floating parts through partition and combine"
                    )
                with named(f"straight_through: {path}"):
                    assert d.rule is not None
                    value = _show(d.encoder, d.rule.axes, jnp.asarray(value), fold(key, path))
            values.append(value)
        return unflatten(values)

    return show


def _show(encoder: Encoder, axes: Axes | None, w: jax.Array, key: jax.Array | None) -> jax.Array:
    # Not w + stop_gradient(q - w), which is not bit-equal to q in up to 12 % of entries.
    @jax.custom_jvp
    def quantized(w, key):
        return encoder(w, axes=axes, key=key).materialize()

    @quantized.defjvp
    def _(primals, tangents):
        return quantized(*primals), tangents[0]

    return quantized(w, key)
