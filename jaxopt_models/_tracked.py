"""Values that hang on parameters: how to rebuild them, and by which way they came."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._encoded import Encoded, is_encoded
from ._jaxpr import bind, is_literal


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One deferred operation: an equation, or a function that stands for one.

    Args:
      name: the primitive.
      params: what says exactly which operation; two steps with equal name and params are equal.
      call: from operands to the result.
    """

    name: str
    params: Any
    call: Callable[..., Any]

    @classmethod
    def of(cls, eqn: Any) -> Step:
        """The step of an equation with one result."""
        return cls(eqn.primitive.name, eqn.params, lambda *a: bind(eqn, a)[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and (self.name, self.params) == (other.name, other.params)

    def __hash__(self) -> int:
        return hash(self.name)


@dataclasses.dataclass(frozen=True)
class Hop:
    """A step on the way from a parameter to a value, as its axes see it.

    Args:
      step: the operation; the names ``"loop"`` and ``"index"`` take the first axis away, the one
        by the iterations of a loop, the other by an index that only the data knows.
      position: which operand the parameter is.
      before, after: shape of that operand and of the result.
      offset: for ``concatenate``, where the operand starts.
    """

    step: Step
    position: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    offset: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value came from.

    Args:
      at: the indices of ``"index"`` hops, in order.
      path: path of the parameter.
      shape: its dense shape; inside ``shard_map`` that of a shard.
      hops: the way since.
      loops: depth of the loop of each ``"loop"`` hop, in order.
      shards: `(axis, mesh axes)` for each axis of the parameter that ``shard_map`` divides.
      lost: why the way is not known, where it is not.
      rebuilt: where it was rebuilt whole on the way, ``""`` if nowhere.
    """

    at: tuple[Any, ...]
    path: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    hops: tuple[Hop, ...] = dataclasses.field(default=(), metadata={"static": True})
    loops: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    shards: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})
    lost: str = dataclasses.field(default="", metadata={"static": True})
    rebuilt: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def key(self) -> Any:
        """What tells two origins apart; indices are, if they are different arrays."""
        known = (self.path, self.shape, self.hops, self.loops, self.shards, self.lost)
        return (*known, self.rebuilt, tuple(map(id, self.at)))

    def then(self, *hops: Hop) -> Origin:
        """Returns the origin of a value further on."""
        return dataclasses.replace(self, hops=(*self.hops, *hops))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A step that is not computed yet; ``size`` counts it and those it waits for."""

    operands: tuple[Any, ...]
    step: Step = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A value that hangs on parameters and constants only.

    Args:
      value: a leaf, an array, or a :class:`Deferred` step on these.
      origins: the parameters it holds entry by entry; none for a constant, or for what was
        computed from parameters otherwise.
    """

    value: Any
    origins: tuple[Origin, ...] = ()


def is_tracked(x: Any) -> bool:
    """Says whether ``x`` hangs on parameters only."""
    return isinstance(x, Tracked)


def origins_of(x: Any) -> tuple[Origin, ...]:
    """Returns the parameters that a value holds entry by entry."""
    return x.origins if is_tracked(x) else ()


def values_of(operands: Sequence[Any]) -> list[Any]:
    """Returns operands without what is known of where they came from."""
    return [x.value if is_tracked(x) else x for x in operands]


def is_fixed(eqn: Any, operands: Sequence[Any]) -> bool:
    """Says whether an equation hangs on parameters and constants only."""
    pairs = zip(operands, eqn.invars, strict=True)
    return all(is_tracked(x) or is_literal(v) for x, v in pairs)


def dense(x: Any) -> Any:
    """Rebuilds a tracked value; leaves others alone."""
    if is_tracked(x):
        return dense(x.value)
    if is_encoded(x):
        return x.materialize()
    return x.step.call(*map(dense, x.operands)) if isinstance(x, Deferred) else x


def packed(x: Any) -> bool:
    """Says whether a value has yet to be rebuilt."""
    value = x.value if is_tracked(x) else x
    return is_encoded(value) or isinstance(value, Deferred)


def readers(x: Any) -> list[Any]:
    """Returns the leaves in a value that say what becomes of the input it is multiplied with."""
    found = jax.tree.leaves(x, is_leaf=is_encoded)
    return [v for v in found if is_encoded(v) and type(v).read is not Encoded.read]


def track(path: str, value: Any) -> Any:
    """Starts to follow a parameter."""
    return Tracked(value, (Origin((), path, tuple(value.shape)),))
