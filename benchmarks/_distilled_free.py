"""Students that never see an image: handwritten digits of 8 x 8 and of 28 x 28."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import data, distill, models
from jaxopt_models.models._images import halve, pixels

from ._distilled import Fn, adam, mlp, right

logger = logging.getLogger(__name__)


def dense(params: Any, x: jax.Array) -> jax.Array:
    """Maps values `[B, 64]` in [0, 1] to logits."""
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = (jnp.maximum(x, 0) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


class HalfLeNet5(nn.Module):
    """LeNet-5 with half the channels and units: 10, 25 and 250."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, 28, 28, 1]` to logits."""
        x = halve(nn.Conv(10, (5, 5), padding="VALID", name="conv1")(pixels(images)))
        x = halve(nn.Conv(25, (5, 5), padding="VALID", name="conv2")(x))
        x = nn.relu(nn.Dense(250, name="ip1")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="ip2")(x)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of the losses of a generator.

    Args:
      apart: student and teacher differ.
      sure: the teacher is sure of one class.
      even: classes are equally frequent.
      labels: the teacher finds the label that the generator was given.
    """

    apart: float = 1.0
    sure: float = 0.5
    even: float = 5.0
    labels: float = 0.0

    def __call__(self, student: Any, teacher: Any, batch: Any) -> Any:
        """Returns the loss of the generator."""
        apart = distill.disagreement(student.out, teacher.out)
        value = -self.apart * apart + self.even * distill.information_entropy(teacher.out)
        if self.sure:
            value += self.sure * distill.one_hot(teacher.out)
        if self.labels:
            value += self.labels * distill.cross_entropy(teacher.out, batch[1])
        return value, {"apart": apart}


def near(student: Any, teacher: Any, batch: Any) -> jax.Array:
    """Returns the loss of the student, that of DFAD."""
    return distill.disagreement(student.out, teacher.out)


def sigmoid(params: Any, noise: jax.Array, labels: Any = None) -> jax.Array:
    """Returns generated images in [0, 1]."""
    return distill.generated(params, noise, labels, output=jax.nn.sigmoid)


def trained(fn: Fn, params: Any, batches: Any, steps: int) -> Any:
    """Returns a teacher."""
    init, step = distill.self_taught(fn, distill.classification(hard=1, soft=0), adam(steps))
    done = distill.fit(step, init(params), batches, steps=steps, progress=False)
    return done.state.student


@functools.cache
def digits() -> tuple[np.ndarray, ...]:
    """Returns 1,347 training and 450 test digits of scikit-learn, values in [0, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = np.float32(found.data[order]) / 16, found.target[order].astype(np.int32)
    return x[:1347], y[:1347], x[1347:], y[1347:]


def small_digits(
    seed: int, *, quick: bool, steps: int = 3000, weights: Weights | None = None
) -> dict[str, float]:
    """Teaches a student of 8 x 8 digits by generated images, and one by uniform noise."""
    x, y, test_x, test_y = digits()
    steps = 100 if quick else steps
    keys = jax.random.split(jax.random.key(seed), 4)
    batches = data.shuffled(x, y, size=64, seed=seed)
    teacher = trained(dense, mlp((64, 128, 64, 10), keys[0]), batches, 1500)
    start = mlp((64, 32, 10), keys[1])
    rate = optax.cosine_decay_schedule(3e-3, 5 * steps)
    found = {"teacher": right(dense, teacher, test_x, test_y)}
    for name in ("taught", "noise"):
        made = distill.generator(keys[2], 32, (64,), hidden=(256, 256))
        scheme = distill.data_free(
            dense,
            dense,
            near,
            weights or Weights(),
            optax.adam(rate),
            optax.adam(1e-3),
            generator=sigmoid if name == "taught" else uniform,
            batch=256,
            noise=32 if name == "taught" else 64,
            generator_steps=1 if name == "taught" else 0,
        )
        state = scheme.init(start, teacher, made, key=keys[3])
        done = distill.fit(scheme.step, state, None, steps=steps, progress=False)
        found[name] = right(dense, done.state.student, test_x, test_y)
    logger.info("digits, seed %s: %s", seed, {k: round(v, 2) for k, v in found.items()})
    return found


def uniform(params: Any, noise: jax.Array, labels: Any = None) -> jax.Array:
    """Returns noise that is uniform in [0, 1], of normally distributed noise."""
    return jax.scipy.stats.norm.cdf(noise)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a student of MNIST is taught without images; chosen with seed 100.

    Args:
      steps: of the generator.
      batch: generated images a step.
      rate: of the student.
      generator_rate: of the generator.
      channels: of the generator's convolutions; none for dense layers alone.
      hidden: of its dense layers.
      weights: of its losses.
      classes: whether it is told a label.
      memory: images that are kept.
      student_steps: for each of the generator.
    """

    steps: int = 2000
    batch: int = 256
    rate: float = 2e-3
    generator_rate: float = 1e-3
    channels: tuple[int, ...] = (32, 16)
    hidden: tuple[int, ...] = ()
    weights: Weights = dataclasses.field(default_factory=Weights)
    classes: bool = False
    memory: int = 0
    student_steps: int = 5
    noise: int = 100


def lenet_teacher(seed: int, *, quick: bool) -> tuple[Any, Any, data.Images]:
    """Returns LeNet-5 trained on MNIST, as a function and its parameters, and the images."""
    images = data.fashion_mnist_small() if quick else data.mnist()
    train = images.split().train
    model = models.LeNet5()
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 28, 28)))
    fn, params = jom.functional((model, variables))
    batches = data.shuffled(train.images, train.labels, size=100, seed=seed)
    steps = (1 if quick else 6) * batches.steps_per_epoch
    return fn, trained(fn, params, batches, steps), images


def without_images(
    seed: int, fn: Fn, teacher: Any, images: data.Images, recipe: Recipe, *, test: bool
) -> tuple[list[tuple[int, float]], Any]:
    """Teaches a half-width student; returns its accuracy along the steps, and its parameters."""
    model = HalfLeNet5()
    student, params = jom.functional(
        (model, jax.jit(model.init)(jax.random.key(seed + 1), jnp.zeros((1, 28, 28, 1))))
    )
    classes = 10 if recipe.classes else None
    made = distill.generator(
        jax.random.key(seed + 2),
        recipe.noise,
        (28, 28, 1),
        hidden=recipe.hidden,
        channels=recipe.channels,
        classes=classes,
    )
    total = recipe.steps * recipe.student_steps
    scheme = distill.data_free(
        student,
        fn,
        near,
        recipe.weights,
        optax.adam(optax.cosine_decay_schedule(recipe.rate, total)),
        optax.adam(recipe.generator_rate),
        generator=sigmoid,
        batch=recipe.batch,
        noise=recipe.noise,
        classes=classes,
        memory=recipe.memory,
        student_steps=recipe.student_steps,
    )
    state = scheme.init(params, teacher, made, key=jax.random.key(seed + 3))
    held = images.split().validation
    x, y = (images.test_images, images.test_labels) if test else (held.images, held.labels)
    curve = []

    def score(state: Any) -> float:
        curve.append((int(state.step), right(student, state.student, x, y)))
        logger.info("mnist, seed %s: %s", seed, curve[-1])
        return 0.0

    # No state is chosen by what it scores: the last one counts.
    done = distill.fit(
        scheme.step,
        state,
        None,
        steps=recipe.steps,
        evaluate=score,
        every=max(1, recipe.steps // 10),
        progress=False,
    )
    return curve, done.state.student
