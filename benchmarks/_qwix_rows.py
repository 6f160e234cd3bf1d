"""What Qwix does to small linen programs: rounds them, stops, or leaves them in float.

Qwix is called as its README says: `quantize_model`, abstract parameters from `eval_shape` of the
new model's `init`, `quantize_params`, `apply`; the rule rounds every weight to int8. It patches
JAX's functions, and what they traced stays in JAX's caches: the outcome depends on what ran
before, and float code of the process changes after it. Rows therefore hold several trials, and
whatever else must stay right in the process belongs before `rows()` or in another process.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH, OUT, TOKENS = 32, 48, 64
_normal = nn.initializers.normal(0.2)


class Use(nn.Module):
    """`how(x, w)` with one parameter `w`."""

    shape: tuple[int, ...]
    how: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.how(x, self.param("w", _normal, self.shape))


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(TOKENS, WIDTH)
        return embed.attend(embed(tokens))


class Stack(nn.Module):
    """Four dense layers under `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 4}
        scan = nn.scan(lambda layer, x, _: (nn.relu(layer(x)), None), **axes)
        return scan(nn.Dense(WIDTH), x, None)[0]


def _nan(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return _normal(key, shape, dtype).at[0, 0].set(jnp.nan)


def _use(*shape: int, how: Callable) -> Callable[[], tuple[nn.Module, tuple]]:
    return lambda: (Use(shape, how), (jax.random.normal(jax.random.key(1), (8, WIDTH)),))


def _on(make: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, tuple]]:
    return lambda: (make(), (jax.random.normal(jax.random.key(1), shape),))


_MATRIX, _SEQUENCE, _IMAGE = (8, WIDTH), (2, 6, WIDTH), (2, 8, 8, 16)

PROGRAMS: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "dense": _on(lambda: nn.Dense(OUT), *_MATRIX),
    "jnp.dot(x, w)": _use(WIDTH, OUT, how=lambda x, w: jnp.dot(x, w)),
    "dot(x, w), from jax.numpy import dot": _use(WIDTH, OUT, how=jnp.dot),
    "x @ w": _use(WIDTH, OUT, how=lambda x, w: x @ w),
    "x @ w.T": _use(OUT, WIDTH, how=lambda x, w: x @ w.T),
    "w @ x.T": _use(OUT, WIDTH, how=lambda x, w: w @ x.T),
    "einsum(x, w)": _use(WIDTH, OUT, how=lambda x, w: jnp.einsum("bd,df->bf", x, w)),
    "einsum(w, x)": _use(WIDTH, OUT, how=lambda x, w: jnp.einsum("df,bd->bf", w, x)),
    "embedding lookup": lambda: (nn.Embed(TOKENS, WIDTH), (jnp.arange(8),)),
    "tied attend": lambda: (Tied(), (jnp.arange(8),)),
    "conv 2d": _on(lambda: nn.Conv(16, (3, 3)), *_IMAGE),
    "depthwise conv": _on(lambda: nn.Conv(16, (3, 3), feature_group_count=16), *_IMAGE),
    "1x1 conv": _on(lambda: nn.Conv(16, (1, 1)), *_IMAGE),
    "grouped conv": _on(lambda: nn.Conv(16, (3, 3), feature_group_count=4), *_IMAGE),
    "conv transpose": _on(lambda: nn.ConvTranspose(16, (3, 3)), *_IMAGE),
    "LSTM": _on(lambda: nn.RNN(nn.LSTMCell(WIDTH)), *_SEQUENCE),
    "OptimizedLSTMCell": _on(lambda: nn.RNN(nn.OptimizedLSTMCell(WIDTH)), *_SEQUENCE),
    "nn.scan stack": _on(Stack, *_MATRIX),
    "nn.remat dense": _on(lambda: nn.remat(nn.Dense)(OUT), *_MATRIX),
    "attention": _on(lambda: nn.MultiHeadDotProductAttention(4), *_SEQUENCE),
    "w reshaped before use": _use(WIDTH, 4, 12, how=lambda x, w: jnp.dot(x, w.reshape(32, 48))),
    "w reshaped before use, -1": _use(32, 4, 12, how=lambda x, w: jnp.dot(x, w.reshape(-1, 48))),
    "w reshaped before use, @": _use(WIDTH, 4, 12, how=lambda x, w: x @ w.reshape(32, 48)),
    "w of a stack, w[i]": _use(2, WIDTH, WIDTH, how=lambda x, w: jnp.dot(jnp.dot(x, w[0]), w[1])),
    "w * mask": _use(WIDTH, OUT, how=lambda x, w: jnp.dot(x, w * (jnp.arange(OUT) % 2))),
    "weight used twice": _use(WIDTH, WIDTH, how=lambda x, w: jnp.dot(jnp.dot(x, w), w)),
    "weight used twice, once w.T": _use(WIDTH, OUT, how=lambda x, w: jnp.dot(jnp.dot(x, w), w.T)),
    "a rule that matches nothing": _on(lambda: nn.Dense(OUT), *_MATRIX),
    "a group size that does not divide": _on(lambda: nn.Dense(OUT), *_MATRIX),
    "a conv with a group size": _on(lambda: nn.Conv(16, (3, 3)), *_IMAGE),
    "a NaN in a weight": _on(lambda: nn.Dense(OUT, kernel_init=_nan), *_MATRIX),
}

# What a program's rule has beyond int8 for every module.
RULES: dict[str, dict[str, Any]] = {
    "a rule that matches nothing": {"module_path": "encoder/.*"},
    "a group size that does not divide": {"tile_size": 24},
    "a conv with a group size": {"tile_size": 5, "act_qtype": "int8"},
}


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects warnings, but for flax's deprecations of what Qwix calls, and log records."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    finally:
        logging.getLogger().removeHandler(handler)


def _words(said: list[str]) -> str:
    return f"says {said[0][:60]!r}" if said else "nothing said"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _off(out: jax.Array, reference: jax.Array) -> float:
    return float(jnp.linalg.norm(out - reference) / jnp.linalg.norm(reference))


def _nans(params: list, qwix: Any) -> int:
    values = (qwix.dequantize(x) if isinstance(x, qwix.QArray) else x for x in params)
    return sum(int(jnp.isnan(x).sum()) for x in values)


def _quantized(module: nn.Module, **rule: Any) -> tuple[nn.Module, Any]:
    import qwix

    rule = {"module_path": ".*", "weight_qtype": "int8"} | rule
    provider = qwix.PtqProvider([qwix.QuantizationRule(**rule)])
    return qwix.quantize_model(module, provider), provider


def _call(name: str, *, fresh: bool, act: str | None) -> dict[str, Any]:
    import qwix

    module, args = PROGRAMS[name]()
    variables = module.init(jax.random.key(0), *args)
    reference = module.apply(variables, *args)
    if fresh:
        jax.clear_caches()
    model, provider = _quantized(module, **({"act_qtype": act} | RULES.get(name, {})))
    abstract = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    params = qwix.quantize_params(variables["params"], abstract)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))
    arrays = [leaf for leaf in leaves if isinstance(leaf, qwix.QArray)]
    paths = [path for path, _ in jax.tree.leaves_with_path(variables)]
    return {
        "integer": len(arrays),
        "scales": sum(leaf.scale.size for leaf in arrays),
        "weights": sum(path[-1].key != "bias" for path in paths),
        "bytes": _bytes(params),
        "error": _off(model.apply({"params": params}, *args), reference),
        "jit error": _off(jax.jit(model.apply)({"params": params}, *args), reference),
        "nans": (_nans(jax.tree.leaves(variables), qwix), _nans(leaves, qwix)),
        "unused": len(provider.get_unused_rules()),
    }


def _verdict(name: str, got: dict[str, Any], said: list[str]) -> str:
    heard, integer, weights, error = _words(said), got["integer"], got["weights"], got["error"]
    if got["nans"][0]:
        return "other: {} NaN becomes {} NaN in the weight, ".format(*got["nans"]) + heard
    if abs(error - got["jit error"]) > 1e-3:
        return f"other: off by {error:.1%} eagerly, by {got['jit error']:.1%} under jit, {heard}"
    if not integer and error < 1e-5:
        return f"left in float, {heard}"
    if not integer:
        return f"other: stored in float, off by {error:.1%}, {heard}"
    if integer < weights:
        return f"other: {integer} of {weights} weights quantized, {heard}"
    if error > 0.05:
        return f"other: quantized, off by {error:.0%}, {heard}"
    if "conv" in name and "tile_size" in RULES.get(name, {}):
        return f"other: quantized, group size ignored ({got['scales']} scales), {heard}"
    return "quantized"


def _trial(name: str, *, fresh: bool, act: str | None = None) -> tuple[str, dict[str, Any]]:
    """One trial in words and its figures, empty where Qwix raises."""
    jax.clear_caches()
    try:
        with _heard() as said:
            got = _call(name, fresh=fresh, act=act)
    except ImportError:
        raise
    except Exception as error:
        return f"raises: {type(error).__name__}: {str(error).splitlines()[0][:90]}", {}
    finally:
        jax.clear_caches()
    return _verdict(name, got, said), got


def after() -> str:
    """What Qwix does to float code: `a @ b`, after an abstract `init` of `x @ w`."""
    module, (x,) = PROGRAMS["x @ w"]()
    jax.clear_caches()
    try:
        w = _normal(jax.random.key(2), (WIDTH, OUT))
        reference = x @ w
        jax.clear_caches()
        model, _ = _quantized(module)
        with _heard() as said:
            jax.eval_shape(model.init, jax.random.key(0), x)
            error = _off(x @ w, reference)
    finally:
        jax.clear_caches()
    if error < 1e-5:
        return "left in float, nothing said"
    return f"other: off by {error:.1%}, {_words(said)}"


def rows() -> list[dict[str, Any]]:
    """One row a program.

    Keys: `program`; `qwix`, the outcome after the float model has run in the process; `fresh`,
    the same with JAX's caches cleared in between; `w8a8`, as `fresh` with activations in int8 too,
    where Qwix asks for that; `bytes` and `float bytes`, of the parameters (`bytes` is None where
    Qwix raises); `error`, of the output; `unused`, how many rules `get_unused_rules()` names.
    """
    found = []
    for name, make in PROGRAMS.items():
        module, args = make()
        size = _bytes(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])
        text, got = _trial(name, fresh=False)
        fresh = _trial(name, fresh=True)[0]
        both = _trial(name, fresh=True, act="int8")[0] if "act_qtype" in fresh else None
        row = {"program": name, "qwix": text, "fresh": fresh, "w8a8": both, "float bytes": size}
        found.append(row | {key: got.get(key) for key in ("bytes", "error", "unused")})
    last = {"program": "float a @ b, after qwix's init of x @ w", "qwix": after()}
    return [*found, dict.fromkeys(found[0]) | last]


if __name__ == "__main__":
    # In a process of its own, as it changes what float code computes.
    print(json.dumps(rows()))
