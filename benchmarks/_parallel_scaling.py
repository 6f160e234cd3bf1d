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
    made += [_fewest(step, one, plan) for plan in plans if plan["devices"] >= BOUND]
    if len(plans) > 2:
        made.append(_growth(step, *plans[-2:]))
    return made


def _fewest(step: str, one: dict[str, Any], plan: dict[str, Any]) -> Row:
    """Returns the batch at which exchange is a tenth of a step; all else grows with the batch."""
    each = 9 * plan["exchange"] / (one["seconds"] / one["batch"])
    claim = f"{step} on {plan['topology']}: fewest texts a chip for an efficiency of 0.9"
    return Row(claim, each, note="work in proportion to the texts, exchange the same")


def _growth(step: str, before: dict[str, Any], last: dict[str, Any]) -> Row:
    """Returns what exchange grows by at the end, and how much of that messages are on their way."""
    grown, late = (1e6 * (last[k] - before[k]) for k in ("exchange", "late"))
    rounds = sum({s["name"]: s["times"] for s in last["sends"]}.values())
    names = f"{before['topology']} to {last['topology']}"
    note = f"{late:.3g} us on the way through {rounds} collectives, {grown - late:.3g} us for bytes"
    return Row(f"{step}, {names}: us more of exchange", grown, note=note)


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
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    pyplot.close(figure)
