"""Gradients that travel compressed: LeNet-5 over eight devices."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

import jaxopt_models as jom
from jaxopt_models import data, models, parallel

from ._children import DEVICES
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
STEPS, BATCH, RATE = 600, 128, 1e-3
#: By name how gradients travel, and whether what is not sent is kept.
WAYS: dict[str, tuple[Any, bool]] = {
    "float32": (None, True),
    "int8": (parallel.Int8(), True),
    "int8, what is lost forgotten": (parallel.Int8(), False),
    "the largest 1 %": (parallel.TopK(share=0.01), True),
    "the largest 1 %, the rest forgotten": (parallel.TopK(share=0.01), False),
}


def one_seed(seed: int, *, quick: bool) -> dict[str, tuple[float, float]]:
    """Trains in each way; returns the final loss on training images, and bytes sent a step."""
    images = (data.fashion_mnist_small() if quick else data.fashion_mnist()).split().train
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    variables = jax.jit(models.LeNet5().init)(jax.random.key(seed), jnp.zeros((1, 28, 28)))
    fn, params = jom.functional((models.LeNet5(), variables))
    steps = 5 if quick else STEPS
    order = data.shuffled(images.images, images.labels.astype(np.int32), size=BATCH, seed=seed)

    def loss(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        found = optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y)
        return jnp.mean(found)

    @jax.jit
    def loss_of(params: Any, batch: Any) -> jax.Array:
        return loss(params, batch)

    found = {}
    for name, (codec, feedback) in WAYS.items():
        tx = optax.adam(optax.cosine_decay_schedule(RATE, steps))
        train = parallel.data_parallel(loss, tx, mesh, codec=codec, feedback=feedback)
        state = train.init(params)
        sent = sum(c.sent for c in parallel.collectives(train.compiled(state, order(0))))
        for step in range(steps):
            # Simulated devices share threads: one step at a time, or steps wait for each other.
            state, _ = jax.block_until_ready(train.step(state, order(step)))
        size = min(1000, len(images.images))
        parts = range(0, len(images.images) - size + 1, size)
        last = [
            float(loss_of(state.params, (images.images[i : i + size], images.labels[i : i + size])))
            for i in parts
        ]
        found[name] = statistics.fmean(last), sent
        logger.info("gradients, seed %s, %s: %.4f, %.0f bytes", seed, name, *found[name])
    return found


def rows(*, quick: bool) -> list[Row]:
    """Measures three seeds."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else (0, 1, 2))]
    what = f"LeNet-5, Adam, {STEPS} steps, {DEVICES} devices"
    made = [mean_row(f"{what}: loss by float32", [s["float32"][0] for s in seeds])]
    for name in list(WAYS)[1:]:
        barred = name == "int8"
        ratios = [s[name][0] / s["float32"][0] for s in seeds]
        made.append(mean_row(f"{what}, {name}: loss over that", ratios, "<= 1.01" * barred))
        if WAYS[name][1]:
            sent = seeds[0][name][1] / seeds[0]["float32"][1]
            bar = "<= 0.3" if barred else ""
            made.append(Row(f"{what}, {name}: bytes sent over float32's", sent, bar))
    return made
