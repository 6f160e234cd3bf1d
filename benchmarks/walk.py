"""The walk: memory by XLA's analysis, no cost without compression, tracing, Qwix's silences."""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import models, quant

from . import _qwix_ours
from ._rows import Row

LAYERS, WIDTH, SAMPLES = 8, 724, 4  # 16 MiB of float32, 4 MiB of int8


def run(*, quick: bool) -> list[Row]:
    """Measures each claim; the comparison with Qwix needs the extra ``bench``."""
    return [
        *_memory(),
        *_no_cost(pairs=4 if quick else 30),
        *_tracing(rounds=1 if quick else 5),
        *_calibration(),
        *(_qwix() if not quick else []),
    ]


def _scanned(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def _remat(p: Any, x: jax.Array) -> jax.Array:
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jax.lax.scan(layer, x, p["w"])[0]


def _unrolled(p: Any, x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = jnp.tanh(x @ p[f"w{i}"])
    return x


def _mib(fn: Callable[..., Any], *args: Any) -> float:
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def _memory() -> list[Row]:
    w = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / 27
    x = jnp.ones((SAMPLES, WIDTH))
    int8, stacked = quant.Int(bits=8), jom.Axes(stack=1)
    stack = jom.compress({"w": w}, [jom.Rule("w", int8, stacked)])
    single = jom.compress({f"w{i}": w[i] for i in range(LAYERS)}, [jom.Rule("w.", int8)])
    newest = jax.__version_info__ >= (0, 12)
    programs = (
        ("scanned", _scanned, stack, "<= 3", "<= 7"),
        ("scanned, remat", _remat, stack, "<= 3", "<= 7"),
        ("unrolled", _unrolled, single, "<= 3" if newest else "", ""),
    )
    rows = []
    for name, fn, small, bar, scales in programs:
        go = jom.accelerate(fn)
        part, rest = jom.partition(small)

        def by_x(x: Any, p: Any, go: Any = go) -> Any:
            return go(p, x).sum()

        def by_parts(t: Any, rest: Any, x: Any, go: Any = go) -> Any:
            return go(jom.combine(t, rest), x).sum()

        grads = (jax.grad(by_x), jax.grad(by_parts))
        where = f"4 MiB of int8, {name}: MiB of temporaries"
        rows += [
            Row(f"{where} forward", _mib(go, small, x), "<= 2.5"),
            Row(f"{where}, gradient by x", _mib(grads[0], x, small), bar),
            Row(f"{where}, gradient by scales", _mib(grads[1], part, rest, x), scales),
        ]
    dense = {"w": w}
    by_x = jax.grad(lambda x, p: _scanned(p, x).sum())
    return [
        *rows,
        Row("16 MiB of float32, scanned: MiB of temporaries forward", _mib(_scanned, dense, x)),
        Row("the same, gradient by x", _mib(by_x, x, dense)),
    ]


def _no_cost(pairs: int) -> list[Row]:
    model = models.LeNet5()
    x = jax.random.uniform(jax.random.key(1), (64, 28, 28))
    fn, params = jom.functional((model, model.init(jax.random.key(0), x)))
    plain, ours = (jax.jit(f).lower(params, x).compile() for f in (fn, jom.accelerate(fn)))
    count = [_operations(c.as_text()) for c in (plain, ours)]
    differ = sum(abs(count[0][k] - count[1][k]) for k in count[0] | count[1])
    jax.block_until_ready((plain(params, x), ours(params, x)))
    ratios = []
    for i in range(pairs):
        taken = {}
        for which in (plain, ours) if i % 2 else (ours, plain):
            start = time.perf_counter()
            for _ in range(20):
                jax.block_until_ready(which(params, x))
            taken[which] = time.perf_counter() - start
        ratios.append(taken[ours] / taken[plain])
    return [
        Row("dense parameters: operations that differ from jit(fn)'s", differ, "<= 0"),
        Row("dense parameters: time over jit(fn)'s, LeNet-5", statistics.median(ratios), "<= 1.03"),
    ]


def _operations(text: str) -> collections.Counter[str]:
    return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", text))


def _tracing(rounds: int) -> list[Row]:
    token = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    deep = models.Transformer(vocab=1000, width=64, heads=4, layers=24, length=32)
    rows = []
    for name, model, x in (
        ("ResNet-50", models.ResNet50(), image),
        ("a 24-layer transformer", deep, token),
    ):
        fn, params = jom.functional(
            (model, jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x), x))
        )
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
        small = jom.compress(params, [jom.Rule(".*(kernel|embedding)", quant.Int(bits=8))])
        taken: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(rounds):
            for key, f, p in (("plain", fn, params), ("ours", jom.accelerate(fn), small)):
                jax.clear_caches()
                start = time.perf_counter()
                jax.jit(lambda p, x, f=f: f(p, x)).trace(p, x)
                taken[key].append(time.perf_counter() - start)
        ratio = statistics.median(taken["ours"]) / statistics.median(taken["plain"])
        rows.append(Row(f"tracing {name} in int8, over plain tracing", ratio, "<= 2"))
    return rows


def _calibration() -> list[Row]:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)}
    traced = []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        traced.append(1)
        return x @ p["w"]

    batches = [(jnp.asarray(rng.normal(size=(100, 32)) + 0.5, jnp.float32),) for _ in range(64)]
    names = ("absmax", "minmax", "l2", "mean", "gram")
    stats = jom.calibrate(fn, params, batches, names)["w"]
    x = np.concatenate([x for (x,) in batches]).astype(np.float64)
    want = {
        "absmax": abs(x).max(0),
        "minmax": (x.min(0), x.max(0)),
        "l2": np.linalg.norm(x, axis=0),
        "mean": x.mean(0),
        "gram": x.T @ x,
    }
    worst = 0.0
    for name in names:
        for a, b in zip(
            jax.tree.leaves(getattr(stats, name)), jax.tree.leaves(want[name]), strict=True
        ):
            worst = max(worst, float(np.max(abs(np.asarray(a) - b) / abs(b).max())))
    return [
        Row("64 batches: worst error of a statistic over float64's", worst, "<= 1e-5"),
        # One trace finds the shapes of the statistics, one is compiled for all batches.
        Row("64 batches: traces of the function", len(traced), "<= 2"),
    ]


def _qwix() -> list[Row]:
    if importlib.util.find_spec("qwix") is None:
        return []
    ours = _qwix_ours.outcomes()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._qwix_rows"], capture_output=True, text=True, check=True
    )
    theirs = {row["program"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    rows = []
    for name, good in ours.items():
        note = f"Qwix: {theirs[name]['qwix']}"
        if theirs[name]["w8a8"]:
            note += f"; with int8 activations: {theirs[name]['w8a8']}"
        rows.append(Row(f"int8, {name}: ours passes", good == "", note=f"{note} {good}".strip()))
    theirs = {name: theirs[name] for name in ours}
    silent = sum("nothing said" in row["qwix"] for row in theirs.values())
    passed = sum(row.value for row in rows)
    quantized = sum(row["qwix"] == "quantized" for row in theirs.values())
    return [
        *rows,
        Row(f"of {len(ours)} programs, int8: ours passes", passed, f">= {len(ours)}"),
        Row("the same: Qwix 0.1.8 quantizes", quantized),
        Row("the same: Qwix fails and says nothing", silent),
    ]
