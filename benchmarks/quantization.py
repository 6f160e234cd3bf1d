"""Quantization on Fashion-MNIST: solvers, inputs, training, search; the time of GPTQ."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import jaxopt_models as jom
from jaxopt_models import quant

from . import _quantized_search, _quantized_solvers, _quantized_training
from ._lenet import Trained, accuracy, lenet, output_errors
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)


def solved(trained: Trained, encoder: jom.Encoder) -> Any:
    """Compresses all kernels, with the statistics that the encoder wants."""
    recipe = [jom.Rule(".*/kernel", encoder)]
    stats = None
    if encoder.needs:
        stats = jom.calibrate(trained.apply, trained.params, trained.calibration(), recipe)
    return jom.compress(trained.params, recipe, stats=stats)


def one_seed(seed: int, *, quick: bool) -> dict[str, float]:
    """Trains one network and measures every format and solver on it."""
    trained = lenet(seed, quick=quick)
    found = {"float": trained.accuracy(trained.params)}
    for bits in (3, 2):
        grid = quant.Int(bits=bits, symmetric=False)
        near, gptq = solved(trained, grid), solved(trained, quant.GPTQ(grid))
        found[f"rtn{bits}"] = trained.accuracy(jom.materialize(near))
        found[f"gptq{bits}"] = trained.accuracy(jom.materialize(gptq))
        a, b = output_errors(trained, near), output_errors(trained, gptq)
        found[f"times{bits}"] = min(a[k] / b[k] for k in a)
    w8a8 = jom.chain(quant.Int(bits=8), quant.Input(bits=8, per="static", symmetric=False))
    small = solved(trained, w8a8)
    run = jom.simulate(trained.apply)
    found["w8a8"] = accuracy(trained.images, run, small)
    logger.info("seed %s: %s", seed, {k: round(v, 3) for k, v in found.items()})
    return found


def run(*, quick: bool = False) -> list[Row]:
    """Measures three seeds."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else (0, 1, 2))]

    def gap(name: str, other: str) -> list[float]:
        return [s[name] - s[other] for s in seeds]

    return [
        mean_row("accuracy in float, %", [s["float"] for s in seeds]),
        mean_row("3-bit GPTQ, points above float", gap("gptq3", "float"), ">= -0.6"),
        Row(
            "3-bit GPTQ, times less output error than rounding to nearest, worst layer and seed",
            min(s["times3"] for s in seeds),
            ">= 5",
            tuple(s["times3"] for s in seeds),
            note=f"median over seeds {statistics.median(s['times3'] for s in seeds):.1f}",
        ),
        mean_row("2-bit GPTQ, points above rounding to nearest", gap("gptq2", "rtn2"), ">= 5"),
        mean_row("W8A8 static, points above float", gap("w8a8", "float"), ">= -0.3"),
        *_quantized_solvers.rows(quick=quick),
        *_quantized_search.rows(quick=quick),
        *_quantized_training.rows(quick=quick),
    ]
