"""Where a parameter is added to a value."""

from __future__ import annotations

import dataclasses

from .._deferred import LAYOUT, never
from .._graph import LINEAR, Node, Value, paths_of
from .._tracked import Hop, Step, is_tracked

_SIGNS = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1)}
_LAID = LAYOUT - {"pad", "concatenate"}


class NotFollowed(Exception):
    """Why no parameter is added."""


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum with a parameter.

    Args:
      node: the sum.
      position: which of its operands the parameter is.
      hops: changes of layout from the value that was followed to what is added up,
      back: and from the parameter's operand to it.
      sign: of that value relative to the parameter.
    """

    node: Node
    position: int
    hops: tuple[Hop, ...]
    back: tuple[Hop, ...]
    sign: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is added up."""
        return self.back[-1].after


def sums_after(y: Value, hops: tuple[Hop, ...] = (), sign: int = 1) -> list[Sum]:
    """Follows a value, and each part of it, to the sums with parameters.

    Args:
      y: the value.
      hops: changes of layout that made it.
      sign: whether it was subtracted from something on the way.

    Returns:
      A sum for the whole, or for each part.

    Raises:
      NotFollowed: if something else becomes of it before.
    """
    if len(y.readers) != 1 and not (y.readers and all(n.name == "slice" for n in y.readers)):
        raise NotFollowed("its product is used several times before a bias is added")
    found = []
    for reader in y.readers:
        name = reader.name
        if name in _SIGNS:
            mine = reader.operands.index(y)
            found += _sums_at(reader, mine, (*hops, _hop(reader, mine)), sign)
        elif name == "split":
            for out, part in zip(reader.outs, _parts(reader), strict=True):
                found += sums_after(out, (*hops, part), sign)
        elif name in LINEAR:
            found += sums_after(reader.outs[0], hops, sign)
        elif name in _LAID and len(reader.operands) == 1:
            found += sums_after(reader.outs[0], (*hops, _hop(reader, 0)), sign)
        elif name == "return":
            raise NotFollowed("it has no bias: its product is returned")
        else:
            raise NotFollowed(f"its product goes through {reader.label} before a bias is added")
    return found


def _sums_at(node: Node, mine: int, hops: tuple[Hop, ...], sign: int) -> list[Sum]:
    """Looks for the parameter in a sum, in what is added there, or further on."""
    other, signs = node.operands[1 - mine], _SIGNS[node.name]
    sign *= signs[mine]
    if is_tracked(other) and paths_of(other):
        if not other.origins:
            raise NotFollowed(f"what is added to it is computed from {sorted(paths_of(other))}")
        back = (_hop(node, 1 - mine),)
        return [Sum(node, 1 - mine, hops, back, sign * signs[1 - mine])]
    inner = None if is_tracked(other) else _inside(other)
    if inner is not None:
        back = (*inner.back, _hop(node, 1 - mine))
        turned = sign * signs[1 - mine] * inner.sign
        return [dataclasses.replace(inner, hops=hops, back=back, sign=turned)]
    return sums_after(node.outs[0], hops, sign)


def _inside(x: Value) -> Sum | None:
    """Returns the sum with a parameter that made a value, its sign that of the parameter in it."""
    if len(x.readers) != 1 or x.made is None:
        return None
    node = x.made
    if node.name == "split":
        inner = _inside(node.operands[0])
        part = _parts(node)[node.outs.index(x)]
        return inner and dataclasses.replace(inner, back=(*inner.back, part))
    for i, operand in enumerate(node.operands if node.name in _SIGNS else ()):
        if is_tracked(operand) and operand.origins:
            return Sum(node, i, (), (_hop(node, i),), _SIGNS[node.name][i])
    return None


def _hop(node: Node, i: int) -> Hop:
    """Returns the step from an operand to the result, which may have more entries."""
    before, after = tuple(node.eqn.invars[i].aval.shape), node.outs[0].shape
    return Hop(Step(node.name, node.eqn.params, never), i, before, after)


def _parts(split: Node) -> list[Hop]:
    """Returns the step to each part of a value that is split."""
    axis, whole, start = split.eqn.params["axis"], split.operands[0].shape, 0
    found = []
    for out in split.outs:
        begin = [start if d == axis else 0 for d in range(len(whole))]
        step = Step("slice", {"start_indices": begin, "strides": None}, never)
        found.append(Hop(step, 0, whole, out.shape))
        start += out.shape[axis]
    return found
