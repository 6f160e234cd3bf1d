"""Students of few images: soft targets, images without labels, a class that is missing."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from jaxopt_models import data, distill

from ._distilled import BATCH, Task, adam, apply, logits, task
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
# Chosen on validation images with seeds 100 and 101.
STEPS = {"ce": 1000, "kd": 2000, "mixed": 6000, "unlabelled": 6000, "missing": 12_000}
# Of the beta distribution of the shares in which two images are mixed.
MIXED = 0.2
TEMPERATURE = 4.0
MISSING = 3


def taught(task: Task, loss: Any, batches: Any, steps: int) -> Any:
    """Returns a student that a teacher taught."""
    scheme = distill.teacher_student(apply, apply, loss, adam(steps))
    state = scheme.init(task.student(), task.teacher)
    return distill.fit(scheme.step, state, batches, steps=steps, progress=False).state.student


def alone(task: Task, batches: Any, steps: int) -> Any:
    """Returns a student that learned from labels alone."""
    scheme = distill.self_taught(apply, distill.classification(hard=1, soft=0), adam(steps))
    state = scheme.init(task.student())
    done = distill.fit(scheme.step, state, batches, steps=steps, progress=False)
    return done.state.student


def mixed(task: Task) -> Any:
    """Returns batches of images between two images, with as much of the labels of both."""
    batches, names = task.batches(), np.eye(10, dtype=np.float32)

    def at(step: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = batches(step)
        rng = np.random.default_rng((task.seed, step))
        share = np.float32(rng.beta(MIXED, MIXED, len(x)))[:, None]
        other = rng.permutation(len(x))
        images = share[..., None] * x + (1 - share[..., None]) * x[other]
        return np.uint8(images + 0.5), share * names[y] + (1 - share) * names[y[other]]

    return at


def unlabelled(task: Task, count: int) -> Any:
    """Returns batches of images, labels left out."""
    batches = task.batches(count)
    return lambda step: batches(step)[0]


def without_class(task: Task) -> Any:
    """Returns batches of all training images, those of one class left out, and no labels."""
    x, y = task.part(len(task.order))
    x = x[y != MISSING]
    batches = data.shuffled(x, np.zeros(len(x)), size=BATCH, seed=task.seed)
    return lambda step: batches(step)[0]


def recall(params: Any, task: Task, offsets: Any = 0.0) -> float:
    """Returns the share of the test images of the missing class that are found."""
    chosen = task.images.test_labels == MISSING
    found = logits(apply, params, task.images.test_images[chosen]) + np.asarray(offsets)
    return float(np.mean(found.argmax(1) == MISSING))


def one_seed(seed: int, *, quick: bool) -> dict[str, float]:
    """Trains all students of one seed."""
    case = task(seed, quick=quick)
    many = 5000 if quick else 20_000
    soft = distill.classification(hard=0, soft=1, temperature=TEMPERATURE)
    found = {"teacher": case.test(case.teacher)}
    steps = {k: v // 20 for k, v in STEPS.items()} if quick else STEPS
    found["ce"] = case.test(alone(case, case.batches(), steps["ce"]))
    found["ce_mixed"] = case.test(alone(case, mixed(case), steps["ce"]))
    found["kd"] = case.test(taught(case, soft, case.batches(), steps["kd"]))
    found["kd_mixed"] = case.test(taught(case, soft, mixed(case), steps["mixed"]))
    more = taught(case, soft, unlabelled(case, many), steps["unlabelled"])
    found["unlabelled"] = case.test(more)
    cut = taught(case, soft, without_class(case), steps["missing"])
    found["recall"] = recall(cut, case)
    # Validation images without their labels: all classes are as frequent as one another.
    seen = logits(apply, cut, case.images.split().validation.images)
    offsets = distill.bias_correction(seen, np.full(10, 0.1))
    found["corrected"] = recall(cut, case, offsets)
    wrong = logits(apply, cut, case.images.test_images) + np.asarray(offsets)
    found["all"] = 100 * float(np.mean(wrong.argmax(1) == case.images.test_labels))
    logger.info("classes, seed %s: %s", seed, {k: round(v, 3) for k, v in found.items()})
    return found


def rows(*, quick: bool) -> list[Row]:
    """Measures three seeds."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else (0, 1, 2))]

    def gap(name: str) -> list[float]:
        return [s[name] - s["ce"] for s in seeds]

    def column(name: str) -> list[float]:
        return [s[name] for s in seeds]

    few = "784-64-10, 2,000 images"
    return [
        mean_row("teacher 784-500-300-10, all images, accuracy in %", column("teacher")),
        mean_row(f"{few}, labels alone, accuracy in %", column("ce")),
        mean_row(f"{few}, labels of mixed images, points above labels alone", gap("ce_mixed")),
        mean_row(f"{few}, KD, points above labels alone", gap("kd")),
        mean_row(
            f"{few}, KD on mixed images, points above labels alone", gap("kd_mixed"), ">= 1.2"
        ),
        mean_row(
            "784-64-10, KD on 20,000 images without labels, points above 2,000 labels alone",
            gap("unlabelled"),
            ">= 2.8",
        ),
        mean_row("784-64-10, KD without an image of class 3: recall of it", column("recall")),
        mean_row(
            "784-64-10, KD without an image of class 3, bias corrected: recall of it",
            column("corrected"),
            ">= 0.85",
        ),
        mean_row("784-64-10, the same: accuracy of all classes in %", column("all")),
    ]
