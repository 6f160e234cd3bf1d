"""Deep Compression on full MNIST and Fashion-MNIST, beside the figures of the paper.

Needs the full sets (``python -c "import jaxopt_models as jom; jom.data.mnist()"`` says how to
get them). Densities, widths, epochs, weight decay and smoothing were chosen on the last 10,000
training images, by the error of the compressed network; here the networks train on all 60,000
and the test images are looked at once, at the end. The baseline minimizes the same loss with
the same optimizer, for as many steps as the whole pipeline takes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import data, models
from jaxopt_models._demo import error_of, objective, recipe

from ._rows import Row, mean_row

logger = logging.getLogger(__name__)

#: Rows of Deep Compression, tables 2 and 3: layer, kept %, code bits, index bits (both
#: coded), share of float32 in %. The totals of the paper count no biases and no header.
HAN = {
    "LeNet300": [
        ("ip1", 8, 4.4, 3.7, 2.32),
        ("ip2", 9, 4.4, 4.3, 3.04),
        ("ip3", 26, 4.3, 3.2, 12.7),
    ],
    "LeNet5": [
        ("conv1", 66, 7.2, 1.5, 67.45),
        ("conv2", 12, 7.2, 3.9, 5.28),
        ("ip1", 8, 4.5, 4.5, 2.45),
        ("ip2", 19, 5.2, 3.7, 6.13),
    ],
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One network on one set: densities and widths by layer, epochs of the stages."""

    images: Callable[[], data.Images]
    model: type
    layers: dict[str, tuple[float, int]]
    epochs: tuple[int, int, int]
    batch: int
    rates: tuple[float, float, float] = (1e-3, 1e-3, 3e-4)
    decay: float = 0.0
    smoothing: float = 0.0
    shift: int = 0
    baseline: bool = True

    def recipe(self) -> list[jom.Rule]:
        """Returns pruned and clustered kernels, 8-bit biases."""
        return recipe(self.layers)


def shifted(batches: Callable[[int], Any], *, most: int, seed: int) -> Callable[[int], Any]:
    """Moves every image by up to ``most`` pixels, a function of the step alone."""
    if not most:
        return batches

    def batch(step: int) -> Any:
        x, y = batches(step)
        rng = np.random.default_rng((seed, step))
        dx, dy = rng.integers(0, 2 * most + 1, (2, len(x), 1))
        padded = np.pad(x, ((0, 0), (most, most), (most, most)))
        at = np.arange(x.shape[1])[None, :]
        rows, columns = (dy + at)[:, :, None], (dx + at)[:, None, :]
        return padded[np.arange(len(x))[:, None, None], rows, columns], y

    return batch


def one_seed(setting: Setting, seed: int, folder: str) -> dict[str, Any]:
    """Trains, compresses and tests one seed, and a baseline beside it."""
    images = setting.images()
    model = setting.model()
    order = data.shuffled(images.train_images, images.train_labels, size=setting.batch, seed=seed)
    batches = shifted(order, most=setting.shift, seed=seed)
    rates = dict(zip(("train", "prune", "tune"), setting.rates, strict=True))

    loss_fn = objective(model, decay=setting.decay, smoothing=setting.smoothing)
    error = error_of(model, images)

    def optimizer(stage: str, steps: int) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rates[stage], steps))

    def train(recipe: list[jom.Rule], steps: jom.Steps, path: str | None) -> Any:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28)))["params"]
        return jom.deep_compression(
            params,
            loss_fn,
            batches,
            recipe=recipe,
            steps=steps,
            path=path,
            optimizer=optimizer,
            progress=False,
        )

    start = time.perf_counter()
    per_epoch = order.steps_per_epoch
    path = os.path.join(folder, f"{secrets.token_hex(4)}_{seed}.jom")
    train(setting.recipe(), jom.Steps(*(e * per_epoch for e in setting.epochs)), path)
    seconds = time.perf_counter() - start
    found = {
        "path": path,
        "ratio": jom.artifact.inspect(path).data["ratio"],
        "error": 100 * error(jom.materialize(jom.load(path))),
        "seconds": seconds,
    }
    if setting.baseline:
        dense = train([], jom.Steps(train=sum(setting.epochs) * per_epoch), None)
        found["baseline"] = 100 * error(dense.params)
        found["rise"] = found["error"] - found["baseline"]
    return found


