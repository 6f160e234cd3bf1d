"""The laws, for our encoders and a stranger's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._axes import Axes
from ._compress import straight_through
from ._encoded import Encoded, is_encoded
from ._encoder import Encoder
from ._partition import combine, partition
from ._recipe import Rule, recipe_from_json, recipe_to_json

#: What is checked by default: a dense kernel, an attention projection, a convolution, a
#: grouped one, a depthwise one, a 1x1 one, a scanned stack, an embedding.
SHAPES: tuple[tuple[tuple[int, ...], Axes], ...] = (
    ((24, 16), Axes()),
    ((16, 4, 8), Axes(out=(1, 2))),
    ((3, 3, 8, 16), Axes()),
    ((3, 3, 4, 16), Axes()),
    ((4, 4, 1, 8), Axes()),
    ((1, 1, 16, 24), Axes()),
    ((3, 24, 16), Axes(stack=1)),
    ((40, 16), Axes(out=(0,))),
)


def check_encoder(
    encoder: Encoder,
    *,
    shapes: Sequence[tuple[tuple[int, ...], Axes]] = SHAPES,
    dtypes: Sequence[Any] = (jnp.float32, jnp.bfloat16),
    idempotent: bool = True,
    key: jax.Array | None = None,
) -> None:
    """Runs the laws that every encoder keeps, on tensors of many kinds.

    1. ``materialize`` has the shape and dtype of the tensor, abstractly as for real.
    2. Encoding what was encoded changes nothing.
    3. Flatten/unflatten, `jit`, `vmap`, `scan`, slicing and `save`/`load` keep every bit.
    4. ``straight_through`` is bit-equal to ``materialize``, with the tangent passed on.
    5. ``storage_bits`` counts the parts.
    6. Same input, same result; a second call compiles nothing.
    7. Zeros of an earlier mask stay zero.
    8. The recipe round-trips through JSON; ``partition`` and ``combine`` are inverse.

    Args:
      encoder: the encoder to check.
      shapes: pairs of a shape and the roles of its axes.
      dtypes: floating types.
      idempotent: ``False`` where the docstring of the encoder excuses it from law 2.
      key: random key, for encoders that draw.

    Raises:
      AssertionError: naming the law, the shape and the type.

    Example:
      >>> from jaxopt_models import quant, testing
      >>> testing.check_encoder(quant.Int(bits=4), shapes=testing.SHAPES[:1])
    """
    assert hash(encoder) == hash(type(encoder)(**_fields(encoder))), f"{encoder} hashes unstably"
    rule = Rule(".*", encoder)
    text = recipe_to_json([rule])
    assert recipe_from_json(text, encoders=[type(encoder)]) == [rule], f"law 8: {text}"
    for shape, axes in shapes:
        for dtype in dtypes:
            where = f"{encoder} on {jnp.dtype(dtype).name}{list(shape)}"
            w = _tensor(shape, dtype)
            _check(encoder, w, axes, key, idempotent, where)


def _fields(encoder: Encoder) -> dict[str, Any]:
    return {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)}


def _tensor(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    rng = np.random.default_rng(math.prod(shape))
    return jnp.asarray(rng.normal(size=shape) * 0.1, dtype)


def bits(x: Any) -> bytes:
    """Returns the bytes of an array, which tell -0.0 from 0.0 and one NaN from another."""
    return np.asarray(x).tobytes()


def _check(
    encoder: Encoder, w: jax.Array, axes: Axes, key: Any, idempotent: bool, where: str
) -> None:
    leaf = encoder(w, axes=axes, key=key)
    value = leaf.materialize()
    assert is_encoded(leaf), f"law 1: {where} gave {type(leaf)}"
    assert (leaf.shape, leaf.dtype) == (w.shape, w.dtype), f"law 1: {where} says {leaf.shape}"
    assert (value.shape, value.dtype) == (w.shape, w.dtype), f"law 1: {where} is {value.shape}"
    seen = jax.eval_shape(lambda w: encoder(w, axes=axes, key=key).materialize(), w)
    assert (seen.shape, seen.dtype) == (w.shape, w.dtype), f"law 1: {where}, eval_shape {seen}"
    assert not leaf.check(), f"{where}: {leaf.check()}"
    if idempotent:
        again = encoder(value, axes=axes, key=key).materialize()
        assert bits(again) == bits(value), f"law 2: {where} moved when encoded again"
    _check_transforms(encoder, w, leaf, axes, key, where)
    _check_gradient(encoder, w, value, axes, key, where)
    counted = sum(_bits(x) for x in jax.tree.leaves(leaf))
    assert leaf.storage_bits() == counted, f"law 5: {where}: {leaf.storage_bits()} != {counted}"
    keep = jnp.asarray(np.random.default_rng(1).random(w.shape) < 0.5)
    dropped = encoder(w, axes=axes, keep=keep, key=key).materialize()
    assert not bool(jnp.any(jnp.where(keep, 0, dropped) != 0)), f"law 7: {where} revived zeros"
    halves = partition({"w": leaf})
    assert bits(combine(*halves)["w"].materialize()) == bits(value), f"law 8: {where}, combine"


def _bits(x: jax.Array) -> int:
    from ._bits import array_bits

    return array_bits(x)


def _check_transforms(
    encoder: Encoder, w: jax.Array, leaf: Encoded, axes: Axes, key: Any, where: str
) -> None:
    value = bits(leaf.materialize())
    flat, treedef = jax.tree.flatten(leaf)
    assert bits(treedef.unflatten(flat).materialize()) == value, f"law 3: {where}, unflatten"

    encode = jax.jit(lambda w: encoder(w, axes=axes, key=key))
    assert bits(encode(w).materialize()) == value, f"law 3: {where}, encoded under jit"
    encode(w)
    assert encode._cache_size() == 1, f"law 6: {where} compiled twice"
    rebuild = jax.jit(lambda leaf: leaf.materialize())
    assert bits(rebuild(leaf)) == value, f"law 3: {where}, rebuilt under jit"

    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), leaf)
    assert stacked.shape == (2, *w.shape), f"law 3: {where}, stacked is {stacked.shape}"
    assert bits(stacked.materialize()[1]) == value, f"law 3: {where}, stacked"
    mapped = jax.vmap(lambda leaf: leaf.materialize())(stacked)
    assert bits(mapped[0]) == value, f"law 3: {where}, vmap"
    _, scanned = jax.lax.scan(lambda c, leaf: (c, leaf.materialize()), 0, stacked)
    assert bits(scanned[1]) == value, f"law 3: {where}, scan"
    _check_file(leaf, value, type(leaf), where)


def _check_file(leaf: Encoded, value: bytes, cls: type, where: str) -> None:
    import os
    import tempfile

    from . import artifact

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "one.jom")
        artifact.save(path, {"w": leaf})
        loaded = artifact.load(path, types=[cls])["w"]
    assert type(loaded) is cls, f"law 3: {where}, loaded as {type(loaded)}"
    assert bits(loaded.materialize()) == value, f"law 3: {where}, save and load"


def _check_gradient(
    encoder: Encoder, w: jax.Array, value: jax.Array, axes: Axes, key: Any, where: str
) -> None:
    if key is not None:
        return  # straight_through derives a key of its own for each path
    show = straight_through([Rule("w", encoder, axes)])
    shown, tangent = jax.jvp(lambda w: show({"w": w})["w"], (w,), (jnp.ones_like(w),))
    assert bits(shown) == bits(value), f"law 4: {where}, straight_through shows other bits"
    assert bool(jnp.all(tangent == 1)), f"law 4: {where}, tangent is not passed on"
    jitted = jax.jit(lambda w: show({"w": w})["w"])(w)
    assert bits(jitted) == bits(value), f"law 4: {where}, straight_through under jit"
