"""Kernels for compressed parameters on the CPU, with their peers in the same run."""

from __future__ import annotations

import math
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import kernels, quant
from jaxopt_models.kernels.conv.shapes import LITE0, RESNET50, Shape
from jaxopt_models.kernels.matmul.shapes import INT4, INT8

from . import _kernel_peers as peers
from ._machine import Machine
from ._rows import Row
from ._timing import interleaved, median, ratio

FASTER = {
    (1, 4096, 4096): 8,
    (16, 4096, 4096): 4,
    (128, 2048, 2048): 3,
    (1024, 2048, 2048): 3,
    (1, 8192, 8192): 6,
    (512, 384, 1536): 3,
}
PICTURE = pathlib.Path(__file__).parent / "results" / "kernels.png"


def run(*, quick: bool) -> list[Row]:
    """Runs every product and convolution; peers that are not installed are missing, and said so."""
    if not kernels.status().path:
        raise SystemExit(f"there are no kernels: {kernels.status().why}")
    rounds = 3 if quick else 15
    machine = Machine()
    rows, points = [], []
    missing = [n for n in ("onnxruntime", "openvino", "torch", "qwix") if not peers.has(n)]
    if missing:
        raise SystemExit(f"install the peers: pip install {' '.join(missing)}")
    peak = machine.multiply_adds()
    rows.append(Row("products of bytes in a second, all cores, 1e9", peak / 1e9))
    rows += _int8(INT8[:1] if quick else INT8, rounds, machine, points)
    rows += _int4(INT4[:1] if quick else INT4, rounds)
    rows += _convolutions(
        RESNET50[:2] if quick else RESNET50, LITE0[:1] if quick else LITE0, rounds
    )
    if not quick:
        _picture(points, peak)
    return rows


def _normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _name(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[:3])) + (f" in groups of {shape[3]}" if shape[3:] else "")


def _ours(x: jax.Array, small: Any) -> peers.Run:
    def product(w: Any, x: jax.Array) -> jax.Array:
        return x @ w

    run = jax.jit(jom.accelerate(product))
    return lambda: run(small, x).block_until_ready()


