"""Parameters of any tree by one normalised path.

A linen dict gives `params/ip1/kernel`, an nnx state `ip1/kernel/value`, a plain dict
`ip1/kernel`. Here all three read `ip1/kernel`, so that one recipe serves them.

A dict of `params` beside collections that linen's layers are known to keep is read as linen's
``variables``. Alone, or beside anything else, `params` is a key like any other: pass
``variables["params"]`` of a module with collections of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._encoded import is_encoded

# Collections that linen and its common layers keep beside `params`.
_COLLECTIONS = {
    "batch_stats",
    "batch_stats_ema",
    "cache",
    "constants",
    "fp8_params",
    "intermediates",
    "losses",
    "params_axes",
    "perturbations",
    "spectral_norm_stats",
    "_overwrite_with_gradient",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of a tree.

    Args:
      path: normalised path.
      value: array, shape-dtype struct or :class:`Encoded`.
      reason: why it is no parameter that rules see; empty if it is one.
    """

    path: str
    value: Any
    reason: str = ""


def flatten(tree: Any) -> tuple[list[Parameter], Callable[[list[Any]], Any]]:
    """Lists the leaves of a tree in order, and returns how to put new values in place.

    A box (``nnx.Variable``, linen ``Partitioned``) counts as the array inside it; the new
    value goes inside the same box. An empty one is a hole, as ``None`` is.

    Args:
      tree: any pytree.

    Returns:
      The leaves, and a function from as many values to a tree of the same structure.

    Raises:
      ValueError: if two leaves have the same path.
    """
    boxes = box_types()

    def stop(x: Any) -> bool:
        return is_encoded(x) or isinstance(x, boxes)

    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    collections = is_variables(tree)
    leaves, rebuild = [], []
    for keys, node in entries:
        inner, put = open_box(node, boxes)
        if inner is None:
            rebuild.append(None)
            continue
        names = [key_name(k) for k in keys]
        reason = ""
        if collections:
            reason = "" if names[0] == "params" else f"collection {names[0]!r}"
            names = names[1:] if names[0] == "params" else names
        reason = reason or _not_a_parameter(node, inner)
        leaves.append(Parameter("/".join(names), inner, reason))
        rebuild.append(put)
    seen: set[str] = set()
    for p in leaves:
        if p.path in seen:
            raise ValueError(
                f"two leaves have the path {p.path!r}; rename a key so that a recipe and a "
                "file can tell them apart"
            )
        seen.add(p.path)

    def unflatten(values: list[Any]) -> Any:
        new = iter(values)
        nodes = [
            node if put is None else put(next(new))
            for (_, node), put in zip(entries, rebuild, strict=True)
        ]
        assert next(new, new) is new, "more values than leaves"
        return treedef.unflatten(nodes)

    return leaves, unflatten


def key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def box_types() -> tuple[type, ...]:
    # Trees with flax boxes can only exist where flax is loaded; ours is not the import.
    types = []
    if meta := sys.modules.get("flax.core.meta"):
        types.append(meta.AxisMetadata)
    if nnx := sys.modules.get("flax.nnx"):
        types.append(nnx.Variable)
    return tuple(types)


def open_box(node: Any, boxes: tuple[type, ...]) -> tuple[Any, Callable[[Any], Any]]:
    if not isinstance(node, boxes) or is_encoded(node):
        return node, lambda value: value
    inside, treedef = jax.tree_util.tree_flatten(node, is_leaf=is_encoded)
    if not inside:
        return None, lambda value: node
    if len(inside) > 1:
        return node, lambda value: value
    return inside[0], lambda value: treedef.unflatten([value])


def is_variables(tree: Any) -> bool:
    if not isinstance(tree, Mapping) or "params" not in tree:
        return False
    others = set(tree) - {"params"}
    return bool(others) and others <= _COLLECTIONS


def _not_a_parameter(node: Any, value: Any) -> str:
    nnx = sys.modules.get("flax.nnx")
    if nnx and isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
        return f"nnx.{type(node).__name__}"
    if is_encoded(value):
        return ""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return type(value).__name__
    if not jnp.issubdtype(dtype, jnp.inexact):
        return str(dtype)
    return ""


def match_paths(params: Any, leaves: Sequence[Parameter], *, who: str) -> dict[str, Any]:
    """Returns the arrays of a dense tree by path, checked against the leaves of another."""
    dense = {p.path: p.value for p in flatten(params)[0]}
    here = {p.path: p.value for p in leaves}
    if set(dense) != set(here):
        only = sorted(set(dense) - set(here)), sorted(set(here) - set(dense))
        raise ValueError(
            f"{who}: the trees differ: only dense {only[0]}, only compressed {only[1]}"
        )
    for path, x in here.items():
        if hasattr(x, "shape") and tuple(x.shape) != tuple(dense[path].shape):
            raise ValueError(f"{who}: {path} is {x.shape} compressed, {dense[path].shape} dense")
    return dense
