"""How the tensors of a tree are to be divided, said in one of several ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._divided import counts_of, names_of
from .._paths import Parameter, box_types, flatten, open_box

_FORMS = (
    "give pairs such as ('.*/kernel', PartitionSpec(None, 'model')), one PartitionSpec for all, a "
    "tree of specs or shardings with the paths of the parameters, a dict from flax's names of axes "
    "to mesh axes, or None where flax's names are mesh axes"
)


def dense_specs(tree: Any, mesh: Any, rules: Any, *, who: str) -> dict[str, PartitionSpec]:
    """Returns how each dense tensor of a tree is divided, by path; checked against the mesh.

    Args:
      tree: parameters.
      mesh: the devices; ``None`` where the sizes of its axes are not known.
      rules: in any form that :func:`shardings` takes.
      who: name of the calling function, for messages.

    Returns:
      A partition for each path.

    Raises:
      TypeError: for rules that are none.
      ValueError: if a rule divides nothing, or a tensor cannot be divided so.
    """
    arrays = [p for p in flatten(tree)[0] if hasattr(p.value, "shape")]
    if isinstance(rules, PartitionSpec):
        found = {p.path: rules for p in arrays}
    elif rules is None or _are_names(rules):
        found = _from_boxes(tree, arrays, rules, who)
    elif _are_pairs(rules):
        found = _matched(arrays, rules, who)
    else:
        found = _from_tree(rules, arrays, who)
    for p in arrays:
        check_spec(f"{who}: {p.path}", tuple(p.value.shape), found[p.path], mesh)
    return found


def _are_names(rules: Any) -> bool:
    return isinstance(rules, Mapping) and all(
        v is None or isinstance(v, str) or (isinstance(v, tuple) and all(map(_is_name, v)))
        for v in rules.values()
    )


def _is_name(x: Any) -> bool:
    return isinstance(x, str)


def _are_pairs(rules: Any) -> bool:
    return isinstance(rules, list | tuple) and all(
        isinstance(r, list | tuple) and len(r) == 2 and isinstance(r[0], str) for r in rules
    )


def _matched(
    arrays: Sequence[Parameter], rules: Sequence[Any], who: str
) -> dict[str, PartitionSpec]:
    compiled = []
    for i, (path, spec) in enumerate(rules):
        if not isinstance(spec, PartitionSpec):
            raise TypeError(f"{who}: rule {i} ({path!r}) gives {spec!r}, no PartitionSpec")
        try:
            compiled.append((re.compile(path), spec))
        except re.error as e:
            raise ValueError(f"{who}: rule {i} ({path!r}) is no regular expression: {e}") from e
    found, used = {}, set()
    for p in arrays:
        hit = next((i for i, (r, _) in enumerate(compiled) if r.fullmatch(p.path)), None)
        used.add(hit)
        found[p.path] = PartitionSpec() if hit is None else compiled[hit][1]
    idle = [r for i, (r, spec) in enumerate(rules) if i not in used and any(spec)]
    if idle:
        raise ValueError(
            f"{who}: the rules {idle} divide nothing: no path matches, or earlier rules took what "
            f"they match. Paths are: {', '.join(p.path for p in arrays)}"
        )
    return found


def _from_boxes(
    tree: Any, arrays: Sequence[Parameter], names: Mapping[str, Any] | None, who: str
) -> dict[str, PartitionSpec]:
    """Reads the names that linen's boxes and nnx's variables keep beside their arrays."""
    boxes = box_types()
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, boxes))
    kept = {}
    for node in nodes:
        inner, _ = open_box(node, boxes)
        if isinstance(node, boxes) and (found := _names(node)):
            kept[id(inner)] = found
    specs = {}
    for p in arrays:
        found = kept.get(id(p.value), ())
        if unknown := [n for n in found if n is not None and names is not None and n not in names]:
            raise ValueError(f"{who}: {p.path} has axes {unknown}, which the rules do not name")
        axes = found if names is None else [None if n is None else names[n] for n in found]
        specs[p.path] = PartitionSpec(*axes)
    if not kept:
        raise ValueError(f"{who}: no parameter carries names of axes; {_FORMS}")
    return specs


def _names(box: Any) -> tuple[Any, ...]:
    if hasattr(box, "get_partition_spec"):
        return tuple(box.get_partition_spec())
    return tuple(box.get_metadata().get("out_sharding") or ())


def _from_tree(tree: Any, arrays: Sequence[Parameter], who: str) -> dict[str, PartitionSpec]:
    def spec(x: Any) -> Any:
        return x.spec if isinstance(x, NamedSharding) else x

    given = {p.path: spec(p.value) for p in flatten(tree)[0]}
    if not given or any(not isinstance(s, PartitionSpec) for s in given.values()):
        raise TypeError(f"{who}: rules={tree!r:.80}; {_FORMS}")
    missing = [p.path for p in arrays if p.path not in given and not p.reason]
    extra = sorted(set(given) - {p.path for p in arrays})
    if missing or extra:
        raise ValueError(f"{who}: the specs say nothing of {missing}, and name unknown {extra}")
    return {p.path: given.get(p.path, PartitionSpec()) for p in arrays}


def check_spec(where: str, shape: tuple[int, ...], spec: Any, mesh: Any) -> None:
    """Raises unless an array of this shape can be divided so; of no mesh any axis will do."""
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{where}: {spec!r} is no PartitionSpec")
    if len(spec) > len(shape):
        raise ValueError(f"{where} of shape {shape} has fewer axes than {spec}")
    entries = [None if e is PartitionSpec.UNCONSTRAINED else e for e in spec]
    used = [n for entry in entries for n in names_of(entry)]
    sizes = dict.fromkeys(used, 1) if mesh is None else dict(mesh.shape)
    if unknown := [n for n in used if n not in sizes]:
        raise ValueError(f"{where}: {spec} names {unknown}; the mesh has {sizes}")
    if len(set(used)) < len(used):
        raise ValueError(f"{where}: {spec} names a mesh axis twice")
    counts = counts_of(PartitionSpec(*entries), len(shape), sizes)
    for axis, (n, count) in enumerate(zip(shape, counts, strict=True)):
        if n % count:
            raise ValueError(
                f"{where} of shape {shape}: axis {axis} of {n} does not divide over the {count} "
                f"devices of {spec[axis]!r}; divide another axis, pad it to "
                f"{-(-n // count) * count}, or leave it whole"
            )
