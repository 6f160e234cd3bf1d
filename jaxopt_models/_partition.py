"""What of a compressed tree may be trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._encoded import Encoded, is_encoded
from ._options import pattern
from ._paths import Parameter, flatten


def partition(tree: Any, *, fixed: str | None = None) -> tuple[Any, Any]:
    """Splits a tree into what may be trained and the rest.

    A leaf type declares which of its fields are trained (values, scales, centroids); dense
    parameters are trained if they are floating. Both halves have the structure of the
    tree, with ``None`` in the holes, so that `jax.grad` and any optax optimizer take the
    first one.

    Args:
      tree: any tree, compressed or not.
      fixed: regular expression on whole paths of parameters that are not trained.

    Returns:
      ``(trainable, rest)``; :func:`combine` puts them together again.

    Raises:
      TypeError, ValueError: if ``fixed`` is no regular expression, or matches no path.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"w": jnp.arange(4.0)}, [jom.Rule("w", jom.codebook.KMeans(bits=1))])
      >>> trainable, rest = jom.partition(small)
      >>> loss = lambda t: jnp.sum(jom.materialize(jom.combine(t, rest))["w"])
      >>> jax.grad(loss)(trainable)["w"].codebook        # each centroid stands for two weights
      Array([2., 2.], dtype=float32)
    """
    leaves, unflatten = flatten(tree)
    stays = matching(leaves, fixed, "partition: fixed")
    halves = [_split(p.value, not p.reason and p.path not in stays) for p in leaves]
    return unflatten([a for a, _ in halves]), unflatten([b for _, b in halves])


def matching(leaves: Sequence[Parameter], text: str | None, name: str) -> set[str]:
    """Returns the paths that a regular expression matches; none for ``None``.

    Raises:
      TypeError, ValueError: naming the option, if it is no regular expression, or matches none.
    """
    if text is None:
        return set()
    found = {p.path for p in leaves if pattern(text, name).fullmatch(p.path)}
    if not found:
        paths = ", ".join(sorted(p.path for p in leaves))
        raise ValueError(f"{name}={text!r} matches no path; they are {paths}")
    return found


def _split(x: Any, train: bool) -> tuple[Any, Any]:
    if not is_encoded(x):
        if not jax.tree_util.all_leaves([x]):  # a part that is a tree of arrays itself
            inside, treedef = jax.tree.flatten(x, is_leaf=is_encoded)
            halves = [_split(v, train) for v in inside]
            return treedef.unflatten([a for a, _ in halves]), treedef.unflatten(
                [b for _, b in halves]
            )
        train = train and hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return (x, None) if train else (None, x)
    a: dict[str, Any] = {}
    b: dict[str, Any] = {}
    for name, part in x.parts().items():
        a[name], b[name] = _split(part, train and name in x.trained())
    return dataclasses.replace(x, **a), dataclasses.replace(x, **b)


def combine(trainable: Any, rest: Any) -> Any:
    """Puts together what :func:`partition` split.

    Args:
      trainable: one half; where it has ``None``, the other half is taken.
      rest: the other half.

    Returns:
      The whole tree.

    Raises:
      ValueError: if the halves do not come from one tree, or both hold a value somewhere.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> trainable, rest = jom.partition({"w": jnp.ones(2), "step": jnp.int32(7)})
      >>> jom.combine(trainable, rest)["step"]
      Array(7, dtype=int32)
    """
    hole = {"is_leaf": lambda x: x is None}
    a, treedef = jax.tree.flatten(trainable, **hole)
    b, other = jax.tree.flatten(rest, **hole)
    if treedef != other:
        raise ValueError(
            f"combine: the halves differ in structure:\n  {treedef}\n  {other}\nPass the two "
            "results of one partition, each updated without changing its structure"
        )
    if any(x is not None and y is not None for x, y in zip(a, b, strict=True)):
        raise ValueError("combine: both halves hold a value at one place; pass partition's halves")
    return treedef.unflatten([y if x is None else x for x, y in zip(a, b, strict=True)])


def check_trainable(tree: Any, *, who: str) -> None:
    """Raises if an optimizer would make moments for codes, masks or counters."""
    leaves, _ = flatten(tree)
    for p in leaves:
        if p.value is None:
            continue
        parts = _arrays(p.path, p.value)
        for path, x in parts:
            kind = getattr(x, "dtype", type(x).__name__)
            if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(
                    f"{who}: {path} is {kind}, which no optimizer can train; split the tree "
                    "first: trainable, rest = jaxopt_models.partition(params)"
                )


def _arrays(path: str, x: Any) -> list[tuple[str, Any]]:
    if not isinstance(x, Encoded):
        inside = jax.tree_util.tree_flatten_with_path(x)[0]
        return [(path + jax.tree_util.keystr(keys), v) for keys, v in inside]
    return [a for n, part in x.parts().items() for a in _arrays(f"{path}.{n}", part)]
