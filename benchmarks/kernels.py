"""Kernels for compressed parameters on the CPU, with their peers in the same run."""

from __future__ import annotations

import functools
import logging
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from jaxopt_models import kernels
from jaxopt_models.kernels.conv.shapes import LITE0, RESNET50, Shape
from jaxopt_models.kernels.matmul.shapes import INT4, INT8

from . import _kernel_images as images
from . import _kernel_peers as peers
from . import _machine as machine
from ._contest import Contest, median, ratio
from ._rows import Row

logger = logging.getLogger(__name__)
FASTER = {
    (1, 4096, 4096): 8,
    (16, 4096, 4096): 4,
    (128, 2048, 2048): 3,
    (1024, 2048, 2048): 3,
    (1, 8192, 8192): 6,
    (512, 384, 1536): 3,
}
#: Weights of more bytes are read from memory, whatever the cache.
CACHED = 48 << 20
#: How often processes are made anew.
PASSES = 3
PICTURE = pathlib.Path(__file__).parent / "results" / "kernels.png"


def run(*, quick: bool) -> list[Row]:
    """Runs every product and convolution; peers that are not installed are missing, and said so."""
    if not kernels.status().path:
        raise SystemExit(f"there are no kernels: {kernels.status().why}")
    needed = ("onnx", "onnxruntime", "openvino", "torch", "torchao", "qwix")
    missing = [n for n in needed if not peers.has(n)]
    if missing:
        raise SystemExit(f"install the peers: pip install {' '.join(missing)}")
    rounds = 3 if quick else 15
    points: list[Any] = []
    with Contest() as contest:
        limits = contest.times(
            {"reading": functools.partial(machine.reading, CACHED), "bytes": machine.multiplying},
            rounds=rounds,
        )
        peak = machine.THREADS * machine.PRODUCTS / min(limits["bytes"])
        bandwidth = CACHED / min(limits["reading"])
        rows = [
            Row("machine: products of bytes in a second, all cores, 1e9", peak / 1e9),
            Row("machine: bytes read from memory in a second, all cores, 1e9", bandwidth / 1e9),
        ]
        rows += _binary(contest, rounds)
        rows += _convolutions(
            contest, RESNET50[:2] if quick else RESNET50, LITE0[:1] if quick else LITE0, rounds
        )
    rows += _int8(INT8[:1] if quick else INT8, rounds, points)
    rows += _int4(INT4[:1] if quick else INT4, rounds)
    if not quick:
        _picture(points, peak, bandwidth)
    return rows


def _name(*shape: int | None) -> str:
    group = f" in groups of {shape[3]}" if shape[3:] and shape[3] else ""
    return " x ".join(map(str, shape[:3])) + group


