"""The README's main job on the bundled images: ratio, error, time, over three seeds."""

from __future__ import annotations

from jaxopt_models._demo import run_demo

from ._rows import Row, mean_row


def run(*, quick: bool) -> list[Row]:
    """Runs the demo for each seed."""
    found = [run_demo(seed=s, progress=False).data for s in range(1 if quick else 3)]
    rise = [100 * (d["error_after"] - d["error_before"]) for d in found]
    differ = sum(d["error_reloaded"] != d["error_after"] for d in found)
    return [
        mean_row("demo, ratio", [d["ratio"] for d in found], ">= 40"),
        mean_row("demo, rise of the test error in points", rise, "<= 0.5"),
        Row("demo, seeds whose reloaded file differs", float(differ), "<= 0"),
        mean_row("demo, seconds", [d["seconds"] for d in found], "<= 180"),
        mean_row("demo, test error before in %", [100 * d["error_before"] for d in found]),
        mean_row("demo, test error after in %", [100 * d["error_after"] for d in found]),
    ]