def _note(times: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {1e3 * median(times, name):.3g} ms" for name in times)


def _int8(shapes: Any, rounds: int, machine: Machine, points: list[Any]) -> list[Row]:
    rows, best = [], []
    for m, k, n in shapes:
        x, w = _normal((m, k)), _normal((k, n), 1)
        leaf = quant.Input(bits=8)(quant.Int(bits=8)(jnp.asarray(w)))
        codes = np.asarray(leaf.values.integers(), np.int8)
        scale = np.asarray(leaf.values.scale, np.float32).reshape(n)
        given = jnp.asarray(x)
        functions = {
            "ours": _ours(given, jom.pack(leaf, target="cpu")),
            "JAX float32": peers.dense(given, jnp.asarray(w)),
            "JAX bfloat16": peers.dense(given, jnp.asarray(w), jnp.bfloat16),
            "JAX int8": peers.jax_int8(given, jnp.asarray(codes), jnp.asarray(scale)),
            "Qwix": peers.qwix_int8(given, jnp.asarray(w)),
            "ONNX Runtime": peers.ort_int8(x, codes, scale),
            "OpenVINO": peers.openvino(x, codes, scale),
            "PyTorch float32": peers.torch_float(x, w),
            "PyTorch int8": peers.torch_int8(x, w),
        }
        reads = k * n > 48 << 20
        if reads:
            functions["reading"] = machine.reader(k * n)
        times = interleaved(functions, rounds=rounds)
        if reads:
            share = ratio(times, "reading", "ours")
            rows.append(
                Row(f"int8 {_name((m, k, n))}: share of a read loop's speed", share, ">= 0.85")
            )
            del times["reading"]
        name, bar = f"int8 {_name((m, k, n))}", FASTER[m, k, n]
        faster = ratio(times, "JAX float32", "ours")
        rows.append(
            Row(f"{name}: times faster than JAX float32", faster, f">= {bar}", note=_note(times))
        )
        others = {p: ratio(times, p, "ours") for p in times if p != "ours"}
        peer = min(others, key=others.get)  # type: ignore[arg-type]
        best.append(others[peer])
        rows.append(
            Row(f"{name}: times faster than {peer}, the fastest peer", others[peer], ">= 0.9")
        )
        points.append((f"{m} x {k}", m, k * n, m * k * n / median(times, "ours")))
    rows.append(Row("int8: fastest peers, geometric mean", _mean(best), ">= 1.0"))
    return rows


def _mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _int4(shapes: Any, rounds: int) -> list[Row]:
    rows = []
    for m, k, n, group in shapes:
        x, w = _normal((m, k)), _normal((k, n), 1)
        leaf = quant.Int(bits=4, group=group)(jnp.asarray(w))
        codes = np.asarray(leaf.integers(), np.int8)
        scale = np.asarray(leaf.scales(), np.float32).reshape(n, k // group).T
        given = jnp.asarray(x)
        functions = {
            "ours": _ours(given, jom.pack(leaf, target="cpu")),
            "JAX float32": peers.dense(given, jnp.asarray(w)),
            "ONNX Runtime": peers.ort_int4(x, n, group, 0),
            "ONNX Runtime, inputs of 8 bits": peers.ort_int4(x, n, group, 4),
            "OpenVINO": peers.openvino(x, codes, scale, group),
        }
        times = interleaved(functions, rounds=rounds)
        name = f"int4 {_name((m, k, n, group))}"
        for peer, bar in (("ONNX Runtime", ">= 1.0"), ("ONNX Runtime, inputs of 8 bits", ">= 1.0")):
            rows.append(Row(f"{name}: times faster than {peer}", ratio(times, peer, "ours"), bar))
        bar = ">= 8" if m == 1 else ""
        faster = ratio(times, "JAX float32", "ours")
        rows.append(Row(f"{name}: times faster than JAX float32", faster, bar, note=_note(times)))
    return rows


def _convolution(shape: Shape, batch: int, rounds: int) -> float:
    """Returns how many times faster than JAX on float32 a convolution of int8 is."""
    kernel = (shape.window, shape.window, shape.channels // shape.groups, shape.outputs)
    w = jnp.asarray(_normal(kernel, 1))
    small = jom.pack(quant.Input(bits=8)(quant.Int(bits=8)(w)), target="cpu")
    x = jnp.asarray(_normal((batch, shape.size, shape.size, shape.channels)))

    def fn(w: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (shape.stride, shape.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=shape.groups,
        )

    ours, theirs = jax.jit(jom.accelerate(fn)), jax.jit(fn)
    functions = {
        "ours": lambda: ours(small, x).block_until_ready(),
        "JAX float32": lambda: theirs(w, x).block_until_ready(),
    }
    return ratio(interleaved(functions, rounds=rounds), "JAX float32", "ours")


def _convolutions(resnet: Any, lite: Any, rounds: int) -> list[Row]:
    rows = []
    for title, shapes, bar, least in (
        ("ResNet-50", resnet, ">= 2.5", ">= 1.0"),
        ("EfficientNet-Lite0, depthwise", lite, ">= 2", ""),
    ):
        for batch in (1, 8):
            found = [_convolution(s, batch, min(rounds, 7)) for s in shapes]
            name = f"int8 convolutions of {title}, batch {batch}: times faster than JAX float32"
            rows.append(Row(f"{name}, geometric mean", _mean(found), bar, tuple(found)))
            rows.append(Row(f"{name}, least", min(found), least))
    return rows


def _picture(points: list[Any], peak: float) -> None:
    """Draws the roofline: products in a second over products for each byte of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, intensity, _, speed in points:
        axes.loglog(intensity, speed / 1e9, "o")
        axes.annotate(name, (intensity, speed / 1e9), textcoords="offset points", xytext=(6, -10))
    axes.axhline(peak / 1e9, color="black", lw=1, label="products of bytes the cores can compute")
    axes.set_xlabel("products for each byte of weights (rows)")
    axes.set_ylabel("1e9 products in a second")
    axes.set_title("int8 products, inputs rounded by row")
    axes.legend(loc="lower right")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    pyplot.close(figure)
