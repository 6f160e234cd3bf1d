"""Rows of a benchmark: a claim, its value, its bar, and whether it holds."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Sequence

from jaxopt_models import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Args:
      claim: what is measured, in words.
      value: the figure.
      bar: what it is held against, for instance ``">= 47"``; empty for information.
      seeds: the single values behind a mean.
      note: what a number does not say.
    """

    claim: str
    value: float
    bar: str = ""
    seeds: tuple[float, ...] = ()
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the value meets the bar; ``None`` without one."""
        if not self.bar:
            return None
        sign, bound = self.bar.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)

    def to_data(self) -> dict:
        """Returns the row as JSON data."""
        data = {"claim": self.claim, "value": self.value, "bar": self.bar}
        return data | {"holds": self.holds, "seeds": list(self.seeds), "note": self.note}


def mean_row(claim: str, values: Sequence[float], bar: str = "") -> Row:
    """Returns the row of a mean over seeds."""
    return Row(claim, statistics.fmean(values), bar, tuple(values))


def worst(what: str, rows: Sequence[Row], ending: str, bar: str) -> Row:
    """Returns the row of ``what`` with the largest value of those whose claims end alike."""
    some = [r for r in rows if r.claim.endswith(f": {ending}")]
    most = max(some, key=lambda r: r.value)
    return Row(f"{what}, worst of {len(some)}: {ending}", most.value, bar, note=most.claim)


def _shown(value: float) -> str:
    # A mean of differences that cancel is 0, not -6e-16.
    return f"{round(value, 9) + 0:.4g}"


def table(name: str, rows: Sequence[Row]) -> Table:
    """Returns rows as a table, with the spread of the seeds."""
    cells = []
    for r in rows:
        spread = f"{min(r.seeds):.4g} to {max(r.seeds):.4g}" if len(r.seeds) > 1 else ""
        holds = "" if r.holds is None else "yes" if r.holds else "NO"
        cells.append((r.claim, float(_shown(r.value)), r.bar, holds, spread, r.note))
    return Table(("claim", "value", "bar", "holds", "seeds", "note"), cells, title=name)


def write(file: str | os.PathLike, name: str, rows: Sequence[Row], *, quick: bool) -> None:
    """Writes rows as JSON, under a temporary name first."""
    import jax

    data = {
        "benchmark": name,
        "quick": quick,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "rows": [r.to_data() for r in rows],
    }
    path = pathlib.Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        json.dump(data, f, indent=1)
        f.write("\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def markdown(files: Sequence[str]) -> str:
    """Returns the rows of result files as one Markdown table, for the README."""
    lines = ["| claim | measured | bar | holds | command |", "|---|---|---|---|---|"]
    for file in files:
        data = json.loads(pathlib.Path(file).read_text())
        for row in data["rows"]:
            if not row["bar"]:
                continue
            seeds = row["seeds"]
            spread = f" ({min(seeds):.4g} to {max(seeds):.4g})" if len(seeds) > 1 else ""
            holds = "yes" if row["holds"] else "**no**"
            lines.append(
                f"| {row['claim']} | {_shown(row['value'])}{spread} | {row['bar']} | {holds} "
                f"| `python -m benchmarks {data['benchmark']}` |"
            )
    return "\n".join(lines)
