"""MiniLM and Lite0 planned for TPU v5e and H100: bytes a device, sums, and what travels."""

from __future__ import annotations

import collections
import math
from typing import Any

from . import _children
from ._rows import Row, worst

TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "h100:8")
#: What is measured of all plans, and its bar.
DIVIDED = "bytes of divided weights over their even share"
SUMS = "sums of activations beside Megatron's"
GATHERED = "bytes of gathered weights over what is stored of them"
BARS = {DIVIDED: "<= 1.05", SUMS: "<= 0", GATHERED: "<= 1.05"}


def rows(*, quick: bool = False) -> list[Row]:
    """Compiles all programs of a topology in one child process after another; nothing is run."""
    _children.check_aot()
    made = []
    for name in ("v5e:4x4", "h100:8") if quick else TOPOLOGIES:
        plans = _children.compiled(
            "_parallel_aot", "layouts", name, *["--quick"] * quick, timeout=3600
        )
        for model, tree in dict.fromkeys((p["model"], p["tree"]) for p in plans):
            some = [p for p in plans if (p["model"], p["tree"]) == (model, tree)]
            made += _rows(f"{model}, {tree}, on {name}", some)
        for model in dict.fromkeys(p["model"] for p in plans):
            made.append(_best(f"{model} on {name}", [p for p in plans if p["model"] == model]))
    what = f"MiniLM and Lite0, dense, int8, int4, on {', '.join(TOPOLOGIES)}"
    return made + [worst(what, made, ending, bar) for ending, bar in BARS.items()]


def _rows(name: str, plans: list[dict[str, Any]]) -> list[Row]:
    plain = plans[0]
    best = min(plans, key=lambda p: p["seconds"])
    shares = [p["part"] / p["even"] for p in plans]
    note = "; ".join(
        f"{p['layout']}: {p['parameters'] / 2**20:.3g} of {p['whole'] / 2**20:.3g} MiB, "
        f"{1e6 * p['seconds']:.4g} us a step"
        for p in plans
    )
    made = [Row(f"{name}: {DIVIDED}", max(shares), note=note)]
    off = [_sums(p) for p in plans]
    note = f"{len(plain['sums'])} predicted; {1e3 * best['exchange']:.3g} ms of exchange at best"
    made.append(Row(f"{name}: {SUMS}", max(off), note=note))
    if len(plans) > 1 and plain["tree"] != "dense":
        sent, stored = _gathered(plans[1]), plans[1]["codes"]
        note = f"{stored / 2**20:.3g} MiB stored"
        made.append(Row(f"{name}: {GATHERED}", sent / stored, note=note))
    return made


def _best(name: str, plans: list[dict[str, Any]]) -> Row:
    best = min((p for p in plans if p["fits"]), key=lambda p: (p["seconds"], p["memory"]))
    first = plans[0]
    note = (
        f"{best['tree']}, {best['layout']}: {best['memory'] / 2**20:.3g} MiB held; "
        f"{first['tree']}, {first['layout']}: {1e6 * first['seconds']:.4g} us, "
        f"{first['memory'] / 2**20:.3g} MiB"
    )
    return Row(f"{name}: us a step of the fastest that fits", 1e6 * best["seconds"], note=note)


def _sums(plan: dict[str, Any]) -> int:
    """Returns by how many the sums of activations differ from those predicted.

    Tables that are divided by rows are summed up after lookups, too: dense ones as numbers.
    """
    want = collections.Counter(n * plan["batch"] for n in plan["sums"])
    found: collections.Counter[int] = collections.Counter()
    for s in plan["sends"]:
        size = math.prod(s["shape"])
        if s["kind"] in ("all-reduce", "reduce-scatter") and s["dtype"] in ("float32", "bfloat16"):
            found[size] += s["times"] * (size >= min(want))
    tables = int(plan["model"] == "MiniLM" and plan["tree"] == "dense")
    return (want - found).total() + max(0, (found - want).total() - tables)


def _gathered(plan: dict[str, Any]) -> float:
    """Returns the bytes of weights that are put together, once each."""
    return sum(s["bytes"] * s["times"] for s in plan["sends"] if s["kind"] == "all-gather")
