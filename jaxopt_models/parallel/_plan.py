"""Estimates side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .._plot import axes_of
from .._table import Table
from ._program import Collective, collectives_table
from ._topology import Topology

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one device holds and does; made by :func:`estimate`, which states the model.

    Args:
      tree: name of the tree of parameters.
      layout: name of the layout.
      topology: the devices.
      parameters: bytes of its shard of the parameters, types of less than a byte in bits.
      whole: bytes of all parameters, once.
      once: operations of products that the function asks for, all devices together.
      arguments: bytes of its shards of parameters and other arguments, as XLA lays them out.
      outputs: bytes of its results.
      temporaries: bytes that XLA needs besides.
      aliased: bytes of results that take the place of arguments.
      collectives: what it exchanges with others.
      by_type: its operations by type of the operands.
      traffic: bytes of memory that it reads and writes.
      opaque: kernels whose operations the program does not tell, and how often they run.
      compute: seconds for the operations.
      moving: seconds for the traffic.
      exchange: seconds for the collectives.
      why: why there is no program.
    """

    tree: str
    layout: str
    topology: Topology
    parameters: float
    whole: float
    once: float
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    aliased: int = 0
    collectives: tuple[Collective, ...] = ()
    by_type: tuple[tuple[str, float], ...] = ()
    traffic: float = 0.0
    opaque: tuple[tuple[str, int], ...] = ()
    compute: float = 0.0
    moving: float = 0.0
    exchange: float = 0.0
    why: str = ""

    @property
    def operations(self) -> float:
        """Operations of its products."""
        return sum(n for _, n in self.by_type)

    @property
    def memory(self) -> int:
        """Bytes that it holds at once."""
        return self.arguments + self.outputs + self.temporaries - self.aliased

    @property
    def fits(self) -> bool:
        """Whether that is no more than a device has."""
        return not self.why and self.memory <= self.topology.chip.memory

    @property
    def seconds(self) -> float:
        """Time of a step where exchange waits for all else; infinite without a program."""
        return float("inf") if self.why else max(self.compute, self.moving) + self.exchange

    @property
    def bound(self) -> str:
        """What takes longest: ``"arithmetic"``, ``"memory"`` or ``"exchange"``."""
        parts = {"arithmetic": self.compute, "memory": self.moving, "exchange": self.exchange}
        return max(parts, key=lambda name: parts[name])

    def sends(self) -> Table:
        """Returns :func:`collectives_table` of its collectives."""
        return collectives_table(self.collectives)


COLUMNS = (
    *("tree", "layout", "parameters MiB", "of all %", "temporaries MiB", "memory MiB", "fits"),
    *("operations G", "collectives", "sent MiB", "us arithmetic", "us memory", "us exchange"),
    *("us step", "bound"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimates of the same function; iterated it gives them, printed it is a table.

    Args:
      estimates: one for each tree and layout.
    """

    estimates: tuple[Estimate, ...]

    def __iter__(self) -> Iterator[Estimate]:
        return iter(self.estimates)

    def __len__(self) -> int:
        return len(self.estimates)

    def __getitem__(self, i: int) -> Estimate:
        return self.estimates[i]

    @property
    def best(self) -> Estimate:
        """The fastest that fits into the memory of a device.

        Raises:
          ValueError: if none does.
        """
        fitting = [e for e in self.estimates if e.fits]
        if not fitting:
            least = min(self.estimates, key=lambda e: e.memory if not e.why else float("inf"))
            said = least.why or f"{least.tree}, {least.layout}: {least.memory / 1e9:.3g} GB"
            raise ValueError(
                f"estimate: nothing fits into the {least.topology.chip.memory / 1e9:.3g} GB of "
                f"{least.topology.chip.name} ({said}); divide parameters or batch over more "
                "devices, or compress further"
            )
        return min(fitting, key=lambda e: (e.seconds, e.memory))

    def table(self) -> Table:
        """Returns a row for each estimate; figures are those of one device."""
        rows = []
        for e in self.estimates:
            cells = (
                *(e.temporaries / MIB, e.memory / MIB, "yes" if e.fits else "no"),
                *(e.operations / 1e9, sum(c.times for c in e.collectives)),
                *(sum(c.sent for c in e.collectives) / MIB, 1e6 * e.compute, 1e6 * e.moving),
                *(1e6 * e.exchange, 1e6 * e.seconds, e.bound),
            )
            if e.why:
                cells = (None, None, "no", *(None,) * 7, e.why)
            share = 100 * e.parameters / e.whole if e.whole else None
            rows.append((e.tree, e.layout, e.parameters / MIB, share, *cells))
        title = f"estimate on {self.estimates[0].topology.name}" if self.estimates else "estimate"
        return Table(COLUMNS, rows, title=title, notes=self._notes())

    def _notes(self) -> list[str]:
        notes = []
        for c in dict.fromkeys(e.topology.chip for e in self.estimates):
            rates = ", ".join(f"{n / 1e12:.4g} T/s on {t}" for t, n in c.operations)
            notes.append(
                f"{c.name}: {rates}; memory {c.memory / 1e9:.4g} GB at {c.bandwidth / 1e9:.4g} "
                f"GB/s; ring {c.ring / 1e9:.4g} GB/s and {1e6 * c.hop:.2g} us a hop ({c.source})"
            )
        if any(e.fits for e in self.estimates):
            best = self.best
            notes.append(f"best that fits: {best.tree}, {best.layout}")
        for e in self.estimates:
            if e.opaque:
                names = ", ".join(f"{name} ({n})" for name, n in e.opaque)
                notes.append(f"{e.tree}, {e.layout}: operations of kernels as asked for: {names}")
            if any(c.open for c in e.collectives):
                notes.append(f"{e.tree}, {e.layout}: a loop of unknown length counts as one pass")
        return notes

    def plot(self, *, ax: Any = None) -> Any:
        """Draws the time of a step of each, by what it is spent on (needs the extra ``plot``).

        Args:
          ax: matplotlib axes to draw into; default: new ones.

        Returns:
          The matplotlib axes.
        """
        from matplotlib.patches import Patch

        ax = axes_of(ax, 0.5 * len(self) + 1.5)
        shown = [e for e in self.estimates if not e.why]
        names = [f"{e.tree}, {e.layout}" for e in shown]
        for e, name in zip(shown, names, strict=True):
            worked = 1e6 * max(e.compute, e.moving)
            kind = "C1" if e.moving > e.compute else "C0"
            ax.barh(name, worked, color=kind)
            ax.barh(name, 1e6 * e.exchange, left=worked, color="C2")
        labels = ("arithmetic", "memory", "exchange")
        ax.legend([Patch(color=f"C{i}") for i in range(3)], labels)
        ax.invert_yaxis()
        ax.set_xlabel("us a step")
        ax.set_title(self.table().title)
        return ax

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
