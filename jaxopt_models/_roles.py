"""Which axes of a parameter an operation sums over, keeps, or has once for each input.

What stands in an operation may be the parameter transposed, reshaped, sliced or sliced by a loop.
:func:`roles` follows points of the operand back to the parameter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from ._axes import Axes
from ._deferred import ARITHMETIC
from ._products import Product
from ._tracked import Origin


@dataclasses.dataclass(frozen=True)
class Roles:
    """How a parameter is used in a product.

    Statistics of a use are read with leading axes in the order loops, indices, kept shared axes,
    groups. ``stack`` and ``groups`` say what these are to the parameter.

    Args:
      axes: roles of its axes, *out* counted in the whole tensor.
      rows: number of entries of its *in* axes, or of those that one group sees.
      in_shape: lengths of its *in* axes.
      places: row of the parameter for each row of the operand; ``None`` if it is the same.
      kept: shared axes of the operand that the parameter has.
      indices: lengths of the axes that an index takes away.
      picked: `(leading axis, index)` where a loop has the parameter in one iteration only.
      lead: lengths of the leading axes of a statistic, without these.
      stacked: which of them are stack axes of the parameter, the others are groups.
      where: for each index along the stacked ones its index in the flat stack.
      stack: lengths of the stack axes.
      groups: `(axis of the core, count)` for the other leading axes.
      gathered: `(in axis, mesh axes)`, where shards have to be put together.
      copied: mesh axes along which devices see the same input.
      share: how much of the operand it is, in entries of all iterations: `(its, all)`; less than
        all where it is concatenated or stacked with others.
    """

    axes: Axes
    rows: int
    in_shape: tuple[int, ...]
    places: tuple[int, ...] | None
    kept: tuple[int, ...]
    indices: tuple[int, ...]
    picked: tuple[tuple[int, int], ...]
    lead: tuple[int, ...]
    stacked: tuple[bool, ...]
    where: tuple[int, ...]
    stack: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    gathered: tuple[tuple[int, Any], ...] = ()
    copied: tuple[Any, ...] = ()
    share: tuple[int, int] = (1, 1)


def pull(
    o: Origin, extras: list[np.ndarray], coords: list[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Follows points of a value back to its parameter.

    Args:
      o: the way.
      extras: positions along the axes that loops and indices took away, in order.
      coords: positions along the axes of the value.

    Returns:
      Positions along the axes of the parameter, and how often a point left it on the way.

    Raises:
      UnknownStep: at a step that is not listed here.
    """
    extras, coords = list(extras), list(coords)
    n = len((extras + coords or [np.zeros(1)])[0])
    nothing, outside = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for hop in reversed(o.hops):
        name, p = hop.step.name, hop.step.params
        before, after = hop.before, hop.after
        if name == "loop":
            coords = [extras.pop(), *coords]
        elif name == "index":
            coords = [extras.pop(), *coords[1:]]
        elif name == "transpose":
            coords = [coords[p["permutation"].index(a)] for a in range(len(before))]
        elif name == "reshape":
            flat = sum((c * math.prod(after[i + 1 :]) for i, c in enumerate(coords)), nothing)
            coords = [flat // math.prod(before[i + 1 :]) % before[i] for i in range(len(before))]
        elif name == "squeeze":
            left = iter(coords)
            coords = [nothing if a in p["dimensions"] else next(left) for a in range(len(before))]
        elif name == "broadcast_in_dim":
            at = p["broadcast_dimensions"]
            coords = [coords[d] if before[i] != 1 else nothing for i, d in enumerate(at)]
        elif name == "slice":
            steps = p["strides"] or (1,) * len(before)
            coords = [s + c * t for s, c, t in zip(p["start_indices"], coords, steps, strict=True)]
        elif name == "rev":
            turned = p["dimensions"]
            coords = [before[i] - 1 - c if i in turned else c for i, c in enumerate(coords)]
        elif name == "concatenate":
            a = p["dimension"]
            coords[a] = coords[a] - hop.offset
            outside = outside + ((coords[a] < 0) | (coords[a] >= before[a]))
        elif name == "pad":
            for i, (low, _, between) in enumerate(p["padding_config"]):
                c, off = np.divmod(coords[i] - low, between + 1)
                outside = outside + ((off != 0) | (c < 0) | (c >= before[i]))
                coords[i] = c
        elif name not in ARITHMETIC:
            raise UnknownStep(name)
        elif len(before) == len(after):
            coords = [
                nothing if n == 1 and m != 1 else c
                for c, n, m in zip(coords, before, after, strict=True)
            ]
        else:
            coords = []
    return coords, outside


class UnknownStep(Exception):
    """A step of which nothing says where it takes an axis."""


class Lines:
    """Where each axis of a value, and each axis taken away, leads in the parameter."""

    def __init__(self, o: Origin, shape: tuple[int, ...]):
        self.origin = o
        taken = [h for h in o.hops if h.step.name in ("loop", "index")]
        self.taken = [h.before[0] for h in taken]
        self.loops = [i for i, h in enumerate(taken) if h.step.name == "loop"]
        self.sizes = [*self.taken, *shape]
        self.start = [0] * len(self.sizes)
        for d in range(len(self.sizes)):
            # A concatenated operand holds the parameter from some index on.
            _, outside = self.line(d)
            self.start[d] = int(np.argmin(outside)) if outside.size else 0
        base, outside = self.at([np.full(1, s) for s in self.start])
        self.base = [int(c[0]) for c in base]
        self.deltas, self.valid = [], []
        for d in range(len(self.sizes)):
            coords, out = self.line(d)
            self.deltas.append([c - b for c, b in zip(coords, self.base, strict=True)])
            self.valid.append(out == outside[0])

    def at(self, points: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        return pull(self.origin, points[: len(self.taken)], points[len(self.taken) :])

    def line(self, d: int) -> tuple[list[np.ndarray], np.ndarray]:
        n = self.sizes[d]
        return self.at(
            [np.arange(n) if i == d else np.full(n, s) for i, s in enumerate(self.start)]
        )

    def varies(self, d: int) -> set[int]:
        """Axes of the parameter along which axis ``d`` leads."""
        return {a for a, delta in enumerate(self.deltas[d]) if np.any(delta[self.valid[d]] != 0)}

    def add_up(self) -> bool:
        """Says whether each position is the sum of those along the axes."""
        rng = np.random.default_rng(0)
        if 0 in self.sizes:
            return True
        points = [rng.choice(np.flatnonzero(self.valid[d]), 64) for d in range(len(self.sizes))]
        got, _ = self.at(points)
        return all(
            np.array_equal(
                got[a], self.base[a] + sum(self.deltas[d][a][points[d]] for d in range(len(points)))
            )
            for a in range(len(self.base))
        )

    def grid(self, dims: list[int], axes: list[int], shape: tuple[int, ...]) -> np.ndarray:
        """Flat index over ``axes`` for each index along ``dims``; -1 outside the parameter."""
        index = np.zeros((1,) * len(dims), np.int64)
        inside = np.ones((1,) * len(dims), bool)
        for i, d in enumerate(dims):
            view = tuple(-1 if j == i else 1 for j in range(len(dims)))
            inside = inside & self.valid[d].reshape(view)
            for k, a in enumerate(axes):
                index = index + self.deltas[d][a].reshape(view) * math.prod(shape[k + 1 :])
        for k, a in enumerate(axes):
            index = index + self.base[a] * math.prod(shape[k + 1 :])
        return np.where(inside, index, -1).reshape(-1)


def roles(o: Origin, product: Product) -> Roles | str:
    """Says what the axes of a parameter are to a product.

    Args:
      o: where the operand came from.
      product: the product.

    Returns:
      The roles, or why they cannot be told.
    """
    if o.lost:
        return o.lost
    try:
        lines = Lines(o, tuple(product.eqn.invars[product.position].aval.shape))
    except UnknownStep as step:
        return f"its axes are not followed through {step}"
    if not lines.add_up():
        return "its axes are mixed by a reshape before it is used"
    t = len(lines.taken)
    reduced = [t + a for a in product.reduced]
    summed = _union(lines, reduced)
    kept_out = _union(lines, [t + a for a in product.free])
    if any(lines.sizes[d] > 1 and not lines.varies(d) for d in reduced):
        return "it is broadcast along the axes that are summed over"
    if summed & kept_out:
        return f"its axis {min(summed & kept_out)} is in part summed over and in part kept"
    shared = [t + a for a in product.shared if lines.varies(t + a)]
    indices = [d for d in range(t) if d not in lines.loops]
    every = [*lines.loops, *indices, *shared]
    picked, lead = [], []
    for i, d in enumerate(every):
        here = np.flatnonzero(lines.valid[d])
        if lines.varies(d) or len(here) != 1:
            lead.append(d)
        else:
            picked.append((i, int(here[0])))
    apart = _union(lines, lead)
    fixed = {a for a, n in enumerate(o.shape) if n > 1} - summed - kept_out - apart
    stack = 0
    while stack < len(o.shape) - bool(summed) and (
        stack in fixed or (stack in apart and stack not in summed | kept_out)
    ):
        stack += 1
    out = (kept_out | fixed | (apart - summed)) - set(range(stack))
    if not out and o.shape[-1:] == (1,) and len(o.shape) - stack > 1:
        out = {len(o.shape) - 1}
    ins = [a for a in range(stack, len(o.shape)) if a not in out]
    return _read(o, product, lines, lead, picked, indices, shared, reduced, stack, out, ins)


def _read(
    o: Origin,
    product: Product,
    lines: Lines,
    lead: list[int],
    picked: list[tuple[int, int]],
    indices: list[int],
    shared: list[int],
    reduced: list[int],
    stack: int,
    out: set[int],
    ins: list[int],
) -> Roles | str:
    t = len(lines.taken)
    stacked = [bool(lines.varies(d)) and max(lines.varies(d)) < stack for d in lead]
    groups = []
    for d, is_stack in zip(lead, stacked, strict=True):
        if not is_stack:
            found = sorted(lines.varies(d))
            if len(found) != 1:
                return f"an axis that inputs share leads along axes {found} of it"
            groups.append((found[0] - stack, lines.sizes[d]))
    if product.groups is not None:
        axis, count = product.groups
        found = sorted(lines.varies(t + axis)) or [len(o.shape) - 1]
        if len(found) != 1:
            return f"the groups of the convolution lead along axes {found} of it"
        groups.append((found[0] - stack, count))
    stack_shape, in_shape = o.shape[:stack], tuple(o.shape[a] for a in ins)
    where = lines.grid(
        [d for d, s in zip(lead, stacked, strict=True) if s], list(range(stack)), stack_shape
    )
    places = lines.grid(reduced, ins, in_shape)
    if any(len(set(found[found >= 0])) != np.sum(found >= 0) for found in (where, places)):
        return "several entries of the operand are one entry of it"
    rows = math.prod(in_shape)
    split = {axis for axis, _ in groups} & {a - stack for a in ins}
    if split:  # Each group has some of the rows.
        if len(split) > 1 or rows % max(1, places.size):
            return f"axes {sorted(split)} are in part shared with the input"
        rows, places = places.size, np.arange(places.size)
    same = places.size == rows and np.array_equal(places, np.arange(rows))
    gathered, copied = [], []
    for axis, names in o.shards:
        if axis < stack:
            return "its stack axis is divided by shard_map"
        copied += names
        if axis in ins:
            gathered.append((ins.index(axis), names))
    return Roles(
        axes=Axes(tuple(sorted(out)), stack),
        rows=rows,
        in_shape=in_shape,
        places=None if same else tuple(places.tolist()),
        kept=tuple(d - t for d in shared),
        indices=tuple(lines.sizes[d] for d in indices),
        picked=tuple(picked),
        lead=tuple(lines.sizes[d] for d in lead),
        stacked=tuple(stacked),
        where=tuple(where.tolist()),
        stack=tuple(stack_shape),
        groups=tuple(groups),
        gathered=tuple(gathered),
        copied=tuple(copied),
        share=(
            math.prod(int(v.sum()) for v in lines.valid),
            math.prod(v.size for v in lines.valid),
        ),
    )


def _union(lines: Lines, dims: list[int]) -> set[int]:
    return set().union(*(lines.varies(d) for d in dims)) if dims else set()
