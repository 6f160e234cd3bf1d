"""A function of dense parameters as one of compressed parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ._encoded import is_encoded
from ._paths import flatten
from ._walk import Walk, dense, is_tracked, track


def accelerate(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fn`` with a first argument that may hold compressed parameters.

    Each compressed parameter is rebuilt where it is used and nowhere before, layer by layer
    in a loop over stacked layers; ``fn`` itself is not changed. Without compressed
    parameters the result is ``fn(params, ...)``, the very same program.

    Args:
      fn: function of parameters (a pytree) and anything else.

    Returns:
      A function of the same arguments. Compressed parameters that ``fn`` returns untouched
      come back compressed.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"w": jnp.eye(3)}
      >>> small = jom.compress(params, [jom.Rule("w", jom.quant.Int(bits=8))])
      >>> accelerate(lambda p, x: x @ p["w"])(small, jnp.arange(3.0))
      Array([0., 1., 2.], dtype=float32)
    """

    @functools.wraps(fn)
    def accelerated(params: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(map(is_encoded, jax.tree.leaves(params, is_leaf=is_encoded))):
            return fn(params, *args, **kwargs)
        leaves, unflatten = flatten(params)
        values, treedef = jax.tree.flatten((args, kwargs))
        numeric = [i for i, v in enumerate(values) if _is_numeric(v)]
        given = [i for i, p in enumerate(leaves) if _is_numeric(p.value) or is_encoded(p.value)]

        def of_arrays(weights: list[Any], inputs: list[Any]) -> Any:
            tree = [p.value for p in leaves]
            for i, w in zip(given, weights, strict=True):
                tree[i] = w
            rest = list(values)
            for i, v in zip(numeric, inputs, strict=True):
                rest[i] = v
            args, kwargs = jax.tree.unflatten(treedef, rest)
            return fn(unflatten(tree), *args, **kwargs)

        weights = [leaves[i].value for i in given]
        inputs = [values[i] for i in numeric]
        templates = [_template(w) for w in weights]
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(templates, inputs)
        tracked = [track(leaves[i].path, leaves[i].value) for i in given]
        out = Walk().run(closed.jaxpr, closed.consts, [*tracked, *inputs])
        out = [x.leaf if is_tracked(x) and not x.moves else dense(x) for x in out]
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return accelerated


def _is_numeric(x: Any) -> bool:
    return hasattr(x, "dtype") or (isinstance(x, (int, float, complex)) and not isinstance(x, bool))


def _template(x: Any) -> Any:
    return jax.eval_shape(lambda leaf: leaf.materialize(), x) if is_encoded(x) else x