def beside_the_paper(setting: Setting, path: str) -> jom.Table:
    """Returns our layers beside those of the paper."""
    ours = {row["path"]: row for row in jom.layers(path)}
    rows = []
    for name, *theirs in HAN[setting.model.__name__]:
        row = ours[f"{name}/kernel"]
        mine = row["kept %"], row["coded to"], row["index bits"], row["of float32 %"]
        rows.append((name, *(x for pair in zip(mine, theirs, strict=True) for x in pair)))
    names = ("kept %", "code bits", "index bits", "of float32 %")
    columns = ("layer", *(c for n in names for c in (n, f"{n} (paper)")))
    return jom.Table(columns, rows, title=f"{setting.model.__name__}, one seed, beside the paper")


SETTINGS = {
    "mnist": Setting(
        data.mnist,
        models.LeNet300,
        {"ip1": (0.0645, 4), "ip2": (0.09, 4), "ip3": (0.3, 4)},
        (15, 25, 5),
        200,
        rates=(1e-3, 1e-3, 1e-3),
        decay=1e-4,
    ),
    "mnist shifted": Setting(
        data.mnist,
        models.LeNet300,
        {"ip1": (0.075, 4), "ip2": (0.1, 4), "ip3": (0.3, 4)},
        (10, 30, 5),
        200,
        shift=1,
        baseline=False,
    ),
    "lenet5": Setting(
        data.mnist,
        models.LeNet5,
        {"conv1": (0.66, 6), "conv2": (0.13, 5), "ip1": (0.065, 4), "ip2": (0.2, 5)},
        (4, 9, 2),
        100,
        shift=1,
        baseline=False,
    ),
    "fashion": Setting(
        data.fashion_mnist,
        models.LeNet300,
        {"ip1": (0.079, 4), "ip2": (0.108, 4), "ip3": (0.33, 4)},
        (5, 60, 15),
        200,
        rates=(1e-3, 1e-3, 1e-3),
        decay=1e-4,
        smoothing=0.1,
    ),
}


WORDS = {
    "ratio": "ratio",
    "error": "test error in %",
    "baseline": "test error of the baseline in %",
    "rise": "rise of the error in points",
    "seconds": "seconds of the pipeline",
}


def measure(plans: list[tuple[str, Setting, int, dict[str, str]]]) -> list[Row]:
    """Returns the rows of settings, each with its title, seeds and bars by figure.

    Seeds run side by side, a process for each processor: a network this small does not
    keep two of them busy.
    """
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(
            os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
        ) as pool,
    ):
        jobs = {
            title: [pool.submit(one_seed, setting, seed, folder) for seed in range(seeds)]
            for title, setting, seeds, _ in plans
        }
        for title, setting, _, bars in plans:
            found = []
            for job in jobs[title]:
                found.append(job.result())
                logger.info("%s: %s", title, found[-1])
            logger.info("%s", beside_the_paper(setting, found[0]["path"]))
            for figure, words in WORDS.items():
                if figure in found[0]:
                    values = [f[figure] for f in found]
                    rows.append(mean_row(f"{title}, {words}", values, bars.get(figure, "")))
    return rows


def run(*, quick: bool) -> list[Row]:
    """Runs every setting; ``quick``: LeNet-300-100 on the bundled images, one seed."""
    if quick:
        setting = dataclasses.replace(
            SETTINGS["fashion"], images=data.fashion_mnist_small, batch=100, epochs=(2, 6, 1)
        )
        return measure([("bundled Fashion-MNIST", setting, 1, {"ratio": ">= 40"})])
    shifted = "images shifted by a pixel"
    return measure(
        [
            (
                f"MNIST LeNet-5, {shifted}",
                SETTINGS["lenet5"],
                3,
                {"ratio": ">= 45", "error": "<= 0.80"},
            ),
            ("MNIST LeNet-300-100", SETTINGS["mnist"], 5, {"ratio": ">= 60", "rise": "<= 0.10"}),
            (
                "Fashion-MNIST LeNet-300-100",
                SETTINGS["fashion"],
                3,
                {"ratio": ">= 47", "rise": "<= 0.4"},
            ),
            (
                f"MNIST LeNet-300-100, {shifted}",
                SETTINGS["mnist shifted"],
                3,
                {"ratio": ">= 45", "error": "<= 1.64"},
            ),
        ]
    )
