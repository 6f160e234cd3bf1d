"""The laws, for our encoders and a stranger's."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import artifact
from ._accelerate import accelerate, simulate
from ._axes import Axes
from ._bits import array_bits
from ._chain import Chain
from ._compress import fold, straight_through
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
    ((2, 2, 4, 16), Axes()),
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
    masks: bool = True,
    key: jax.Array | None = None,
    full: bool = False,
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
    9. ``accelerate`` computes what ``simulate`` defines, which without an input spec is the
       function of the rebuilt tensor; in value and gradient, stacked layers in a loop.

    Nearly all of the time goes into compiling. So the types take turns over the shapes, and
    what needs programs of its own (`jit`, `vmap`, `scan`, laws 7 and 9) runs on the first shape
    and on the first with a stack; ``full`` asks for every law on every pair.

    Args:
      encoder: the encoder to check.
      shapes: pairs of a shape and the roles of its axes.
      dtypes: floating types.
      idempotent: ``False`` where the docstring of the encoder excuses it from law 2.
      masks: ``False`` for an encoder that refuses pruned tensors with a `ValueError`.
      key: random key, for encoders that draw.
      full: every shape with every type, and every law on each.

    Raises:
      AssertionError: naming the law, the shape and the type.

    Example:
      >>> from jaxopt_models import quant, testing
      >>> testing.check_encoder(quant.Int(bits=4), shapes=testing.SHAPES[:1])
    """
    _check_recipe(encoder)
    stacks: set[bool] = set()
    for i, (shape, axes) in enumerate(shapes):
        for dtype in dtypes if full else [dtypes[i % len(dtypes)]]:
            where = f"{encoder} on {jnp.dtype(dtype).name}{list(shape)}"
            case = _Case(encoder, _tensor(shape, dtype), axes, fold(key, "w"), where)
            leaf = _check_values(case, idempotent)
            _check_straight_through(case, leaf, key)
            _check_file(case, leaf)
            if full or bool(axes.stack) not in stacks:
                _check_transforms(case, leaf, key)
                _check_mask(case, masks)
                _check_walk(case, leaf)
        stacks.add(bool(axes.stack))


@dataclasses.dataclass(frozen=True)
class _Case:
    encoder: Encoder
    w: jax.Array
    axes: Axes
    key: jax.Array | None
    where: str

    def encode(self, w: jax.Array, *, keep: jax.Array | None = None) -> Encoded:
        return self.encoder(w, axes=self.axes, keep=keep, key=self.key)


def bits(x: Any) -> bytes:
    """Returns the bytes of an array, which tell -0.0 from 0.0 and one NaN from another."""
    return np.asarray(x).tobytes()


def leaf_bits(tree: Any) -> list[bytes]:
    """Returns the bytes of every array of a tree."""
    return [bits(x) for x in jax.tree.leaves(tree)]


def compilations() -> int:
    """Counts the programs that JAX has compiled in this process since the first call."""
    return len(_compiled())


@functools.cache
def _compiled() -> list[str]:
    events: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


def _law(holds: Any, message: str) -> None:
    # Not an assert statement, which vanishes under python -O.
    if not holds:
        raise AssertionError(message)


def _tensor(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    rng = np.random.default_rng(math.prod(shape))
    return jnp.asarray(rng.normal(size=shape) * 0.1, dtype)


def _check_recipe(encoder: Encoder) -> None:
    fields = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)}
    _law(hash(encoder) == hash(type(encoder)(**fields)), f"{encoder} hashes unstably")
    rule = Rule(".*", encoder)
    text = recipe_to_json([rule])
    steps = encoder.encoders if isinstance(encoder, Chain) else (encoder,)
    again = recipe_from_json(text, encoders=[type(e) for e in steps])
    _law(again == [rule], f"law 8: {text} reads {again}")


def _check_values(case: _Case, idempotent: bool) -> Encoded:
    w, where = case.w, case.where
    leaf = case.encode(w)
    _law(is_encoded(leaf), f"law 1: {where} gave {type(leaf)}")
    value = leaf.materialize()
    _law((leaf.shape, leaf.dtype) == (w.shape, w.dtype), f"law 1: {where} says {leaf.shape}")
    _law((value.shape, value.dtype) == (w.shape, w.dtype), f"law 1: {where} is {value.shape}")
    seen = jax.eval_shape(lambda w: case.encode(w).materialize(), w)
    _law((seen.shape, seen.dtype) == (w.shape, w.dtype), f"law 1: {where}, eval_shape {seen}")
    _law(not leaf.check(), f"{where}: {leaf.check()}")

    if idempotent:
        again = case.encode(value).materialize()
        _law(bits(again) == bits(value), f"law 2: {where} moved when encoded again")

    counted = sum(array_bits(x) for x in jax.tree.leaves(leaf))
    _law(leaf.storage_bits() == counted, f"law 5: {where}: {leaf.storage_bits()} != {counted}")

    before = compilations()
    again = case.encode(w)
    _law(compilations() == before, f"law 6: {where} compiled again")
    _law(leaf_bits(again) == leaf_bits(leaf), f"law 6: {where} gave another result")

    flat, treedef = jax.tree.flatten(leaf)
    _law(bits(treedef.unflatten(flat).materialize()) == bits(value), f"law 3: {where}, unflatten")
    whole = combine(*partition({"w": leaf}))["w"]
    _law(jax.tree.structure(whole) == treedef, f"law 8: {where}, combine gave {whole}")
    _law(leaf_bits(whole) == leaf_bits(leaf), f"law 8: {where}, combine changed a part")
    return leaf


