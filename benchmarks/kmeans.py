"""One-dimensional k-means against scikit-learn: speed and loss, in the same run."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import codebook

from ._rows import Row


def run(*, quick: bool) -> list[Row]:
    """Clusters 10 million normal weights to 16 centroids, sort included."""
    from sklearn.cluster import KMeans

    n = 200_000 if quick else 10_000_000
    pairs = 1 if quick else 3
    w = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    dense = jnp.asarray(w)
    encoder = codebook.KMeans(bits=4)
    jax.block_until_ready(encoder(dense))  # compiles

    def ours() -> np.ndarray:
        return np.asarray(jax.block_until_ready(encoder(dense)).materialize())

    def theirs() -> np.ndarray:
        model = KMeans(16, n_init=1, random_state=0).fit(w[:, None])
        return model.cluster_centers_[model.labels_, 0]

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses = {}
    for _ in range(pairs):
        for name, method in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            found = method()
            times[name].append(time.perf_counter() - start)
            losses[name] = float(np.mean((found.astype(np.float64) - w) ** 2))
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return [
        Row("k-means, times faster than scikit-learn", statistics.median(ratios), ">= 10"),
        Row("k-means, loss over scikit-learn's", losses["ours"] / losses["theirs"], "<= 1.001"),
        Row("k-means, seconds", statistics.median(times["ours"])),
        Row("scikit-learn, seconds", statistics.median(times["theirs"])),
    ]
