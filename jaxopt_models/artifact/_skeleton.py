"""The structure of a tree, without the classes that made it.

Dicts, lists, tuples and ``None`` are kept as they are; boxes are opened; any other pytree
node (an nnx state, a named tuple, a dataclass) becomes a dict by the names of its fields.
In a file a dict is a dict, a tensor is 0 (the next section), and everything else a list
that starts with its kind. A float that is not finite is held as its 8 bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from .._encoded import is_encoded
from .._paths import box_types, key_name, open_box
from ._container import check_plain
from ._errors import ArtifactError, brief

_TENSOR = 0
_LIST, _TUPLE, _DICT, _NONE, _VALUE = 1, 2, 3, 4, 5
_DEPTH = 64


def flatten_tree(tree: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """Takes a tree apart.

    Returns:
      The skeleton, and the tensors with their paths, in its order.

    Raises:
      TypeError: for a leaf that is neither tensor, number nor text.
      ValueError: for an integer of more than 64 bits, or a tree that is too deep.
    """
    tensors: list[tuple[str, Any]] = []
    boxes = box_types()

    def walk(node: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEPTH:
            raise ValueError(f"save: {'/'.join(path):.80} lies deeper than {_DEPTH} levels")
        if not is_encoded(node) and isinstance(node, boxes):
            node, _ = open_box(node, boxes)
        if is_encoded(node) or isinstance(node, (jax.Array, np.ndarray, np.generic)):
            tensors.append(("/".join(path), node))
            return _TENSOR
        if node is None:
            return [_NONE]
        if type(node) in (bool, int, float, str):
            return [_VALUE, value(node, path)]
        if isinstance(node, dict):
            return items({k: node[k] for k in node}, path)
        if type(node) in (list, tuple):
            kind = _LIST if type(node) is list else _TUPLE
            return [kind, *(walk(x, (*path, str(i))) for i, x in enumerate(node))]
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        if len(children) == 1 and children[0][1] is node:
            raise TypeError(
                f"save: {'/'.join(path) or 'the root'} is a {type(node).__name__}; a file holds "
                "tensors, numbers and text only"
            )
        return items({key_name(keys[-1]): child for keys, child in children}, path)

    def value(node: Any, path: tuple[str, ...]) -> Any:
        if type(node) is float and not math.isfinite(node):
            return struct.pack("<d", node)
        try:
            check_plain(node)
        except ValueError as e:
            raise ValueError(f"save: {'/'.join(path) or 'the root'}: {e}") from e
        return node

    def items(node: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        if all(isinstance(k, str) for k in node):
            return {k: walk(node[k], (*path, k)) for k in sorted(node)}
        if not all(isinstance(k, (str, int)) and not isinstance(k, bool) for k in node):
            raise TypeError(
                f"save: keys of {'/'.join(path) or 'the root'} are strings or integers, got "
                f"{list(node)!r:.80}"
            )
        order = sorted(node, key=lambda k: (isinstance(k, str), k))
        return [_DICT, *([k, walk(node[k], (*path, str(k)))] for k in order)]

    return walk(tree, ()), tensors


def unflatten_tree(skeleton: Any, tensor: Callable[[str], Any], *, dropped: Any) -> Any:
    """Puts a tree together.

    Args:
      skeleton: what :func:`flatten_tree` returned, or a file claims it did.
      tensor: called in order with each path; returns what stands there.
      dropped: what ``tensor`` returns for what is left out; empty containers go with it.

    Returns:
      The tree.

    Raises:
      ArtifactError: if the skeleton is malformed.
    """

    def build(s: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEPTH:
            raise ArtifactError(f"a tree deeper than {_DEPTH}")
        if type(s) is int and s == _TENSOR:
            return tensor("/".join(path))
        if type(s) is dict:
            return some(s, {k: build(v, (*path, k)) for k, v in s.items()})
        if type(s) is not list or not s or type(s[0]) is not int:
            raise ArtifactError(f"a tree holds {brief(s)}")
        kind, *rest = s
        if kind in (_LIST, _TUPLE):
            found = [build(x, (*path, str(i))) for i, x in enumerate(rest)]
            found = [x for x in found if x is not dropped] if rest else found
            return dropped if rest and not found else found if kind == _LIST else tuple(found)
        if kind == _DICT:
            pairs = [
                p for p in rest if type(p) is list and len(p) == 2 and type(p[0]) in (int, str)
            ]
            if len(pairs) != len(rest) or len({k for k, _ in pairs}) != len(pairs):
                raise ArtifactError("a dict of a tree is malformed")
            return some(rest, {k: build(v, (*path, str(k))) for k, v in pairs})
        if kind == _NONE and not rest:
            return None
        if kind == _VALUE and len(rest) == 1:
            if type(rest[0]) in (bool, int, float, str):
                return rest[0]
            if type(rest[0]) is bytes and len(rest[0]) == 8:
                return struct.unpack("<d", rest[0])[0]
        raise ArtifactError(f"a tree holds {brief(s)}")

    def some(original: Any, found: dict[Any, Any]) -> Any:
        kept = {k: v for k, v in found.items() if v is not dropped}
        return dropped if original and not kept else kept

    return build(skeleton, ())
