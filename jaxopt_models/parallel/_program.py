"""What devices send to each other in a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from .._bits import dtype_bits
from .._table import Table
from ._hlo import Array, Instruction, Module, Run, parse

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter"),
    *("all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that devices combine or exchange.

    Args:
      kind: ``"all-reduce"``, ``"all-gather"``, ``"reduce-scatter"``, ``"all-to-all"``,
        ``"collective-permute"``, or one of XLA's rarer ones.
      dtype: JAX's name of the type that travels, such as ``"int8"``.
      shape: of the whole array: what is gathered, or was there before it was scattered.
      devices: how many take part together.
      times: how often, by the loops around it.
      bits: of one entry; 0: as many as its type has.
      name: of the instruction; arrays that are sent at once have the same.
      where: names of the functions it comes from.
      open: whether a loop around it does not say how often it runs; that counts as once.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int = 1
    bits: int = 0
    name: str = ""
    where: str = ""
    open: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the whole array, once."""
        return -(-math.prod(self.shape) * (self.bits or dtype_bits(self.dtype)) // 8)

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together, where they stand in a ring."""
        return self.times * self.bytes * ring_share(self.kind, self.devices)

    @property
    def steps(self) -> int:
        """Messages that a device sends one after another, all times together, in a ring."""
        return self.times * messages(self.kind, self.devices - 1)


def ring_share(kind: str, n: int) -> float:
    r"""Returns the share of an array that each of ``n`` devices of a ring sends.

    .. math:: 2\tfrac{n-1}{n} \text{ (all-reduce)}, \quad 1 \text{ (permute)}, \quad
       \tfrac{n-1}{n} \text{ (all others)}
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return float(n > 1)
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


def messages(kind: str, hops: int) -> int:
    """Returns how many messages follow each other where ``hops`` of them pass all devices once."""
    if kind == "collective-permute":
        return min(hops, 1)
    return (2 if kind == "all-reduce" else 1) * hops


def collectives(program: Any) -> tuple[Collective, ...]:
    r"""Lists what devices send to each other in a compiled program.

    Read from the program's text as it is after all of XLA's changes, in the order in which it
    stands there; what runs in a loop of known length counts as often. Of a conditional all
    branches are listed. In a ring of `n` devices each sends, of `B` bytes of the whole array,

    .. math:: 2\tfrac{n-1}{n} B \text{ (all-reduce)}, \quad
       \tfrac{n-1}{n} B \text{ (all-gather, reduce-scatter, all-to-all)}, \quad B \text{ (permute)}

    Args:
      program: what `jax.jit(fn).lower(...).compile()` returns, or the text of it.

    Returns:
      One :class:`Collective` for each array. :func:`collectives_table` sums them up.

    Raises:
      ValueError: if it is no compiled program.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> parallel.collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile())
      ()
      >>> text = '''HloModule sum, num_partitions=4
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   %x = f32[8]{0} parameter(0)
      ...   ROOT %y = f32[8]{0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
      ... }'''
      >>> [one] = parallel.collectives(text)
      >>> one.kind, one.dtype, one.shape, one.devices, one.sent
      ('all-reduce', 'float32', (8,), 4, 48.0)
    """
    module = as_module(program)
    found: list[Collective] = []
    chains: dict[str, str] = {}
    for run in module.runs():
        # A TPU spreads a transfer over the fusions that compute meanwhile; each of them names it.
        if chain := re.search(r'chain_id="(\w+)"', run.instruction.attributes):
            key = f"{chain[1]} {run.instruction.word('channel_id')}"
            if chains.setdefault(key, run.instruction.name) != run.instruction.name:
                continue
        found += _read(run, module)
    return tuple(found)


def as_module(program: Any) -> Module:
    """Returns a compiled program, or its text, as read."""
    if isinstance(program, Module):
        return program
    if not isinstance(program, str) and not hasattr(program, "as_text"):
        raise ValueError(
            f"{type(program).__name__} is no compiled program; give what "
            "jax.jit(fn).lower(...).compile() returns, or the text of it"
        )
    return parse(program if isinstance(program, str) else program.as_text())


def collectives_table(found: Sequence[Collective]) -> Table:
    """Sums up collectives of the same kind, type, shape and number of devices.

    Args:
      found: what :func:`collectives` returned.

    Returns:
      A table with the number of each, and the bytes that a device sends for all of them.

    Example:
      >>> from jaxopt_models import parallel
      >>> one = parallel.Collective("all-gather", "int8", (64, 32), devices=4, times=6)
      >>> parallel.collectives_table([one, one])[0]["count"]
      12
    """
    groups: dict[tuple[Any, ...], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.kind, c.dtype, c.shape, c.devices), []).append(c)
    rows = [
        (kind, dtype, str(list(shape)), n, sum(c.times for c in cs), sum(c.sent for c in cs))
        for (kind, dtype, shape, n), cs in groups.items()
    ]
    rows.sort(key=lambda row: -row[-1])
    columns = ("kind", "dtype", "shape", "devices", "count", "bytes sent")
    unknown = sum(c.open for c in found)
    notes = [f"{unknown} of them in loops of unknown length, counted once"] if unknown else []
    return Table(columns, rows, title="collectives", notes=notes)


def _read(run: Run, module: Module) -> list[Collective]:
    one = run.instruction
    kind = one.kind.removesuffix("-start")
    if kind not in KINDS:
        return []
    n = _devices(one, module)
    arrays = results(one)
    if kind == "reduce-scatter":
        [axis] = one.integers("dimensions") or (0,)
        arrays = [_times(a, axis, n) for a in arrays]
    elif (
        kind == "all-reduce"
        and run.inside is not None
        and "all-reduce-scatter" in run.inside.attributes
    ):
        kind = "reduce-scatter"
    elif kind == "all-to-all" and not one.integers("dimensions") and len(arrays) == n:
        # Its pieces by themselves.
        arrays = [dataclasses.replace(arrays[0], shape=(n, *arrays[0].shape))]
    where = re.search(r'op_name="([^"]*)"', one.attributes)
    return [
        Collective(
            kind=kind,
            dtype=a.dtype,
            shape=a.shape,
            devices=n,
            times=run.times,
            bits=a.bits,
            name=one.name,
            where=where[1] if where else "",
            open=run.open,
        )
        for a in arrays
    ]


def results(one: Instruction) -> list[Array]:
    """Returns the arrays that come out; the start of most kinds has the operands before them."""
    if not one.kind.endswith("-start") or one.kind == "all-reduce-start":
        return list(one.arrays)
    return list(one.nested[1])


def _times(a: Array, axis: int, n: int) -> Array:
    shape = (*a.shape[:axis], a.shape[axis] * n, *a.shape[axis + 1 :])
    return dataclasses.replace(a, shape=shape)


def _devices(one: Instruction, module: Module) -> int:
    """Returns how many devices take part together."""
    text = one.attributes
    if found := re.search(r"source_target_pairs=\{(.*?\})\}", text):
        return _linked([tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", found[1])])
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return max(len(g.split(",")) for g in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", text):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=@?mesh\w*\[(.*?)\][^{]*\{(.*?)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return module.partitions


def _linked(pairs: Sequence[tuple[int, ...]]) -> int:
    """Returns the number of devices in the longest chain or ring of senders and receivers."""
    groups: list[set[int]] = []
    for pair in pairs:
        joined = set(pair).union(*(g for g in groups if g & set(pair)))
        groups = [g for g in groups if not g & joined] + [joined]
    return max(map(len, groups), default=1)
