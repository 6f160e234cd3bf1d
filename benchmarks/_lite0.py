"""EfficientNet-Lite0 and photographs: what rows that start from them have in common."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import models

from ._trees import is_encoded, leaves

BATCH = 8
# The photographs whose classes are published, and the others of the same package.
NAMED = {
    "skimage": ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
OTHERS = (
    *("astronaut.png", "brick.png", "cell.png", "coins.png", "grass.png", "gravel.png"),
    *("horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png", "retina.jpg"),
)
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_PIP = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def _pixels(package: str, name: str) -> np.ndarray:
    from PIL import Image

    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} is in a package: pip install {_PIP[package]}")
    with Image.open(pathlib.Path(spec.origin).parent / _FOLDERS[package] / name) as image:
        return np.asarray(image.convert("RGB"))


def _crops(images: list[np.ndarray], count: int, seed: int) -> np.ndarray:
    """Returns squares of random places and sizes, half of them mirrored."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.shape[:2]) * rng.uniform(0.6, 1.0))
        top, left = (int(rng.integers(0, n - side + 1)) for n in image.shape[:2])
        part = image[top : top + side, left : left + side]
        found.append(models.lite0_photo(part[:, ::-1] if rng.random() < 0.5 else part))
    return np.stack(found)


@functools.cache
def named() -> np.ndarray:
    """Returns the seven named photographs and 64 crops of them."""
    images = [_pixels(package, name) for package, names in NAMED.items() for name in names]
    return np.concatenate(
        [np.stack([models.lite0_photo(x) for x in images]), _crops(images, 64, 0)]
    )


@functools.cache
def others(count: int, seed: int) -> np.ndarray:
    """Returns crops of other photographs."""
    return _crops([_pixels("skimage", name) for name in OTHERS], count, seed)


def batches(images: np.ndarray) -> list[tuple[jax.Array]]:
    """Cuts images into batches."""
    return [(jnp.asarray(images[i : i + BATCH]),) for i in range(0, len(images), BATCH)]


@functools.cache
def network() -> dict[str, Any]:
    """Reads the weights and the statistics of the norms."""
    return models.load_lite0()


def apply(variables: Any, images: jax.Array) -> jax.Array:
    """Returns logits `[B, 1000]`."""
    return models.EfficientNetLite0().apply(variables, images)


_compiled = jax.jit(apply)
_rounding = jax.jit(jom.simulate(apply))


def logits(variables: Any, images: np.ndarray) -> np.ndarray:
    """Returns the logits of many images; inputs are rounded where leaves say so."""
    run = _rounding if any(map(is_encoded, leaves(variables))) else _compiled
    pad = np.concatenate([images, images[:1].repeat(-len(images) % BATCH, axis=0)])
    found = [np.asarray(run(variables, *batch)) for batch in batches(pad)]
    return np.concatenate(found)[: len(images)]


class Agreement:
    """How often a compressed network gives an image the class that the float one gives.

    Args:
      images: `float32[N, 224, 224, 3]`.
    """

    def __init__(self, images: np.ndarray):
        self.images = images
        self.float = logits(network(), images)

    def __call__(self, variables: Any) -> float:
        """Returns the share of images."""
        return float(np.mean(logits(variables, self.images).argmax(1) == self.float.argmax(1)))
