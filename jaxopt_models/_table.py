"""Results as tables: printed, iterated, written as JSON, drawn."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ._plot import axes_of


class Table:
    """Rows of named values with a title.

    Args:
      columns: names of the columns.
      rows: a tuple of values for each row.
      title: one line above.
      notes: lines below.
      data: further figures for :meth:`to_json`.

    Example:
      >>> t = Table(("path", "bits"), [("ip1/kernel", 4.0)], title="plan")
      >>> t[0]["bits"], len(t)
      (4.0, 1)
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        title: str = "",
        notes: Sequence[str] = (),
        data: dict[str, Any] | None = None,
    ):
        self.columns = tuple(columns)
        self.rows = [dict(zip(self.columns, row, strict=True)) for row in rows]
        self.title = title
        self.notes = list(notes)
        self.data = dict(data or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def column(self, name: str) -> list[Any]:
        """Returns the values of one column."""
        return [row[name] for row in self.rows]

    def to_json(self) -> str:
        """Writes rows, notes and figures as one JSON object."""
        return json.dumps(
            {"title": self.title, "rows": self.rows, "notes": self.notes, **self.data}
        )

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        console = Console(file=out, width=200, color_system=None, force_terminal=False)
        console.print(self._rich(), crop=False)
        lines = [line.rstrip() for line in out.getvalue().rstrip("\n").split("\n")]
        # Not rich's title, which would be folded to the width of the table.
        return "\n".join([self.title, *lines, *self.notes] if self.title else [*lines, *self.notes])

    __repr__ = __str__

    def _rich(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text  # names may hold brackets, which rich reads as markup

        table = RichTable(box=box.SIMPLE_HEAD)
        for name in self.columns:
            values = self.column(name)
            numeric = any(isinstance(v, (int, float)) for v in values)
            # Names are folded last: a path in pieces cannot be read, or searched for.
            longest = max((len(show_value(v)) for v in values), default=0)
            table.add_column(
                Text(name),
                justify="right" if numeric else "left",
                overflow="fold",
                min_width=min(longest, 40) if name == self.columns[0] else None,
            )
        for row in self.rows:
            table.add_row(*(Text(show_value(v)) for v in row.values()))
        return table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(show_value(v))}</td>" for v in r.values()) + "</tr>"
            for r in self.rows
        )
        notes = "".join(f"<p>{html.escape(n)}</p>" for n in self.notes)
        title = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{title}<tr>{head}</tr>{body}</table>{notes}"

    def plot(self, value: str, *, label: str | None = None, ax: Any = None) -> Any:
        """Draws one column as horizontal bars (needs the extra ``plot``).

        Args:
          value: name of a numeric column.
          label: name of the column with the labels; default: the first.
          ax: matplotlib axes to draw into; default: new ones.

        Returns:
          The matplotlib axes.

        Raises:
          ValueError: if there is no such column.
        """
        if value not in self.columns:
            raise ValueError(f"plot: no column {value!r}; columns are {self.columns}")
        ax = axes_of(ax, 0.4 * len(self) + 1)
        names = [str(v) for v in self.column(label or self.columns[0])]
        ax.barh(names, [float(v or 0) for v in self.column(value)])
        ax.invert_yaxis()
        ax.set_xlabel(value)
        ax.set_title(self.title)
        return ax


def show_value(value: Any) -> str:
    """Writes a cell: whole numbers with separators, others with four digits."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"
