"""MiniLM and rated sentences: what rows that start from them have in common."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import data, models, quant

BATCH = 32
# Sentences are cut here for the figures; nine of ten films' are shorter.
LENGTH = 48
DOMAINS = ("movie", "amazon", "nyt", "tweets")
Tokens = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The published model.

    Args:
      params: its parameters.
    """

    params: Any

    def __call__(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns vectors `[B, 384]`, by as many layers as the parameters have."""
        layers = sum(name.startswith("layers_") for name in params)
        return models.MiniLM(layers=layers).apply({"params": params}, ids, mask)

    @functools.cached_property
    def compiled(self) -> Callable[..., jax.Array]:
        """The same, compiled."""
        return jax.jit(self.__call__)

    def vectors(self, params: Any, tokens: Tokens) -> np.ndarray:
        """Returns the vectors of many sentences."""
        ids, mask = tokens
        parts = [
            np.asarray(self.compiled(params, ids[i : i + BATCH], mask[i : i + BATCH]))
            for i in range(0, len(ids), BATCH)
        ]
        return np.concatenate(parts)


@functools.cache
def encoder() -> Encoder:
    """Reads the weights."""
    return Encoder(models.load_minilm()["params"])


@functools.cache
def sentences(domain: str) -> data.TextSplit:
    """Reads one domain's sentences."""
    return data.vader(domain).split()


def nearest(vectors: np.ndarray) -> np.ndarray:
    """Returns for each vector which of the others is most similar."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(1)


class Agreement:
    """How a compressed model finds the neighbours that the float one does.

    Args:
      texts: sentences; the first ``sets * size`` count.
      sets: number of disjoint sets, each with its own neighbours.
      size: sentences in each.
    """

    def __init__(self, texts: Sequence[str], *, sets: int = 4, size: int = 256):
        parts = [texts[i * size : (i + 1) * size] for i in range(sets)]
        self.tokens = [models.minilm_tokens(part, length=LENGTH) for part in parts]
        self.float = [encoder().vectors(encoder().params, tokens) for tokens in self.tokens]

    def __call__(self, params: Any) -> list[float]:
        """Returns for each set the share of sentences with the same nearest neighbour."""
        rebuilt = jom.materialize(params)
        found = [encoder().vectors(rebuilt, tokens) for tokens in self.tokens]
        pairs = list(zip(found, self.float, strict=True))
        self.cosine = float(np.mean([np.sum(a * b, axis=1) for a, b in pairs]))
        return [float(np.mean(nearest(a) == nearest(b))) for a, b in pairs]


def calibration(
    count: int = 1024, *, length: int = 24, seed: int = 0
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns batches of training sentences that need no padding: longer ones, cut."""
    ids, mask = models.minilm_tokens(sentences("movie").train.texts, length=length)
    long = np.flatnonzero(mask.all(1))
    chosen = np.random.default_rng(seed).permutation(long)[:count]
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    return [(jnp.asarray(ids[part]), jnp.asarray(mask[part])) for part in parts]


@functools.cache
def pool() -> Tokens:
    """Reads the training sentences of all domains, without their ratings."""
    texts = [t for domain in DOMAINS for t in sentences(domain).train.texts]
    return models.minilm_tokens(texts, length=LENGTH)


def like_lengths(lengths: np.ndarray, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Gives the rows of batches of sentences without end, each of like lengths."""
    rng, chunk = np.random.default_rng(seed), 16 * BATCH
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order) - chunk + 1, chunk):
            part = order[start : start + chunk]
            part = part[np.argsort(lengths[part])].reshape(-1, BATCH)
            yield from part[rng.permutation(len(part))]


def cut(tokens: Tokens, rows: np.ndarray) -> Tokens:
    """Returns some sentences, without the padding that none of them needs."""
    ids, mask = tokens
    longest = -(-int(mask[rows].sum(1).max()) // 16) * 16
    return ids[rows, :longest], mask[rows, :longest]


def unlabelled() -> Iterator[Tokens]:
    """Gives batches of training sentences of all domains without end, each of like lengths."""
    for rows in like_lengths(pool()[1].sum(1)):
        yield cut(pool(), rows)


def tuned(small: Any, bits: int, *, steps: int, key: jax.Array, rate: float = 1e-4) -> Any:
    """Trains on unlabelled sentences so that vectors come near to those of the float model.

    Kernels are rounded anew in each step, as :func:`jaxopt_models.straight_through` does it;
    biases and norms are trained beside them. The tables of the embeddings stay as they are.
    """
    fmt = quant.Normal(bits, scale="bfloat16")
    recipe = [jom.Rule("layers.*/kernel", quant.Hadamard(fmt))]
    rounded = jom.straight_through(recipe)
    tables, norm = dict(small["embeddings"]), small["embeddings"]["norm"]
    del tables["norm"]
    latents = {k: jom.materialize(v) for k, v in small.items() if k != "embeddings"}
    latents["norm"] = norm
    dense = jom.materialize(tables)

    def whole(params: Any, tables: Any) -> Any:
        layers = {k: v for k, v in params.items() if k != "norm"}
        return {**layers, "embeddings": {**tables, "norm": params["norm"]}}

    def loss(latents: Any, dense: Any, batch: Tokens, goal: jax.Array) -> jax.Array:
        params = whole(rounded(latents, key=key), dense)
        return jnp.sum((encoder()(params, *batch) - goal) ** 2) / len(goal)

    slow, fast = (optax.adam(optax.cosine_decay_schedule(r, steps)) for r in (rate, 5 * rate))
    kinds = jax.tree.map(lambda a: "kernel" if a.ndim == 2 else "other", latents)
    optimizer = optax.multi_transform({"kernel": slow, "other": fast}, kinds)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(latents: Any, state: Any, dense: Any, batch: Tokens, goal: jax.Array) -> Any:
        grads = jax.grad(loss)(latents, dense, batch, goal)
        updates, state = optimizer.update(grads, state, latents)
        return optax.apply_updates(latents, updates), state

    latents, state = jax.tree.map(jnp.copy, latents), optimizer.init(latents)
    for batch in itertools.islice(unlabelled(), steps):
        goal = encoder().compiled(encoder().params, *batch)
        latents, state = step(latents, state, dense, batch, goal)
    return whole(jom.compress(latents, recipe, key=key), tables)
