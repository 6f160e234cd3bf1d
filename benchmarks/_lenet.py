"""LeNet-300-100 on Fashion-MNIST, trained once for all rows that start from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import data, models
from jaxopt_models._demo import error_of, objective


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network and its images.

    Args:
      model: the linen module.
      params: its parameters.
      images: the images; ``held_out``, the last 10,000 training images are for choosing.
      error: from parameters to the share of wrong test images.
    """

    model: Any
    params: Any
    images: data.Images
    error: Any

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        return self.model.apply({"params": params}, x)

    def accuracy(self, params: Any) -> float:
        """Returns the share of right test images in %."""
        return 100 * (1 - self.error(params))

    def calibration(self, n: int = 1024, size: int = 256) -> list[tuple[jax.Array]]:
        """Returns batches of training images."""
        x = self.images.train_images[:n]
        return [(jnp.asarray(x[i : i + size]),) for i in range(0, n, size)]


@functools.cache
def lenet(seed: int, *, epochs: int = 20, quick: bool = False, held_out: bool = False) -> Trained:
    """Trains LeNet-300-100 with Adam; ``quick`` on the bundled images for three epochs.

    With ``held_out`` the images of validation are not trained on.
    """
    images = data.fashion_mnist_small() if quick else data.fashion_mnist()
    model = models.LeNet300()
    part = images.split().train if held_out else None
    x, y = (part.images, part.labels) if part else (images.train_images, images.train_labels)
    order = data.shuffled(x, y, size=100, seed=seed)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28)))["params"]
    steps = jom.Steps(train=(3 if quick else epochs) * order.steps_per_epoch)
    out = jom.deep_compression(
        params, objective(model), order, recipe=[], steps=steps, progress=False
    )
    return Trained(model, out.params, images, error_of(model, images))


def output_errors(trained: Trained, small: Any, n: int = 1024) -> dict[str, float]:
    """Returns the relative mean squared error of the product of each kernel on fresh inputs."""
    x = jnp.asarray(trained.images.train_images[-n:])
    stats = jom.calibrate(trained.apply, trained.params, [(x,)], ["gram"])
    rebuilt = jom.materialize(small)
    found = {}
    for layer in trained.params:
        name = f"{layer}/kernel"
        w = np.asarray(trained.params[layer]["kernel"], np.float64)
        d = w - np.asarray(rebuilt[layer]["kernel"], np.float64)
        gram = np.asarray(stats[name].gram, np.float64)
        found[name] = float(np.sum(d * (gram @ d)) / np.sum(w * (gram @ w)))
    return found


def accuracy(images: data.Images, fn: Callable[..., Any], params: Any) -> float:
    """Returns the share of test images of which a function of `(params, x)` is right, in %."""
    run, x, y = jax.jit(fn), images.test_images, images.test_labels
    parts = [slice(i, i + 1000) for i in range(0, len(x), 1000)]
    found = np.concatenate([np.asarray(run(params, x[part])).argmax(1) for part in parts])
    return 100 * float(np.mean(found == y))
