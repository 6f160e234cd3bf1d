"""How fast compressed parameters can be: bytes moved and operations, by what a device can do."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax

from ._accelerate import accelerate
from ._bits import array_bits
from ._call import take_apart
from ._device import Limits
from ._encoded import innermost, is_encoded, materialize
from ._explain import Use, explore
from ._kernels import Choice
from ._paths import flatten
from ._timing import interleaved
from .kernels._layout import Packed
from .kernels.binary.layout import PackedSigns
from .quant import WithInput

COLUMNS = (
    *("uses", "rows", "kernel", "multiply-adds", "bytes before", "bytes after"),
    *("us before", "us after", "bound", "gain"),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one or more uses take at least.

    Args:
      bytes: read and written.
      seconds: the longer of moving these and computing, summed over uses.
      bound: which of the two it is for the longest use: ``"memory"`` or ``"arithmetic"``.
    """

    bytes: int = 0
    seconds: float = 0.0
    bound: str = ""

    @classmethod
    def of(cls, moved: Fraction, arithmetic: float, limits: Limits) -> Cost:
        """Returns the cost of one use, which computes for so many seconds."""
        memory = float(moved) / limits.bandwidth
        return cls(
            round(moved),
            max(memory, arithmetic),
            "arithmetic" if arithmetic > memory else "memory",
        )

    @classmethod
    def sum(cls, costs: Sequence[Cost]) -> Cost:
        """Returns the cost of several uses."""
        longest = max(costs, key=lambda c: c.seconds, default=cls())
        return cls(sum(c.bytes for c in costs), sum(c.seconds for c in costs), longest.bound)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a program costs with dense and with compressed parameters.

    Args:
      uses: of each parameter, by path; products of other values under ``None``.
      costs: before and after of each path that has uses.
      unused: why a parameter has none.
      why: why a compressed parameter meets no kernel, by path.
    """

    uses: dict[str | None, list[Use]]
    costs: dict[str | None, tuple[Cost, Cost]]
    unused: dict[str, str]
    why: dict[str | None, str]

    def total(self) -> tuple[Cost, Cost]:
        """Returns what all of it costs before and after."""
        before, after = zip(*self.costs.values(), strict=True) if self.costs else ((), ())
        return Cost.sum(before), Cost.sum(after)

    def cells(self, path: str) -> tuple[Any, ...]:
        """Returns the columns of a parameter."""
        if path not in self.costs:
            used = 0 if path in self.unused else None
            return used, used, "", used, used, used, used, used, "", None
        uses, (before, after) = self.uses[path], self.costs[path]
        names = [u.choice.kernels[0].name if u.choice else u.runs for u in uses]
        bounds = [b for b in (before.bound, after.bound) if b]
        return (
            sum(u.times for u in uses),
            max(map(_rows, uses)),
            ", ".join(dict.fromkeys(names)),
            sum(u.multiply_adds for u in uses),
            before.bytes,
            after.bytes,
            1e6 * before.seconds,
            1e6 * after.seconds,
            " -> ".join(dict.fromkeys(bounds)),
            before.seconds / after.seconds if after.seconds else None,
        )

    def notes(self, path: str) -> list[str]:
        """Says what else there is to know of a parameter."""
        where = dict.fromkeys(w for u in self.uses.get(path, []) for w in u.where)
        return [self.unused[path]] if path in self.unused else list(where)


def speed_of(fn: Callable[..., Any], small: Any, args: Sequence[Any], limits: Limits) -> Speed:
    """Says what ``fn(small, *args)`` costs, and would with dense parameters.

    Args:
      fn: the function.
      small: compressed parameters, laid out, or their shapes.
      args: arrays, shapes and static values.
      limits: of the device.

    Returns:
      Its uses of parameters, and their costs.
    """
    walk, unused = explore(fn, small, args, {}, kernels=True, who="plan")
    leaves = {p.path: p.value for p in flatten(small)[0]}
    uses: dict[str | None, list[Use]] = {}
    for use in walk.uses.values():
        path = None if use.position is None else use.path
        uses.setdefault(path, []).append(_here(use, limits))
    costs = {}
    for path, found in uses.items():
        leaf = None if path is None else leaves[path]
        pairs = [_costs(use, leaf, limits) for use in found]
        costs[path] = Cost.sum([b for b, _ in pairs]), Cost.sum([a for _, a in pairs])
    why = {
        path: "; ".join(dict.fromkeys(u.why for u in found if u.why))
        for path, found in uses.items()
    }
    return Speed(uses, costs, unused, why)


def _here(use: Use, limits: Limits) -> Use:
    """Returns a use as it is on the device: kernels for others do not run."""
    if use.choice is None:
        return use
    kernel = use.choice.on("cuda" if limits.platform == "gpu" else limits.platform)
    if kernel is not None:
        return dataclasses.replace(use, choice=Choice((kernel,)))
    why = use.why or f"{use.choice.label} only"
    return dataclasses.replace(use, choice=None, runs="rebuilt", why=why)


def _costs(use: Use, leaf: Any, limits: Limits) -> tuple[Cost, Cost]:
    """Returns what a use costs with the dense parameter and with the leaf."""
    moved, arithmetic = _moved(use), 2 * use.multiply_adds / limits.flops
    if leaf is None:
        alone = Cost.of(moved, arithmetic, limits)
        return alone, alone
    dense = _entries(use) * array_bits(jax.ShapeDtypeStruct((), leaf.dtype))
    before = Cost.of(moved + dense / 8, arithmetic, limits)
    if not is_encoded(leaf):
        return before, before
    each = Fraction(leaf.storage_bits(), max(1, leaf.size))
    if use.choice is not None:
        stored = _entries(use) * each
        seconds = _seconds(use, leaf, limits)
        return before, Cost.of(moved + stored / 8, seconds, limits)
    stored = _entries(use) * each
    if use.multiply_adds:
        # Written once it is rebuilt, and read by the product. Elsewhere XLA fuses the two.
        stored += 2 * dense
    return before, Cost.of(moved + stored / 8, arithmetic, limits)


def _seconds(use: Use, leaf: Any, limits: Limits) -> float:
    """Returns how long the kernel of a leaf computes."""
    operations = 2 * use.multiply_adds
    inner = innermost(leaf)
    if isinstance(inner, Packed) and operations:
        # Inputs that are not rounded, and values of a table, are two bytes each: of the four
        # products of both the one of the low bytes is left out.
        pairs = {(False, False): 1, (True, True): 3}
        wide = not isinstance(leaf, WithInput), inner.table is not None
        return operations * pairs.get(wide, 2) / limits.integer_ops
    if isinstance(inner, PackedSigns):
        return operations / limits.sign_ops
    if leaf.laid_out:  # only what a mask keeps
        return operations * min(1, inner.values.size / leaf.size) / limits.flops
    return operations / limits.flops


# ------------------------------------------------------------------ what a use moves


def _is_product(use: Use) -> bool:
    return bool(use.multiply_adds) or _is_lookup(use)


def _is_lookup(use: Use) -> bool:
    return use.eqn.primitive.name == "gather" and use.position == 0


def _entries(use: Use) -> Fraction:
    """Returns the entries that are read in all runs; of a lookup the rows that it finds."""
    if use.position is None:
        return Fraction(0)
    return math.prod(use.output if _is_lookup(use) else use.parameter) * use.share * use.times


def _rows(use: Use) -> int:
    """Returns the rows that the parameter meets in one run; positions, for a convolution."""
    if _is_lookup(use):
        return math.prod(use.input)
    entries = _entries(use)
    return int(use.multiply_adds / entries) if entries else 0


def _moved(use: Use) -> Fraction:
    """Returns the bytes of input and output of a product in all runs."""
    if not _is_product(use):
        return Fraction(0)
    others = [v for i, v in enumerate(use.eqn.invars) if i != use.position]
    bits = sum(array_bits(v.aval) for v in (*others, *use.eqn.outvars))
    return Fraction(bits, 8) * use.share * use.times


# ------------------------------------------------------------------ measured


def measured(
    fn: Callable[..., Any], params: Any, small: Any, args: Sequence[Any]
) -> tuple[float, float]:
    """Runs a function compiled with dense and with compressed parameters, in turn.

    Args:
      fn: the function.
      params: dense parameters, or such that were compressed before.
      small: compressed ones, laid out.
      args: what else it takes.

    Returns:
      Median seconds of a call before and after.
    """
    runs = {
        "before": _compiled(fn, materialize(params), args),
        "after": _compiled(accelerate(fn), small, args),
    }
    times = interleaved(runs, rounds=7, least=0.02)
    return statistics.median(times["before"]), statistics.median(times["after"])


def _compiled(fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> Callable[[], Any]:
    frame, arrays = take_apart(params, args, {})

    @jax.jit
    def run(arrays: Any) -> Any:
        params, args, _ = frame.restore(arrays)
        return fn(params, *args)

    arrays = jax.device_put(arrays)
    return lambda: jax.block_until_ready(run(arrays))
