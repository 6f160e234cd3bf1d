"""A small network of images that captions teach, read by MiniLM, beside one that labels teach."""

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

from ._minilm import LENGTH, encoder
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
SIZE, WIDTH, BATCH = 48, 256, 32
# Chosen on validation images, epochs for each student; of the others both liked the same best.
EPOCHS = {"captions": 60, "labels": 120}
RATE, RIDGE, TEMPERATURE = 2e-3, 30.0, 0.2


class Eye(nn.Module):
    """Three convolutions and a mean over places."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps bytes `[B, 48, 48, 3]` to features `[B, 256]`."""
        x = images.astype(jnp.float32) / 127.5 - 1
        for width, kernel, stride in ((64, 4, 4), (128, 3, 2), (WIDTH, 3, 2)):
            x = nn.Conv(width, (kernel, kernel), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(8)(x))
        return jnp.mean(x, axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Images, and what is known of each.

    Args:
      images: bytes `[N, 48, 48, 3]`.
      captions: their texts.
      vectors: MiniLM's of the captions, `[N, 384]`.
      labels: numbers of the categories.
    """

    images: np.ndarray
    captions: np.ndarray
    vectors: np.ndarray
    labels: np.ndarray

    def __add__(self, other: Pairs) -> Pairs:
        """Returns both, one behind the other."""
        fields = [f.name for f in dataclasses.fields(self)]
        return Pairs(*(np.concatenate([getattr(p, f) for p in (self, other)]) for f in fields))


@functools.cache
def parts() -> tuple[Pairs, Pairs, Pairs]:
    """Reads the parts for training, validation and the test."""
    stamps = data.tux_paint()
    kinds = sorted(set(stamps.categories))
    found = []
    for part in stamps.split():
        tokens = models.minilm_tokens(part.captions, length=LENGTH)
        vectors = encoder().vectors(encoder().params, tokens)
        labels = np.array([kinds.index(name) for name in part.categories])
        images = part.images(size=SIZE)
        found.append(Pairs(images, np.array(part.captions), vectors, labels))
    return tuple(found)


def moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns images a few pixels aside, half of them mirrored."""
    pad, count = SIZE // 8, len(images)
    mirrored = rng.random(count) < 0.5
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=255)
    places = rng.integers(0, 2 * pad + 1, (count, 2))
    cuts = zip(images, places, strict=True)
    return np.stack([image[y : y + SIZE, x : x + SIZE] for image, (y, x) in cuts])


def by_captions(student: distill.Seen, teacher: distill.Seen, batch: Any) -> jax.Array:
    """Images are to be as similar to the captions of a batch as their own captions are."""
    found = distill.project(student.heads, student.out)
    texts = teacher.out
    return distill.affinity(found, texts, texts, texts, temperature=TEMPERATURE)


def by_labels(student: distill.Seen, teacher: distill.Seen, batch: Any) -> jax.Array:
    """Images are to be told apart by their categories; the teacher is not asked."""
    return distill.cross_entropy(distill.project(student.heads, student.out), batch[1])


def student(seed: int) -> tuple[Any, Any]:
    """Returns a student's function, and new parameters."""
    image = jnp.zeros((1, SIZE, SIZE, 3), jnp.uint8)
    return jom.functional((Eye(), jax.jit(Eye().init)(jax.random.key(seed), image)))


def taught(known: Pairs, loss: Any, *, seed: int, epochs: int) -> Any:
    """Returns a student's parameters after training."""
    fn, params = student(seed)
    outputs = known.vectors.shape[1] if loss is by_captions else known.labels.max() + 1
    heads = distill.projection(jax.random.key(seed + 1000), WIDTH, int(outputs))
    center = known.vectors.mean(0)
    order = data.shuffled(np.arange(len(known.images)), known.labels, size=BATCH, seed=seed)

    def batch_at(step: int) -> Any:
        rows, labels = order(step)
        rng = np.random.default_rng((seed, step))
        return moved(known.images[rows], rng), labels, known.vectors[rows] - center

    steps = epochs * order.steps_per_epoch
    tx = optax.adamw(optax.cosine_decay_schedule(RATE, steps))
    scheme = distill.teacher_student(fn, distill.stored(), loss, tx)
    state = scheme.init(params, (), heads=heads)
    done = distill.fit(scheme.step, state, batch_at, steps=steps, progress=False)
    return done.state.student


def recall(fn: Any, params: Any, known: Pairs, unseen: Pairs, *, best: int = 5) -> float:
    """Returns how many images find their caption among the best few of the unseen ones, in %.

    Features of the student become vectors of captions by a ridge regression on the known pairs.
    """
    run = jax.jit(fn)
    x, new = (np.float64(run(params, p.images)) for p in (known, unseen))
    mean, scale, center = x.mean(0), x.std(0) + 1e-6, known.vectors.mean(0)
    x, new = (x - mean) / scale, (new - mean) / scale
    gram = x.T @ x + RIDGE * np.eye(x.shape[1])
    found = new @ np.linalg.solve(gram, x.T @ (known.vectors - center))
    captions = unseen.vectors - center
    similar = found @ (captions / np.linalg.norm(captions, axis=1, keepdims=True)).T
    nearest = np.argsort(-similar, axis=1)[:, :best]
    # Some captions are those of several images.
    hits = (unseen.captions[nearest] == unseen.captions[:, None]).any(1)
    return 100 * float(np.mean(hits))


def one_seed(seed: int, *, quick: bool, test: bool = True) -> dict[str, float]:
    """Trains both students; without ``test`` on fewer images, and measures on validation ones."""
    train, validation, last = parts()
    epochs = dict.fromkeys(EPOCHS, 2) if quick else EPOCHS
    known, unseen = (train + validation, last) if test else (train, validation)
    fn, start = student(seed)
    trees = {
        "captions": taught(known, by_captions, seed=seed, epochs=epochs["captions"]),
        "labels": taught(known, by_labels, seed=seed, epochs=epochs["labels"]),
        "untrained": start,
    }
    found = {name: recall(fn, params, known, unseen) for name, params in trees.items()}
    logger.info("towers, seed %s: %s", seed, {k: round(v, 3) for k, v in found.items()})
    return found


def rows(*, quick: bool) -> list[Row]:
    """Measures three seeds."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else (0, 1, 2))]
    known, unseen = sum(len(p.labels) for p in parts()[:2]), len(parts()[2].labels)
    claim = f"stamps, {known} images known: the caption of {unseen} unseen ones is among the best 5"
    gaps = [s["captions"] - s["labels"] for s in seeds]
    return [
        *(
            mean_row(f"{claim}, student {what}, %", [s[name] for s in seeds])
            for name, what in (
                ("untrained", "untrained"),
                ("labels", "taught by categories alone"),
                ("captions", "taught by MiniLM's vectors of captions"),
            )
        ),
        # One image of one seed is 0.3.
        mean_row(
            "stamps, caption among the best 5: points that captions teach more than categories",
            gaps,
            ">= 0.1",
        ),
    ]
