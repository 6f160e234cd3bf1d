"""How trees of different structures become arrays of one shape: what SPMD programs can hold."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._partition import partition

_HOLES: dict[str, Any] = {"is_leaf": lambda x: x is None}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that every member has: a leaf common to all, or a vector of its other leaves.

    Args:
      trained: whether :func:`jaxopt_models.partition` hands its leaves to an optimizer.
      dtype: of its entries; members' leaves of one buffer have one data type.
      shape: without the axis of members.
      common: whether it holds one leaf of the same shape for each member.
    """

    trained: bool
    dtype: Any
    shape: tuple[int, ...]
    common: bool


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a leaf of a member lies.

    Args:
      buffer: number of the buffer.
      start: first entry in a vector; 0 in a buffer that holds this leaf alone.
      shape: of the leaf, as it is stored.
      key: how a random key is made of what is stored; ``None`` for arrays.
    """

    buffer: int
    start: int
    shape: tuple[int, ...]
    key: str | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return _size(self.shape)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Where the leaves of several trees lie in buffers of the same shape for each.

    Leaves that all members have, by role, data type and shape, are buffers of their own; the
    others of a member are laid end to end in one vector a role and data type, as long as that of
    the longest member. So members of one structure are stored as they are, and all others with
    no more padding than the longest needs.

    Args:
      members: for each its structure, and the slots of its leaves (``None`` for a hole).
      buffers: what there is on each device.
    """

    members: tuple[tuple[Any, tuple[Slot | None, ...]], ...]
    buffers: tuple[Buffer, ...]

    # Arrangements are part of the structure of trees, which JAX hashes in each call.
    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.members, self.buffers))

    def __hash__(self) -> int:
        return self._hash

    @property
    def uniform(self) -> bool:
        """Whether all members have one structure, so that one program serves them."""
        return all(m == self.members[0] for m in self.members)

    @classmethod
    def of(cls, trees: Sequence[Any], *, roles: Callable[[Any], list[bool]]) -> Arrangement:
        """Lays out trees of arrays or shape-dtype structs.

        Args:
          trees: of the members.
          roles: from a tree to whether each leaf is trained, holes counted.
        """
        flat = [jax.tree.flatten(tree, **_HOLES) for tree in trees]
        kinds = [
            [None if x is None else _kind(x, t) for x, t in zip(leaves, roles(tree), strict=True)]
            for tree, (leaves, _) in zip(trees, flat, strict=True)
        ]
        counts = [collections.Counter(k[:3] for k in ks if k is not None) for ks in kinds]
        common = functools.reduce(lambda a, b: a & b, counts)
        buffers, first = [], {}
        for (trained, dtype, shape), n in common.items():
            first[trained, dtype, shape] = len(buffers)
            buffers += [Buffer(trained, dtype, shape, True)] * n
        longest: dict[Any, int] = {}
        rest = []
        for ks in kinds:
            taken: collections.Counter = collections.Counter()
            lengths: dict[Any, int] = {}
            places: list[Any] = []
            for kind in ks:
                if kind is None:
                    places.append(None)
                    continue
                trained, dtype, shape, key = kind
                if taken[kind[:3]] < common[kind[:3]]:
                    places.append((first[kind[:3]] + taken[kind[:3]], 0, shape, key))
                    taken[kind[:3]] += 1
                    continue
                vector = trained, dtype
                places.append((vector, lengths.get(vector, 0), shape, key))
                lengths[vector] = lengths.get(vector, 0) + _size(shape)
            for vector, n in lengths.items():
                longest[vector] = max(longest.get(vector, 0), n)
            rest.append(places)
        vectors = {v: len(buffers) + i for i, v in enumerate(longest)}
        buffers += [Buffer(t, dtype, (n,), False) for (t, dtype), n in longest.items()]
        members = tuple(
            (
                treedef,
                tuple(None if p is None else Slot(vectors.get(p[0], p[0]), *p[1:]) for p in ps),
            )
            for (_, treedef), ps in zip(flat, rest, strict=True)
        )
        return cls(members, tuple(buffers))

    def pack(self, tree: Any, i: int, *, trained: bool | None = None) -> tuple[Any, ...]:
        """Returns the buffers of one member, without the axis of members.

        Args:
          tree: of the structure of member ``i``.
          i: its number.
          trained: one half of the tree alone; the buffers of the other are ``None``.

        Raises:
          ValueError: if the tree has another structure than it had.
        """
        treedef, slots = self.members[i]
        leaves, got = jax.tree.flatten(tree, **_HOLES)
        if got != treedef:
            raise ValueError(f"member {i} changed its structure from\n  {treedef}\nto\n  {got}")
        inside: list[list[Any]] = [[] for _ in self.buffers]
        for slot, x in zip(slots, leaves, strict=True):
            if slot is None or trained not in (None, self.buffers[slot.buffer].trained):
                continue
            buffer = self.buffers[slot.buffer]
            x = stored(x)
            if x.dtype != buffer.dtype or x.shape != slot.shape:
                raise ValueError(
                    f"a leaf of member {i} changed from {buffer.dtype}{list(slot.shape)} to "
                    f"{x.dtype}{list(x.shape)}; what goes in must come out"
                )
            inside[slot.buffer].append(x if buffer.common else x.ravel())
        found: list[Any] = []
        for buffer, parts in zip(self.buffers, inside, strict=True):
            if trained not in (None, buffer.trained):
                found.append(None)
            elif buffer.common:
                found.append(parts[0])
            else:
                short = buffer.shape[0] - sum(p.size for p in parts)
                padding = [jnp.zeros(short, buffer.dtype)] if short or not parts else []
                found.append(jnp.concatenate(parts + padding))
        return tuple(found)

    def unpack(self, buffers: Sequence[Any], i: int) -> Any:
        """Returns the tree of one member, holes where a buffer is ``None``."""
        treedef, slots = self.members[i]
        pieces: dict[int, list[Any]] = {}
        for number, (buffer, value) in enumerate(zip(self.buffers, buffers, strict=True)):
            if value is None or buffer.common:
                continue
            sizes = [s.size for s in slots if s is not None and s.buffer == number]
            padding = buffer.shape[0] - sum(sizes)
            # Its transpose is one concatenation, where that of slices is a sum of padded arrays.
            pieces[number] = list(jax.lax.split(value, [*sizes, padding] if padding else sizes))
        leaves = []
        for slot in slots:
            if slot is None or buffers[slot.buffer] is None:
                leaves.append(None)
                continue
            buffer = self.buffers[slot.buffer]
            x = buffers[slot.buffer] if buffer.common else pieces[slot.buffer].pop(0)
            x = x.reshape(slot.shape)
            leaves.append(x if slot.key is None else jax.random.wrap_key_data(x, impl=slot.key))
        return treedef.unflatten(leaves)

    def unpack_all(self, buffers: Sequence[Any]) -> Any:
        """Returns the tree of all members of one structure, with leaves `[members, ...]`."""
        treedef, slots = self.members[0]
        return treedef.unflatten([None if s is None else buffers[s.buffer] for s in slots])

    def struct(self, i: int) -> Any:
        """Returns the shapes and data types of a member."""
        buffers = [jax.ShapeDtypeStruct(b.shape, b.dtype) for b in self.buffers]
        return jax.eval_shape(lambda *b: self.unpack(b, i), *buffers)

    def zeros(self, *, trained: bool | None = None) -> tuple[Any, ...]:
        """Returns buffers of zeros."""
        return tuple(
            jnp.zeros(b.shape, b.dtype) if trained in (None, b.trained) else None
            for b in self.buffers
        )

    def half(self, buffers: Sequence[Any], *, trained: bool) -> tuple[Any, ...]:
        """Returns one half of the buffers, ``None`` in the holes."""
        return tuple(
            v if b.trained == trained else None for b, v in zip(self.buffers, buffers, strict=True)
        )


def both(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the buffers of two halves."""
    return tuple(y if x is None else x for x, y in zip(a, b, strict=True))


def by_partition(tree: Any) -> list[bool]:
    """Says which leaves :func:`jaxopt_models.partition` hands to an optimizer."""
    return [x is not None for x in jax.tree.leaves(partition(tree)[0], **_HOLES)]


def by_dtype(tree: Any) -> list[bool]:
    """Says which leaves are floating: what derivatives pass through."""
    return [
        x is not None and jnp.issubdtype(x.dtype, jnp.floating)
        for x in jax.tree.leaves(tree, **_HOLES)
    ]


def stored(x: Any) -> Any:
    """Returns an array as it is stored: the data of a random key, all else as it is."""
    return jax.random.key_data(x) if is_key(x) else jnp.asarray(x)


def is_key(x: Any) -> bool:
    """Says whether an array holds random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _kind(x: Any, trained: bool) -> tuple[bool, Any, tuple[int, ...], str | None]:
    key = str(jax.random.key_impl(x)) if is_key(x) else None
    x = jax.eval_shape(stored, x)
    return trained, jnp.dtype(x.dtype), tuple(x.shape), key


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
