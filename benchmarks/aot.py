"""Programs compiled for a TPU v5e and an H100 that are not there: memory besides the codes."""

from __future__ import annotations

from typing import Any

from . import _aot, _children
from ._rows import Row

NAMES = {"v5e": "v5e", "h100": "H100"}
#: What XLA rebuilds on a TPU: lookups among many values, and codes in bit planes.
WHOLE = {("v5e", "codebook of 256"), ("v5e", "int3 in groups of 32")}


def run(*, quick: bool) -> list[Row]:
    """Compiles each program in a child process, one target at a time; nothing is run."""
    _children.check_aot()
    return [row for target in NAMES for row in _rows(target, _children.compiled("_aot", target))]


def _mib(n: float) -> str:
    return f"{n / 2**20:.3g}"


def _rows(target: str, programs: list[dict[str, Any]]) -> list[Row]:
    """Returns the rows of a target: of the numbers of rows of a product the worst."""
    rows, cases = [], dict.fromkeys((p["leaf"], p["what"]) for p in programs)
    for leaf, what in cases:
        found = [p for p in programs if (p["leaf"], p["what"]) == (leaf, what)]
        name = f"{NAMES[target]}, {leaf}" + (f", {what}" if what else "")
        sizes = "/".join(str(p["rows"]) for p in found)
        beside = "/".join(_mib(p["temporaries"]) for p in found)
        note = f"{sizes} rows; all temporaries {beside} MiB"
        if target == "h100" and what != "rebuilt":
            note += f"; {found[0]['runs'].removesuffix(' on cuda')}"
        bar = "" if what == "rebuilt" or (target, leaf) in WHOLE else "<= 0"
        # What no instruction shows would still be seen in the sum.
        weight = 2 * _aot.SIZE**2
        hidden = [p["temporaries"] for p in found if p["temporaries"] >= weight]
        dense = max(max(p["dense"] for p in found), *hidden, 0) / 2**20
        rows.append(Row(f"{name}: MiB of dense temporaries", dense, bar, note=note))
        if not what:
            over = max(p["arguments"] / p["stored"] for p in found)
            note = f"codes of {_mib(found[0]['codes'])} MiB"
            claim = f"{name}: arguments over what codes, scales and input take"
            rows.append(Row(claim, over, "<= 1.01", note=note))
    return rows
