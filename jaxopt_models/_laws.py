"""What :func:`jaxopt_models.testing.check_encoder` runs on one tensor."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
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
from ._encoded import Encoded, innermost, is_encoded
from ._encoder import Encoder
from ._moved import is_moved
from ._pack import pack
from ._partition import combine, partition
from ._prepare import prepare
from ._recipe import Rule, recipe_from_json, recipe_to_json
from ._tracked import readers


@dataclasses.dataclass(frozen=True)
class Case:
    """One encoder on one tensor.

    Args:
      encoder: the encoder.
      w: the tensor.
      axes: roles of its axes.
      stats: statistics that the encoder needs, or ``None``.
      key: random key, or ``None``.
      where: both in words.
    """

    encoder: Encoder
    w: jax.Array
    axes: Axes
    stats: Any
    key: jax.Array | None
    where: str

    def encode(self, w: jax.Array, *, keep: jax.Array | None = None) -> Encoded:
        """Encodes a tensor like :attr:`w`, as in a tree under the path ``w``."""
        given = {"axes": self.axes, "stats": self.stats, "key": fold(self.key, "w")}
        return self.encoder(w, keep=keep, **given)

    def show(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns what training sees, and the tangent of ones."""
        rules = [Rule("w", self.encoder, self.axes)]

        def shown(w: jax.Array) -> jax.Array:
            if self.stats is None:
                return straight_through(rules)({"w": w}, self.key)["w"]
            given = {"stats": {"w": self.stats}, "key": self.key}
            return prepare({"w": w}, rules, **given)["w"].materialize()

        return jax.jvp(shown, (w,), (np.ones(w.shape, w.dtype),))


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


def check_recipe(encoder: Encoder) -> None:
    """Law 8 for recipes."""
    fields = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)}
    _law(hash(encoder) == hash(type(encoder)(**fields)), f"{encoder} hashes unstably")
    rule = Rule(".*", encoder)
    text = recipe_to_json([rule])
    steps = encoder.encoders if isinstance(encoder, Chain) else (encoder,)
    again = recipe_from_json(text, encoders=[type(e) for e in steps])
    _law(again == [rule], f"law 8: {text} reads {again}")


def check_values(case: Case, idempotent: bool) -> Encoded:
    """Laws 1, 2, 5, 6 and 8, and 3 without a program."""
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


def check_straight_through(case: Case, leaf: Encoded) -> None:
    """Law 4."""
    shown, tangent = case.show(case.w)
    _law(bits(shown) == bits(leaf.materialize()), f"law 4: {case.where}, shows other bits")
    _law(bool(np.all(np.asarray(tangent) == 1)), f"law 4: {case.where}, tangent not passed on")


def check_transforms(case: Case, leaf: Encoded) -> None:
    """Laws 3 and 4 in compiled programs: by `jit`, `vmap`, `scan`, by slices."""
    where, value = case.where, bits(leaf.materialize())

    @jax.jit
    def encode(w, stats):
        now = dataclasses.replace(case, stats=stats)
        leaf = now.encode(w)
        return leaf, leaf.materialize(), now.show(w)

    inside, rebuilt, (shown, tangent) = encode(case.w, case.stats)
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


def check_mask(case: Case, masks: bool) -> None:
    """Law 7."""
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


def _program(case: Case, leaf: Encoded) -> tuple[Callable[..., jax.Array], jax.Array]:
    """Returns a function of a leaf under ``w``, stacked layers in a loop, and its input."""
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

    return fn, x


def check_walk(case: Case, leaf: Encoded) -> None:
    """Law 9."""
    fn, x = _program(case, leaf)

    @functools.partial(jax.jit, static_argnums=0)
    def both(run: Any, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(run(params, x).astype(jnp.float32))))
        return run(params, x), slope(x)

    got, want = both(accelerate(fn), {"w": leaf}, x), both(simulate(fn), {"w": leaf}, x)
    plain = both(fn, {"w": leaf.materialize()}, x)
    tolerance = 8 * float(jnp.finfo(case.w.dtype).eps)
    pairs = [("accelerate", a, b) for a, b in zip(got, want, strict=True)]
    if not readers(leaf):
        pairs += [("simulate", a, b) for a, b in zip(want, plain, strict=True)]
    for name, a, b in pairs:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        near = np.allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))
        _law(near, f"law 9: {case.where}, {name} is off by {np.abs(a - b).max()}")


def check_packed(case: Case, leaf: Encoded) -> None:
    """Law 10."""
    packed = pack(leaf, target="cpu")
    if packed is leaf:
        return
    _law(not packed.check(), f"law 10: {case.where}, {packed.check()}")
    fn, x = _program(case, leaf)
    got, want = jax.jit(accelerate(fn))({"w": packed}, x), jax.jit(simulate(fn))({"w": leaf}, x)
    a, b = (np.asarray(v, np.float64) for v in (got, want))
    # An input near the middle of two steps may be rounded to the other one.
    bound = 2e-2 if readers(leaf) or case.w.dtype != jnp.float32 else 3e-4
    off = np.abs(a - b).max(initial=0)
    _law(off <= bound * max(1, np.abs(b).max(initial=0)), f"law 10: {case.where}, off by {off}")
    # Without optimization XLA contracts what is done to the values of a moved leaf.
    leaf, packed = (innermost(x) if is_moved(x) else x for x in (leaf, packed))
    same = bits(packed.materialize()) == bits(leaf.materialize())
    _law(same, f"law 10: {case.where} rebuilds to other bits")


def check_file(case: Case, leaf: Encoded) -> None:
    """Law 3 for files."""
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