def _check_straight_through(case: _Case, leaf: Encoded, key: Any) -> None:
    shown, tangent = _show(case, case.w, key)
    _law(bits(shown) == bits(leaf.materialize()), f"law 4: {case.where}, shows other bits")
    _law(bool(np.all(np.asarray(tangent) == 1)), f"law 4: {case.where}, tangent not passed on")


def _show(case: _Case, w: jax.Array, key: Any) -> tuple[jax.Array, jax.Array]:
    show = straight_through([Rule("w", case.encoder, case.axes)])
    ones = np.ones(w.shape, w.dtype)
    return jax.jvp(lambda w: show({"w": w}, key)["w"], (w,), (ones,))


def _check_transforms(case: _Case, leaf: Encoded, key: Any) -> None:
    """Encodes and rebuilds in compiled programs: by `jit`, `vmap`, `scan`, by slices."""
    where, value = case.where, bits(leaf.materialize())

    @jax.jit
    def encode(w):
        leaf = case.encode(w)
        return leaf, leaf.materialize(), _show(case, w, key)

    inside, rebuilt, (shown, tangent) = encode(case.w)
    _law(leaf_bits(inside) == leaf_bits(leaf), f"law 3: {where}, encoded under jit")
    _law(bits(rebuilt) == value, f"law 3: {where}, encoded and rebuilt under jit")
    _law(bits(shown) == value, f"law 4: {where}, straight_through under jit")
    _law(bool(np.all(np.asarray(tangent) == 1)), f"law 4: {where}, tangent under jit")

    stacked = jax.tree.map(lambda x: jnp.asarray(np.stack([x, x])), leaf)
    _law(stacked.shape == (2, *case.w.shape), f"law 3: {where}, stacked is {stacked.shape}")

    @jax.jit
    def rebuild(leaf, stacked):
        whole = stacked.materialize()
        mapped = jax.vmap(lambda leaf: leaf.materialize())(stacked)
        _, scanned = jax.lax.scan(lambda c, leaf: (c, leaf.materialize()), 0, stacked)
        sliced = jax.tree.map(lambda x: x[0], stacked).materialize()
        return leaf.materialize(), whole[1], mapped[1], scanned[1], sliced

    names = ("rebuilt under jit", "stacked", "vmap", "scan", "slice")
    for name, got in zip(names, rebuild(leaf, stacked), strict=True):
        _law(bits(got) == value, f"law 3: {where}, {name}")


def _check_mask(case: _Case, masks: bool) -> None:
    keep = np.random.default_rng(1).random(case.w.shape) < 0.5
    try:
        dropped = np.asarray(case.encode(case.w, keep=jnp.asarray(keep)).materialize())
    except ValueError:
        if masks:
            raise
        return
    _law(masks, f"law 7: {case.where} takes a mask that it should refuse")
    # Codes alone hold no mask; what must hold is that a mask put over them finds zeros kept.
    _law(not np.any(dropped[~keep] != 0), f"law 7: {case.where} revived zeros")


def _check_walk(case: _Case, leaf: Encoded) -> None:
    core = leaf.shape[len(leaf.stack) :]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, *core[:-1])), case.w.dtype)

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tensordot(x, w, len(core) - 1)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"]
        for _ in leaf.stack[1:]:
            w = w[0]
        if not leaf.stack:
            return product(w, x)
        return jax.lax.scan(lambda c, w: (c + 1, product(w, x)), 0, w)[1]

    @functools.partial(jax.jit, static_argnums=0)
    def both(run: Any, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(run(params, x).astype(jnp.float32))))
        return run(params, x), slope(x)

    got, want = both(accelerate(fn), {"w": leaf}, x), both(simulate(fn), {"w": leaf}, x)
    plain = both(fn, {"w": leaf.materialize()}, x)
    tolerance = 8 * float(jnp.finfo(case.w.dtype).eps)
    pairs = [("accelerate", a, b) for a, b in zip(got, want, strict=True)]
    if not any(hasattr(part, "read") for part in _nested(leaf)):
        pairs += [("simulate", a, b) for a, b in zip(want, plain, strict=True)]
    for name, a, b in pairs:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        near = np.allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))
        _law(near, f"law 9: {case.where}, {name} is off by {np.abs(a - b).max()}")


def _check_file(case: _Case, leaf: Encoded) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "one.jom")
        artifact.save(path, {"w": leaf})
        loaded = artifact.load(path, types=list({type(x) for x in _nested(leaf)}))["w"]
    _law(
        jax.tree.structure(loaded) == jax.tree.structure(leaf),
        f"law 3: {case.where}, loaded as {loaded}",
    )
    _law(leaf_bits(loaded) == leaf_bits(leaf), f"law 3: {case.where}, save and load")


def _nested(leaf: Encoded) -> list[Encoded]:
    inner = [part for part in leaf.parts().values() if is_encoded(part)]
    return [leaf, *(x for part in inner for x in _nested(part))]
