"""A pruned network with shared weights, recovered with few labels, with and without a teacher."""

from __future__ import annotations

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import codebook, data, distill, prune

from ._distilled import BATCH, Fn, adam, right
from ._lenet import lenet
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
LABELLED = 2000
SPARSITY, BITS = 0.97, 3
# Steps with pruned weights, and with shared ones; chosen on validation images with seed 100.
STEPS = (6000, 3000)
TEMPERATURE = 4.0


def recovered(
    fn: Fn, dense: Any, scheme_of: Any, batches: Any, *, steps: tuple[int, int], start: Any
) -> Any:
    """Prunes, trains what is left, shares it, and trains the shared values."""
    masked = jom.compress(dense, [jom.Rule(".*/kernel", prune.Magnitude(sparsity=SPARSITY))])
    tree = masked
    for count, recipe in zip(
        steps, (None, [jom.Rule(".*/kernel", codebook.KMeans(bits=BITS))]), strict=True
    ):
        tree = tree if recipe is None else jom.compress(tree, recipe)
        scheme = scheme_of(count)
        state = scheme.init(tree, *start)
        tree = distill.fit(scheme.step, state, batches, steps=count, progress=False).state.student
    return tree


def one_seed(seed: int, *, quick: bool, choose: bool = False) -> dict[str, float]:
    """Recovers one network in four ways."""
    trained = lenet(seed, quick=quick, held_out=choose)
    images, fn = trained.images, jom.accelerate(trained.apply)
    part = images.split().validation if choose else None
    x = images.test_images if part is None else part.images
    y = images.test_labels if part is None else part.labels
    inputs, labels = images.train_images, images.train_labels
    if choose:
        inputs, labels = images.split().train.images, images.split().train.labels
    rows = np.random.default_rng(seed).permutation(len(labels))[:LABELLED]
    few = data.shuffled(inputs[rows], labels[rows], size=BATCH, seed=seed)
    every = data.shuffled(inputs, labels, size=BATCH, seed=seed)
    steps = tuple(s // 20 for s in STEPS) if quick else STEPS

    def alone(count: int) -> Any:
        return distill.self_taught(
            trained.apply, distill.classification(hard=1, soft=0), adam(count)
        )

    def taught(count: int) -> Any:
        soft = distill.classification(hard=0, soft=1, temperature=TEMPERATURE)
        return distill.teacher_student(trained.apply, trained.apply, soft, adam(count))

    def both(count: int) -> Any:
        soft = distill.classification(hard=0.1, soft=0.9, temperature=TEMPERATURE)
        return distill.teacher_student(trained.apply, trained.apply, soft, adam(count))

    teacher = (trained.params,)
    ways = {
        "labels": (alone, few, ()),
        "taught": (taught, lambda step: every(step)[0], teacher),
        "all": (alone, every, ()),
        "all_taught": (both, every, teacher),
    }
    found, zeros = {"dense": right(trained.apply, trained.params, x, y)}, []
    for name, (scheme, batches, start) in ways.items():
        tree = recovered(trained.apply, trained.params, scheme, batches, steps=steps, start=start)
        found[name] = right(fn, tree, x, y)
        zeros += [float(jnp.mean(tree[k]["kernel"].materialize() == 0)) for k in tree]
    found["sparsity"] = min(zeros)
    logger.info("recovery, seed %s: %s", seed, {k: round(v, 3) for k, v in found.items()})
    return found


def rows(*, quick: bool) -> list[Row]:
    """Measures three seeds."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else (0, 1, 2))]

    def gap(name: str, other: str) -> list[float]:
        return [s[name] - s[other] for s in seeds]

    what = "LeNet-300-100, 97 % pruned, 3-bit clusters"
    return [
        mean_row("LeNet-300-100 dense, accuracy in %", [s["dense"] for s in seeds]),
        mean_row(f"{what}, 2,000 labels: points below dense", [-g for g in gap("labels", "dense")]),
        mean_row(
            f"{what}, taught on images without labels: points above 2,000 labels alone",
            gap("taught", "labels"),
            ">= 1",
        ),
        mean_row(
            f"{what}, all labels, taught as well: points above labels alone",
            gap("all_taught", "all"),
        ),
    ]
