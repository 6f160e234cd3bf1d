"""A residual network half as wide, taught by what its teacher computes inside."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import data, distill

from ._distilled import Fn, right
from ._distilled_resnet import ResNet20
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
WIDTH, FEW, BATCH = 16, 5000, 100
STAGES = ("stage1_block3", "stage2_block3", "stage3_block3")
EMBEDDING = 64
# Chosen on validation images with seed 100.
EPOCHS = {"teacher": 5, "student": 15}
RATE = 0.1
# Of the contrast beside the labels.
CONTRAST = 0.8


def network(width: int, seed: int) -> tuple[distill.Network, Fn, Any]:
    """Returns the network in training, its function in evaluation, and new parameters."""
    model = ResNet20(width)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 28, 28), jnp.uint8))
    step, params = jom.functional((model, variables), mutable=True)
    train = functools.partial(step, train=True)
    taps = (*STAGES, "embedding")
    return (
        distill.Network(train, taps=taps, stateful=True),
        jom.functional((model, variables))[0],
        params,
    )


def sgd(steps: int) -> optax.GradientTransformation:
    """Returns the usual optimizer of residual networks."""
    rate = optax.warmup_cosine_decay_schedule(0, RATE, steps // 20, steps)
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True)
    )


@dataclasses.dataclass(frozen=True)
class Taught:
    """What the students of all losses share.

    Args:
      images: all images.
      fn: the teacher in evaluation.
      teacher: its parameters.
    """

    images: data.Images
    fn: Fn
    teacher: Any

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what the teacher computes of images, once for all epochs."""
        run = jax.jit(jom.taps(self.fn, [*STAGES, "embedding"]))
        parts = []
        for i in range(0, len(images), 500):
            out, found = run(self.teacher, images[i : i + 500])
            parts.append(jax.tree.map(np.asarray, {**found, "logits": out}))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


@functools.cache
def taught(*, quick: bool) -> Taught:
    """Trains the teacher on all training images."""
    images = data.fashion_mnist_small() if quick else data.fashion_mnist()
    net, fn, params = network(8 if quick else WIDTH, 0)
    train = images.split().train
    batches = data.shuffled(train.images, train.labels, size=BATCH, seed=0)
    steps = 30 if quick else EPOCHS["teacher"] * batches.steps_per_epoch
    alone = distill.classification(hard=1, soft=0)
    init, step = distill.self_taught(dataclasses.replace(net, taps=()), alone, sgd(steps))
    done = distill.fit(step, init(params), batches, steps=steps, progress=False)
    logger.info("teacher: %.2f %%", right(fn, done.state.student, *_test(images)))
    return Taught(images, fn, done.state.student)


def _test(images: data.Images) -> tuple[np.ndarray, np.ndarray]:
    return images.test_images, images.test_labels


Loss = Callable[[Any, Any, Any], Any]


def losses() -> dict[str, Loss]:
    """Returns the losses by name; labels count in each of them."""

    def hard(student: Any, batch: Any) -> jax.Array:
        return distill.cross_entropy(student.out, batch[1])

    def alone(student: Any, teacher: Any, batch: Any) -> Any:
        return hard(student, batch)

    def hint(student: Any, teacher: Any, batch: Any) -> Any:
        found = [
            distill.hint(distill.project(student.heads[s], student.taps[s]), teacher.out[s])
            for s in STAGES[1:]
        ]
        return hard(student, batch) + sum(found)

    def attention(student: Any, teacher: Any, batch: Any) -> Any:
        found = [distill.attention(student.taps[s], teacher.out[s]) for s in STAGES]
        return hard(student, batch) + 1000 * sum(found)

    def relational(student: Any, teacher: Any, batch: Any) -> Any:
        pair = student.taps["embedding"], teacher.out["embedding"]
        distance, angle = distill.relational_distance(*pair), distill.relational_angle(*pair)
        return hard(student, batch) + 25 * distance + 50 * angle

    def contrast(student: Any, teacher: Any, batch: Any) -> Any:
        pair = [
            distill.project(student.heads[side], x)
            for side, x in (
                ("student", student.taps["embedding"]),
                ("teacher", teacher.out["embedding"]),
            )
        ]
        value, memory = distill.contrast(
            *pair, batch[2], student.memory, student.key, negatives=1024
        )
        return hard(student, batch) + CONTRAST * value, {"contrast": value}, memory

    def soft(student: Any, teacher: Any, batch: Any) -> Any:
        kd = distill.kd(student.out, teacher.out["logits"], temperature=4.0)
        return 0.1 * hard(student, batch) + 0.9 * kd

    return {
        "labels": alone,
        "hint": hint,
        "attention": attention,
        "relational": relational,
        "contrast": contrast,
        "kd": soft,
    }


