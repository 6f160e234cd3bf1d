"""Which spaces of a program are divided over the devices of a mesh axis.

A space is an atom that parameters share: the heads of an attention, the hidden units between two
layers. Two spaces that meet in one array cannot both be divided over one mesh axis, so the
choice is a set of spaces no two of which meet, of the largest number of bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from ._atom_walk import Followed, axis_of
from ._atoms import DATA, Atom, Use, flat
from ._rules import bytes_each, why_not

# Branches of the search for the best set; beyond, the heaviest space is simply taken.
_MOST = 2000


@dataclasses.dataclass(eq=False)
class Space:
    """Entries of parameters that are divided together.

    Args:
      atom: the atom.
      members: number and axis of each parameter that has it as the outermost part of an axis.
      uses: products that sum over it, and lookups in it.
      meets: spaces in one array with it.
      bytes: what is divided with it.
      entries: of these parameters.
      cost: bytes that are summed or gathered across devices.
    """

    atom: Atom
    members: dict[int, int] = dataclasses.field(default_factory=dict)
    uses: list[Use] = dataclasses.field(default_factory=list)
    meets: set[Space] = dataclasses.field(default_factory=set)
    bytes: int = 0
    entries: int = 0
    cost: int = 0


def refused(x: Any, d: int, name: str, size: int) -> str:
    """Says why an axis of a parameter cannot be divided; empty if it can."""
    return why_not(x, PartitionSpec(*[None] * d, name), {name: size})


def spaces_of(axes: Followed, name: str, size: int) -> list[Space]:
    """Returns all spaces of the parameters of a program; those with ``atom.why`` stay whole."""
    for value in axes.every:
        for axis in value.axes:
            for atom in flat(axis)[1:]:
                where = next(iter(value.paths), "") if len(value.paths) == 1 else ""
                part = f" of {where}" if where else ""
                atom.fix(f"it is not the outermost part of an axis{part}")
    spaces: dict[Atom, Space] = {}
    twice: dict[int, Atom] = {}
    for i, value in enumerate(axes.values):
        for d, axis in enumerate(value.axes):
            if not axis:
                continue
            atom = flat(axis)[0]
            space = spaces.setdefault(atom, Space(atom))
            if i in space.members:
                twice[i] = atom
            space.members[i] = d
    for i, atom in twice.items():
        _recurrent(axes, i, spaces[atom])
    for value in axes.every:
        _meet(value, spaces)
    for use in axes.uses:
        for axis in use.reduced:
            if axis and flat(axis)[0] in spaces:
                space = spaces[flat(axis)[0]]
                space.uses.append(use)
                space.cost += use.times * (use.given if gathers(use, space) else use.out).bytes
    for space in spaces.values():
        _weigh(axes, space, name, size)
    return list(spaces.values())


def _recurrent(axes: Followed, i: int, space: Space) -> None:
    """A kernel from a space to itself is divided by what it makes; its input is gathered."""
    value, path = axes.values[i], axes.parameters[i].path
    mine = [d for d, axis in enumerate(value.axes) if axis and flat(axis)[0] is space.atom]
    summed = {
        d for use in axes.uses if path in use.kernel.paths for d in axis_of(value, use.reduced)
    }
    made = [d for d in mine if d not in summed]
    if len(made) != 1:
        space.atom.fix(f"{path} has it along axes {mine}, and which one is summed is not followed")
        return
    space.members[i] = made[0]


def gathers(use: Use, space: Space) -> bool:
    """Says whether a use reads a space that its kernel also makes."""
    outer = [flat(axis)[0] for axis in use.kernel.axes if axis]
    return outer.count(space.atom) > 1


def _meet(value: Any, spaces: dict[Atom, Space]) -> None:
    outer = [flat(axis)[0] for axis in value.axes if axis]
    here = {spaces[a] for a in outer if a in spaces}
    for space in here:
        space.meets |= here - {space}
        if value.kind == DATA and outer.count(space.atom) > 1:
            space.atom.fix("two axes of one value have it")


def _weigh(axes: Followed, space: Space, name: str, size: int) -> None:
    atom, whole = space.atom, []
    if atom.size % size:
        atom.fix(f"{atom.size} does not divide by {size}")
    for i, d in space.members.items():
        x = axes.parameters[i].value
        why = refused(x, d, name, size)
        whole.append(not why)
        if not why:
            space.bytes += bytes_each(x, PartitionSpec(), {})
            space.entries += x.size
    if not any(whole):
        atom.fix("none of its parameters can be divided")
    if atom.argument and not made_by(axes, space):
        atom.fix("it is an axis of an argument")


def made_by(axes: Followed, space: Space) -> list[int]:
    """Returns the parameters that make a space: those that it is not summed over in."""
    summed = {path for use in space.uses if not gathers(use, space) for path in use.kernel.paths}
    return [i for i in space.members if axes.parameters[i].path not in summed]


def chosen(spaces: Sequence[Space], smallest: int) -> list[Space]:
    """Returns the spaces to divide; all others get a reason.

    Spaces between layers are chosen before streams to which layers add: of a residual block the
    inside is divided, and the sum is whole on every device.
    """
    for space in spaces:
        if space.entries < smallest and not space.atom.why:
            space.atom.fix(f"fewer than smallest={smallest:,} entries would be divided with it")
    taken: list[Space] = []
    for stream in (False, True):
        free = [
            s
            for s in spaces
            if not s.atom.why and s.atom.stream is stream and not s.meets & set(taken)
        ]
        taken += _heaviest(free)
    picked = set(taken)
    for space in spaces:
        others = [] if space in picked else [s for s in taken if s in space.meets]
        for other in others:
            space.atom.fix(f"the other axis of {other.atom.size} of an array with it is divided")
    return taken


def _heaviest(spaces: Iterable[Space]) -> list[Space]:
    """Returns spaces that do not meet, of the most bytes and then of the least cost."""
    budget = [_MOST]

    def best(left: frozenset[Space]) -> tuple[tuple[int, int], list[Space]]:
        total, taken = (0, 0), []
        for part in _parts(left):
            weight, more = split(part)
            total = (total[0] + weight[0], total[1] + weight[1])
            taken += more
        return total, taken

    def split(part: frozenset[Space]) -> tuple[tuple[int, int], list[Space]]:
        # The order is that of the program, so that equal sets are found in one order.
        ordered = [s for s in order if s in part]
        space = max(ordered, key=lambda s: (len(s.meets & part), s.bytes))
        weight = (space.bytes, -space.cost)
        if len(part) == 1:
            return weight, [space]
        budget[0] -= 1
        if budget[0] < 0:
            space = max(ordered, key=lambda s: (s.bytes, -s.cost))
            weight = (space.bytes, -space.cost)
        inside, with_it = best(part - {space} - space.meets)
        yes = (weight[0] + inside[0], weight[1] + inside[1])
        if budget[0] < 0:
            return yes, [space, *with_it]
        no, without = best(part - {space})
        return (yes, [space, *with_it]) if yes >= no else (no, without)

    order = list(spaces)
    picked = best(frozenset(order))[1]
    return [space for space in order if space in picked]


def _parts(left: frozenset[Space]) -> list[frozenset[Space]]:
    """Returns the sets of spaces that do not meet one another."""
    rest, found = set(left), []
    while rest:
        part: set[Space] = set()
        todo = {rest.pop()}
        while todo:
            part |= todo
            todo = {near for space in todo for near in space.meets & rest}
            rest -= todo
        found.append(frozenset(part))
    return found
