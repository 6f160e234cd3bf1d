"""What the vectors of MiniLM are used for: linear probes of sentiment and of the kind of text."""

from __future__ import annotations

from typing import Any

import numpy as np

import jaxopt_models as jom
from jaxopt_models import models

from ._minilm import DOMAINS, LENGTH, encoder, sentences

Part = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]


def _tokens(texts: list[str], labels: list[int]) -> Part:
    return models.minilm_tokens(texts, length=LENGTH), np.array(labels)


def sentiment(train: int, test: int) -> tuple[Part, Part]:
    """Returns sentences of films that are clearly for or against, of both splits."""
    parts = []
    for split, count in ((sentences("movie").train, train), (sentences("movie").test, test)):
        clear = np.flatnonzero(np.abs(split.ratings) >= 0.5)
        clear = np.random.default_rng(0).permutation(clear)[:count]
        labels = (split.ratings[clear] > 0).astype(int)
        parts.append(_tokens([split.texts[i] for i in clear], list(labels)))
    return parts[0], parts[1]


def domains(train: int, test: int) -> tuple[Part, Part]:
    """Returns as many sentences of each of the four domains, of both splits."""
    parts = []
    for name, count in (("train", train), ("test", test)):
        texts, labels = [], []
        for label, domain in enumerate(DOMAINS):
            found = getattr(sentences(domain), name).texts[: count // 4]
            texts += found
            labels += [label] * len(found)
        parts.append(_tokens(texts, labels))
    return parts[0], parts[1]


def accuracy(params: Any, parts: tuple[Part, Part], *, ridge: float = 1e-3) -> float:
    """Fits a linear probe on the vectors of a model and returns its share of right ones, in %."""
    rebuilt = jom.materialize(params)
    (train, labels), (test, wanted) = parts
    x, y = (np.float64(encoder().vectors(rebuilt, tokens)) for tokens in (train, test))
    mean = x.mean(0)
    x, goals = x - mean, np.eye(labels.max() + 1)[labels]
    center = goals.mean(0)
    weights = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ (goals - center))
    return 100 * float(np.mean(((y - mean) @ weights + center).argmax(1) == wanted))
