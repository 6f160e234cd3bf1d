"""What rows about distillation on small images have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_models import data, distill

TEACHER = (784, 500, 300, 10)
STUDENT = (784, 64, 10)
BATCH = 100
Fn = Callable[..., jax.Array]


def mlp(sizes: Sequence[int], key: jax.Array) -> dict[str, Any]:
    """Returns parameters of dense layers with ReLU between them."""
    keys = jax.random.split(key, len(sizes) - 1)
    he = jax.nn.initializers.he_normal()
    return {
        f"layer{i}": {"kernel": he(k, (a, b)), "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def apply(params: Any, images: jax.Array) -> jax.Array:
    """Maps images `[B, ...]`, bytes, to logits."""
    x = images.reshape(len(images), -1).astype(jnp.float32) / 255
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = jnp.maximum(x, 0) if i else x
        x = x @ layer["kernel"] + layer["bias"][None]
    return x


def adam(steps: int, rate: float = 1e-3) -> optax.GradientTransformation:
    """Returns Adam whose rate falls to zero along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def right(fn: Fn, params: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of images that a function classifies rightly, in %."""
    found = logits(fn, params, images).argmax(1)
    return 100 * float(np.mean(found == labels))


@functools.lru_cache(maxsize=64)
def _compiled(fn: Fn) -> Fn:
    return jax.jit(fn)


def logits(fn: Fn, params: Any, images: np.ndarray, size: int = 1000) -> np.ndarray:
    """Returns a function's logits of many images."""
    run = _compiled(fn)
    parts = [np.asarray(run(params, images[i : i + size])) for i in range(0, len(images), size)]
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Task:
    """Images, a teacher of them, and the part that a student gets.

    Args:
      images: all of them.
      teacher: parameters of the teacher.
      seed: of everything random.
      few: number of labelled images that the student gets.
    """

    images: data.Images
    teacher: Any
    seed: int
    few: int

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The training images (validation left out) in the order in which they are given away."""
        return np.random.default_rng(self.seed).permutation(len(self.images.split().train.labels))

    def part(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first ``count`` images and labels in that order."""
        rows = self.order[:count]
        return self.images.train_images[rows], self.images.train_labels[rows]

    def batches(self, count: int | None = None) -> data.Shuffled:
        """Returns batches of the first images."""
        x, y = self.part(count or self.few)
        return data.shuffled(x, y, size=BATCH, seed=self.seed)

    def test(self, params: Any, fn: Fn = apply) -> float:
        """Returns the share of right test images in %."""
        return right(fn, params, self.images.test_images, self.images.test_labels)

    def validation(self, params: Any, fn: Fn = apply) -> float:
        """Returns the share of right validation images in %."""
        held = self.images.split().validation
        return right(fn, params, held.images, held.labels)

    def student(self, index: int = 0) -> Any:
        """Returns new parameters of a student."""
        return mlp(STUDENT, jax.random.key(1000 * (index + 1) + self.seed))


@functools.cache
def task(seed: int, *, quick: bool) -> Task:
    """Trains a teacher on all training images."""
    images = data.fashion_mnist_small() if quick else data.fashion_mnist()
    batches = data.shuffled(images.train_images, images.train_labels, size=BATCH, seed=seed)
    steps = (3 if quick else 20) * batches.steps_per_epoch
    alone = distill.classification(hard=1, soft=0)
    init, step = distill.self_taught(apply, alone, adam(steps))
    state = init(mlp(TEACHER, jax.random.key(seed)))
    teacher = distill.fit(step, state, batches, steps=steps, progress=False).state.student
    return Task(images, teacher, seed, 1000 if quick else 2000)
