"""The main job: Deep Compression of a real network on real images, as one function."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import artifact, codebook, data, models, prune, quant
from ._chain import chain
from ._encoded import materialize
from ._layers import layers
from ._pipeline import Steps, deep_compression
from ._recipe import Rule
from ._table import Table

#: Densities and code widths by layer, chosen on a validation split of the training images.
LAYERS = {"ip1": (0.06, 4), "ip2": (0.09, 4), "ip3": (0.3, 4)}
BATCH = 100
#: Epochs of training, pruning and tuning.
EPOCHS = (10, 30, 5)


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demo found.

    Args:
      data: ``ratio``, ``file_bytes``, ``parameters``, ``error_before``, ``error_after``,
        ``error_reloaded`` (shares of the test images), ``seconds``, ``stages``, ``path``.
      stages: size, ratio and test error after each stage.
      layers: what each layer costs.
    """

    data: dict[str, Any]
    stages: Table
    layers: Table

    def text(self) -> str:
        """Returns the tables and the result as one prints them."""
        d = self.data
        return "\n".join(
            [
                str(self.stages),
                "",
                str(self.layers),
                "",
                f"{d['parameters']:,} parameters, {4 * d['parameters']:,} bytes as float32",
                f"file: {d['path']} ({d['file_bytes']:,} bytes, {d['ratio']:.1f}x smaller)",
                f"test error: {100 * d['error_before']:.2f} % before, "
                f"{100 * d['error_after']:.2f} % after, "
                f"{100 * d['error_reloaded']:.2f} % from the reloaded file",
                f"time: {d['seconds']:.0f} s",
            ]
        )


def recipe(layers: dict[str, tuple[float, int]] = LAYERS) -> list[Rule]:
    """Returns the recipe of the demo: pruned, clustered kernels and 8-bit biases.

    Args:
      layers: density and code width by layer name.
    """
    rules = [
        Rule(
            f"{name}/kernel",
            chain(prune.Magnitude(sparsity=round(1 - density, 6)), codebook.KMeans(bits=bits)),
        )
        for name, (density, bits) in layers.items()
    ]
    return [*rules, Rule(".*/bias", quant.Int(bits=8, per="tensor"))]


def objective(
    model: Any, *, decay: float = 0.0, smoothing: float = 0.0
) -> Callable[[Any, Any], jax.Array]:
    r"""Returns the loss of a linen classifier, a function of parameters and ``(images, labels)``.

    .. math:: -\sum_c q_c \log p_c + \frac{d}{2} \sum_k \lVert W_k \rVert^2

    Args:
      model: gives the logits of ten classes; each of its layers has a ``kernel``.
      decay: `d`, weight of the squared kernels. With Adam it takes weights that no image
        reaches to zero, so that none of them is kept.
      smoothing: share of the target `q` that is spread over all classes.
    """

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        target = optax.smooth_labels(jax.nn.one_hot(labels, 10), smoothing)
        loss = optax.softmax_cross_entropy(model.apply({"params": params}, images), target)
        squares = sum(jnp.sum(jnp.square(layer["kernel"])) for layer in params.values())
        return loss.mean() + decay / 2 * squares

    return loss_fn


def error_of(model: Any, images: data.Images) -> Callable[[Any], float]:
    """Returns the share of wrong test images as a function of the parameters."""

    @jax.jit
    def wrong(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.argmax(model.apply({"params": params}, x), axis=-1) != y)

    def error(params: Any) -> float:
        x, y = images.test_images, images.test_labels.astype(np.int32)
        parts = [wrong(params, x[i : i + 1000], y[i : i + 1000]) for i in range(0, len(x), 1000)]
        return float(sum(parts)) / len(x)

    return error


def run_demo(
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Demo:
    """Trains LeNet-300-100 on the bundled Fashion-MNIST images and compresses it.

    Args:
      seed: seed of the first weights and of the order of the images.
      path: where to write the artifact; default: a new temporary folder.
      checkpoint: folder for checkpoints, from which an interrupted run goes on.
      progress: show bars.

    Returns:
      Figures and tables.

    Raises:
      ValueError: if ``checkpoint`` holds another run.
    """
    start = time.monotonic()
    images = data.fashion_mnist_small()
    model = models.LeNet300()
    params = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28)))["params"]
    batches = data.shuffled(images.train_images, images.train_labels, size=BATCH, seed=seed)
    if path is None:
        path = os.path.join(tempfile.mkdtemp(prefix="jaxopt_models_"), "lenet300.jom")

    error = error_of(model, images)
    out = deep_compression(
        params,
        objective(model),
        batches,
        recipe=recipe(),
        steps=Steps(*(epochs * batches.steps_per_epoch for epochs in EPOCHS)),
        path=path,
        evaluate=error,
        checkpoint=checkpoint,
        progress=progress,
    )
    by_stage = {row["stage"]: row for row in out.stages}
    figures = {
        "ratio": by_stage["code"]["ratio"],
        "file_bytes": by_stage["code"]["bytes"],
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "error_before": by_stage["train"]["error"],
        "error_after": by_stage["tune"]["error"],
        "error_reloaded": error(materialize(artifact.load(path))),
        "seconds": time.monotonic() - start,
        "stages": out.stages.rows,
        "path": os.fspath(path),
    }
    return Demo(figures, out.stages, layers(path))