def _noted(name: str, times: dict[str, list[float]]) -> str:
    note = ", ".join(f"{n} {1e3 * median(times, n):.3g} ms" for n in times)
    logger.info("%s: %s", name, note)
    return note


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _anew(cases: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times cases in fresh processes several times over.

    Where weights happen to lie in memory and in the caches, which no round changes, makes up to a
    third of the time of a product.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(PASSES):
        with Contest() as contest:
            for name, functions in cases.items():
                times = contest.times(functions, rounds=max(1, rounds // PASSES))
                for function, seconds in times.items():
                    found.setdefault(name, {}).setdefault(function, []).extend(seconds)
    return found


def _share(name: str, times: dict[str, list[float]]) -> Row:
    share = ratio(times, "reading", "ours")
    return Row(f"{name}: share of a read loop's speed", share, ">= 0.85")


def _int8(shapes: Any, rounds: int, points: list[Any]) -> list[Row]:
    rows, best, cases = [], [], {}
    for m, k, n in shapes:
        case = peers.Case(m, k, n)
        functions = {"ours": functools.partial(peers.ours, case)}
        functions |= {p: functools.partial(make, case) for p, make in peers.PEERS.items()}
        if k * n > CACHED:
            functions["reading"] = functools.partial(machine.reading, k * n)
        cases[f"int8 {_name(m, k, n)}"] = functions
    for (m, k, n), (name, times) in zip(shapes, _anew(cases, rounds).items(), strict=True):
        note = _noted(name, times)
        if "reading" in times:
            rows.append(_share(name, times))
            del times["reading"]
        faster, bar = ratio(times, "JAX float32", "ours"), f">= {FASTER[m, k, n]}"
        rows.append(Row(f"{name}: times faster than JAX float32", faster, bar, note=note))
        others = {p: ratio(times, p, "ours") for p in times if p != "ours"}
        peer = min(others, key=others.get)  # type: ignore[arg-type]
        best.append(others[peer])
        claim = f"{name}: times faster than {peer}, the fastest peer"
        rows.append(Row(claim, others[peer], ">= 0.9"))
        points.append((_name(m, k, n), m, m * k * n / median(times, "ours")))
    return [*rows, Row("int8: fastest peers, geometric mean", _mean(best), ">= 1.0")]


def _int4(shapes: Any, rounds: int) -> list[Row]:
    """Returns the least of the shapes for each peer, and how far it is at all of them."""
    rounded, other = "ours, inputs of 8 bits", "ONNX Runtime, inputs of 8 bits"
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    cases = {}
    for m, k, n, group in shapes:
        case = peers.Case(m, k, n, 4, group)
        functions = {
            "ours": functools.partial(peers.ours, case, rounded=False),
            rounded: functools.partial(peers.ours, case),
        }
        functions |= {p: functools.partial(make, case) for p, make in peers.PEERS4.items()}
        cases[f"int4 {_name(m, k, n, group)}"] = functions
    for (m, *_), (name, times) in zip(shapes, _anew(cases, rounds).items(), strict=True):
        _noted(name, times)
        pairs = [("ours", p, ">= 1.0" if p.startswith("ONNX") else "") for p in peers.PEERS4]
        for mine, peer, bar in [*pairs, (rounded, other, ">= 1.0")]:
            found.setdefault((mine, peer, bar), {})[name] = ratio(times, peer, mine)
        if m == 1:
            one = found.setdefault(("ours, one row", "JAX float32", ">= 8"), {})
            one[name] = ratio(times, "JAX float32", "ours")
    rows = []
    for (mine, peer, bar), by in found.items():
        least = min(by, key=by.get)  # type: ignore[arg-type]
        claim = f"int4 in groups, {mine}: times faster than {peer}, least of {len(by)}"
        rows.append(Row(claim, by[least], bar, tuple(by.values()), least))
    return rows


def _binary(contest: Contest, rounds: int) -> list[Row]:
    case, shape = peers.Case(1, 8192, 8192, 1), Shape(14, 256, 256, 3)
    rows = []
    for name, ours, theirs, bar in (
        (
            f"binary {_name(1, 8192, 8192)}",
            functools.partial(peers.ours_binary, case),
            functools.partial(peers.dense, case),
            ">= 20",
        ),
        (
            "binary convolution 3 x 3 x 256 x 256 on 14 x 14",
            functools.partial(images.ours_binary, shape, 1),
            functools.partial(images.dense, shape, 1),
            ">= 8",
        ),
    ):
        times = contest.times({"ours": ours, "JAX float32": theirs}, rounds=rounds)
        faster, note = ratio(times, "JAX float32", "ours"), _noted(name, times)
        rows.append(Row(f"{name}: times faster than JAX float32", faster, bar, note=note))
    return rows


def _convolutions(contest: Contest, resnet: Any, lite: Any, rounds: int) -> list[Row]:
    rows = []
    for title, shapes, bar, least in (
        ("ResNet-50", resnet, ">= 2.5", ">= 1.0"),
        ("EfficientNet-Lite0, depthwise", lite, ">= 2", ""),
    ):
        for batch in (1, 8):
            found = {}
            for shape in shapes:
                functions = {
                    "ours": functools.partial(images.ours, shape, batch),
                    "JAX float32": functools.partial(images.dense, shape, batch),
                }
                times = contest.times(functions, rounds=min(rounds, 7))
                _noted(f"{batch} x {shape}", times)
                found[shape] = ratio(times, "JAX float32", "ours")
            name = f"int8 convolutions of {title}, batch {batch}: times faster than JAX float32"
            values = tuple(found.values())
            rows.append(Row(f"{name}, geometric mean", _mean(values), bar, values))
            worst = min(found, key=found.get)  # type: ignore[arg-type]
            rows.append(Row(f"{name}, least", found[worst], least, note=str(worst)))
    return rows


def _picture(points: list[Any], peak: float, bandwidth: float) -> None:
    """Draws the roofline: products in a second over products for each byte of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    ends = [0.7, peak / bandwidth, 2048]
    roof = [bandwidth * ends[0] / 1e9, peak / 1e9, peak / 1e9]
    axes.loglog(ends, roof, color="black", lw=1, label="read from memory, then multiplied")
    for name, intensity, speed in points:
        axes.plot(intensity, speed / 1e9, "o", color="tab:blue")
        axes.annotate(
            name,
            (intensity, speed / 1e9),
            textcoords="offset points",
            xytext=(4, -4),
            size=8,
            rotation=-35,
            va="top",
            rotation_mode="anchor",
        )
    axes.set_xlabel("products for each byte of weights (rows)")
    axes.set_ylabel("1e9 products in a second")
    axes.set_title("int8 products, inputs rounded by row (above the slope: weights in the cache)")
    axes.legend(loc="lower right")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    pyplot.close(figure)