def heads(name: str, labels: np.ndarray, widths: tuple[int, int]) -> tuple[Any, Any]:
    """Returns heads and memory of a loss."""
    a, b, c = jax.random.split(jax.random.key(7), 3)
    small, large = widths
    if name == "hint":
        return {
            s: distill.projection(k, small * 2**i, large * 2**i)
            for k, (i, s) in zip((a, b), ((1, STAGES[1]), (2, STAGES[2])), strict=True)
        }, None
    if name == "contrast":
        both = {
            "student": distill.projection(a, 4 * small, EMBEDDING),
            "teacher": distill.projection(b, 4 * large, EMBEDDING),
        }
        return both, distill.contrast_memory(c, len(labels), EMBEDDING, labels=labels)
    return None, None


def one_seed(seed: int, *, quick: bool, choose: bool = False, only: Any = None) -> dict[str, float]:
    """Trains a student by each loss, on the same images from the same beginning."""
    case = taught(quick=quick)
    train = case.images.split().train
    few = 500 if quick else FEW
    rows = np.random.default_rng(seed).permutation(len(train.labels))[:few]
    x, y = train.images[rows], train.labels[rows].astype(np.int32)
    shown = case.features(x)
    order = data.shuffled(np.arange(few), np.arange(few), size=BATCH, seed=seed)

    def batches(step: int) -> Any:
        at = order(step)[0]
        return x[at], y[at], at.astype(np.int32), {k: v[at] for k, v in shown.items()}

    held = case.images.split().validation
    wanted = (held.images, held.labels) if choose else _test(case.images)
    widths = (4, 8) if quick else (WIDTH // 2, WIDTH)
    steps = (1 if quick else EPOCHS["student"]) * order.steps_per_epoch
    found = {"teacher": right(case.fn, case.teacher, *wanted)}
    net, fn, params = network(widths[0], 100 + seed)
    for name, loss in losses().items():
        if only is not None and name not in only:
            continue
        scheme = distill.teacher_student(net, distill.stored(), loss, sgd(steps))
        head, memory = heads(name, y, widths)
        state = scheme.init(params, (), heads=head, memory=memory, key=jax.random.key(seed))
        done = distill.fit(scheme.step, state, batches, steps=steps, progress=False)
        found[name] = right(fn, done.state.student, *wanted)
        logger.info("features, seed %s, %s: %.2f", seed, name, found[name])
    return found


def rows(*, quick: bool) -> list[Row]:
    """Measures three seeds."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else (0, 1, 2))]
    names = ("hint", "attention", "relational", "contrast")

    def gap(name: str) -> list[float]:
        return [s[name] - s["labels"] for s in seeds]

    pair = "ResNet-20, width 1/2 on 5,000 images by width 1"
    bars = dict.fromkeys(names, ">= -0.3")
    best = max(names, key=lambda name: float(np.mean(gap(name))))
    return [
        Row("ResNet-20 of width 1 on all images, accuracy in %", seeds[0]["teacher"]),
        mean_row(f"{pair}: labels alone, accuracy in %", [s["labels"] for s in seeds]),
        *(
            mean_row(f"{pair}: {name}, points above labels alone", gap(name), bars.get(name, ""))
            for name in (*names, "kd")
        ),
        mean_row(f"{pair}: the best of the four ({best})", gap(best), ">= 1"),
    ]
