"""MiniLM cut to three of its six layers, and taught its own vectors by sentences alone."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import statistics
import tempfile
from typing import Any

import jax
import numpy as np
import optax

from jaxopt_models import distill

from . import _probes
from ._minilm import BATCH, Agreement, cut, encoder, like_lengths, pool, sentences
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
# Chosen on validation sentences.
LAYERS = (0, 3, 5)
STEPS, RATE = 1000, 5e-4


def cut_to(layers: tuple[int, ...]) -> Any:
    """Returns the published parameters of some layers."""
    params = encoder().params
    kept = {f"layers_{i}": params[f"layers_{layer}"] for i, layer in enumerate(layers)}
    return {"embeddings": params["embeddings"], **kept}


@functools.cache
def known() -> np.ndarray:
    """Returns the vectors of the whole model of all sentences for training, computed once."""
    ids, mask = pool()
    # Sentences of like lengths together, so that little is padding.
    order = np.argsort(mask.sum(1), kind="stable")
    parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    network = distill.Network(encoder(), inputs=lambda batch: batch)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "minilm.jom")
        batches = (cut((ids, mask), part) for part in parts)
        distill.store(file, network, encoder().params, batches, progress=False)
        found = distill.load_stored(file)
    return found[np.argsort(order)]


def near(student: distill.Seen, teacher: distill.Seen, batch: Any) -> jax.Array:
    """Returns the mean square of the distances between vectors, all of length one."""
    return 2 * distill.cross_modal(student.out, teacher.out)


def taught(params: Any, *, seed: int, steps: int = STEPS) -> Any:
    """Returns a student after training; its tables of words and places stay as they are."""
    tokens, vectors = pool(), known()
    rows = itertools.islice(like_lengths(tokens[1].sum(1), seed=seed), steps)
    batches = [(*cut(tokens, part), vectors[part]) for part in rows]
    network = distill.Network(
        encoder(), inputs=lambda batch: batch[:2], fixed="embeddings/.*/embedding"
    )
    rate = optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps)
    scheme = distill.teacher_student(network, distill.stored(), near, optax.adam(rate))
    state = scheme.init(params, ())
    return distill.fit(scheme.step, state, batches, steps=steps, progress=False).state.student


def rows(*, quick: bool) -> list[Row]:
    """Measures three orders of the sentences, on those kept for the test."""
    texts = sentences("movie").test.texts
    agreement = Agreement(texts, sets=1, size=64) if quick else Agreement(texts)
    parts = _probes.sentiment(*((200, 200) if quick else (2000, 1000)))
    start = cut_to(LAYERS)
    whole, before = _probes.accuracy(encoder().params, parts), agreement(start)
    cut_probe = _probes.accuracy(start, parts)
    logger.info("cut: %s, cosine %.4f, probe %.1f", before, agreement.cosine, cut_probe)
    found, lost = [], []
    for seed in (0,) if quick else (0, 1, 2):
        small = taught(start, seed=seed, steps=2 if quick else STEPS)
        found.append(agreement(small))
        lost.append(whole - _probes.accuracy(small, parts))
        logger.info(
            "seed %s: %s, cosine %.4f, lost %.1f", seed, found[-1], agreement.cosine, lost[-1]
        )
    after = [statistics.fmean(values) for values in found]
    name = f"MiniLM cut to layers {', '.join(map(str, LAYERS))}"
    note = f"float {whole:.1f} %"
    return [
        mean_row(f"{name}: share of sentences with the same neighbour", before),
        mean_row(f"{name}, distilled: share of sentences with the same neighbour", after),
        mean_row(
            f"{name}, distilled: sentences with the same neighbour, above those of the cut",
            [x - statistics.fmean(before) for x in after],
            ">= 0.05",
        ),
        Row(f"{name}, sentiment probe: points lost", whole - cut_probe, note=note),
        Row(
            f"{name}, distilled, sentiment probe: points lost",
            statistics.fmean(lost),
            "<= 2",
            tuple(lost),
            note,
        ),
    ]
