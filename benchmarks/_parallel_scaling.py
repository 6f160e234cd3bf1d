"""Weak scaling of calibration and distillation on TPU v5e, by the model of `parallel.estimate`."""

from __future__ import annotations

import pathlib
from typing import Any

from . import _children
from ._rows import Row

SLICES = ("1x1", "2x2", "4x4", "8x8", "16x16")
#: Chips up to which a step may take a tenth longer.
BOUND = 64
PICTURE = pathlib.Path(__file__).parent / "results" / "parallel_scaling.png"


def rows(*, quick: bool = False) -> list[Row]:
    """Compiles both steps for each slice, one child process at a time; nothing is run."""
    _children.check_aot()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("1x1", "4x4") if quick else SLICES:
        more = ["--quick"] * quick
        programs = _children.compiled(
            "_parallel_aot", "scaling", f"v5e:{name}", *more, timeout=1800
        )
        for plan in programs:
            found.setdefault(plan["step"], []).append(plan)
    if not quick:
        _picture(found)
    return [row for step, plans in found.items() for row in _rows(step, plans)]


def _rows(step: str, plans: list[dict[str, Any]]) -> list[Row]:
    one, made = plans[0], []
    for plan in plans:
        chips = plan["devices"]
        bar = ">= 0.9" if 1 < chips <= BOUND else ""
        claim = f"{step} on {plan['topology']}, {plan['batch']} texts a chip: efficiency"
        made.append(Row(claim, one["seconds"] / plan["seconds"], bar, note=_note(plan)))
    last = plans[-1]
    late, wait = 1e3 * last["late"], 1e3 * (last["seconds"] - one["seconds"])
    rounds = sum({s["name"]: s["times"] for s in last["sends"]}.values())
    note = f"{rounds} collectives, one after another; bytes sent grow by (n - 1) / n only"
    claim = f"{step} on {last['topology']}: ms more than on one chip"
    made.append(Row(claim, wait))
    claim = f"{step} on {last['topology']}: ms of these until messages have passed all chips"
    made.append(Row(claim, late, note=note))
    return made


def _note(plan: dict[str, Any]) -> str:
    parts = (f"{1e3 * plan[k]:.3g} ms {k}" for k in ("compute", "moving", "exchange"))
    sent = sum(s["sent"] for s in plan["sends"])
    return f"{', '.join(parts)}; {sent / 2**20:.3g} MiB sent, {plan['memory'] / 1e9:.3g} GB held"


def _picture(found: dict[str, list[dict[str, Any]]]) -> None:
    """Draws efficiencies, and what a step of the most chips is spent on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for step, plans in found.items():
        chips = [p["devices"] for p in plans]
        left.plot(chips, [plans[0]["seconds"] / p["seconds"] for p in plans], "o-", label=step)
        for i, p in enumerate(plans):
            place, worked = f"{step[0]} {p['devices']}", max(p["compute"], p["moving"])
            bytes_ = p["exchange"] - p["late"]
            for j, (start, length) in enumerate(
                [(0, worked), (worked, bytes_), (worked + bytes_, p["late"])]
            ):
                label = ("work of a chip", "bytes sent", "messages on their way")[j]
                shown = label if i == 0 and step == next(iter(found)) else None
                right.barh(place, 1e3 * length, left=1e3 * start, color=f"C{j}", label=shown)
    left.axhline(0.9, color="black", lw=0.8, ls="--")
    left.set(xscale="log", ylim=(0.5, 1.02), xlabel="chips", ylabel="efficiency")
    left.set_title("weak scaling on TPU v5e, by the stated model")
    left.legend()
    right.invert_yaxis()
    right.set_xlabel("ms a step (c: calibration, d: distillation)")
    right.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    pyplot.close(figure)
