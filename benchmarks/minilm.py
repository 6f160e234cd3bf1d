"""MiniLM-L6 on sentences about films: neighbours kept at 8, 4.5 and 3.5 bits, probes, search."""

from __future__ import annotations

import functools
import logging
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, quant

from . import _probes
from ._minilm import Agreement, calibration, encoder, sentences, tuned
from ._rows import Row, mean_row
from ._trees import bits_per_weight, stored_bytes

logger = logging.getLogger(__name__)
# Vectors of words are looked up: each has its own scale.
WORDS = Axes(out=(0,))
KEY = jax.random.key(0)
EIGHT = quant.Int(bits=8, symmetric=False)
NEAREST = {
    "8 bits per channel, rounded": EIGHT,
    "8 bits per channel, symmetric, rounded": quant.Int(bits=8),
    "8 bits per channel, symmetric, rotated and rounded": quant.Hadamard(quant.Int(bits=8)),
    "4 bits per channel, rounded": quant.Int(bits=4),
    "4 bits in groups of 32, rounded": quant.Int(
        4, group=32, scale="bfloat16", observer=quant.MSE()
    ),
}
# Chosen on the sentences kept for validation.
STEPS = {4.5: 500, 3.5: 300}


def plain(fmt: jom.Encoder) -> Any:
    """Returns the model with all matrices rounded to nearest."""
    recipe = [Rule(".*/embedding", fmt, WORDS), Rule(".*/kernel", fmt)]
    return jom.compress(encoder().params, recipe, key=KEY)


def eight(count: int) -> Any:
    """Returns the model in integers of 8 bits per channel, kernels by GPTQ layer by layer."""
    recipe = [Rule(".*/embedding", EIGHT, WORDS), Rule(".*/kernel", quant.GPTQ(EIGHT))]
    return quant.sequential(encoder(), encoder().params, recipe, calibration(count), progress=True)


def calibrated(words: int, kernels: int, *, count: int, searched: bool) -> Any:
    """Returns the model compressed layer by layer, without any training.

    All matrices are rotated and get the best values for normal weights. ``searched`` scales lose
    less; those that training finds anew in each step are root mean squares.
    """
    observer = quant.MSE() if searched else quant.RMS()
    table = quant.Normal(words, scale=quant.Int(8, per="tensor"), observer=quant.MSE())
    solved = quant.GPTQ(quant.Normal(kernels, scale="bfloat16", observer=observer))
    recipe = [
        Rule("embeddings/(word|position)/embedding", quant.Hadamard(table), WORDS),
        Rule("embeddings/token_type/embedding", quant.Int(8), WORDS),
        Rule(".*/kernel", quant.Hadamard(solved)),
    ]
    batches = calibration(count)
    return quant.sequential(encoder(), encoder().params, recipe, batches, key=KEY, progress=True)


def awq(*, quick: bool) -> list[Row]:
    """Returns how much less output error AWQ has than rounding, at 3 bits in groups of 64."""
    batches = calibration(128 if quick else 512)
    half = len(batches) // 2
    fmt, weights = quant.Int(bits=3, group=64), encoder().params
    only = {k: v for k, v in weights.items() if k.startswith("layers")}
    solver = [Rule(".*/kernel", quant.AWQ(fmt))]
    stats = jom.calibrate(encoder(), weights, batches[:half], ["gram", "l2", "mean"])
    fresh = jom.calibrate(encoder(), weights, batches[half:], ["gram"])
    found = []
    small = jom.compress(only, solver, stats=stats)
    nearest = jom.compress(only, [Rule(".*/kernel", fmt)])
    for path in (p for p in fresh if p.endswith("kernel")):
        gram = np.asarray(fresh[path].gram, np.float64)
        w, a, b = (_leaf(tree, path) for tree in (weights, nearest, small))
        errors = [np.sum((w - x) * (gram @ (w - x))) for x in (a, b)]
        found.append(float(errors[0] / errors[1]))
    claim = "AWQ, 3 bits in groups of 64: times less output error than rounding"
    return [
        Row(f"{claim}, mean of matrices", statistics.fmean(found), ">= 1.3"),
        Row(f"{claim}, least", min(found), ">= 1"),
    ]


def _leaf(tree: Any, path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(jom.materialize(tree), np.float64)


def search(*, quick: bool) -> list[Row]:
    """Returns the loss of searched bits over that of 4 bits everywhere, at no more bytes."""
    widths = (3, 4, 5) if quick else (2, 3, 4, 5, 6)
    formats = [quant.Int(bits=b, group=64, scale="bfloat16") for b in widths]
    values = []
    for seed in (0,) if quick else (0, 1, 2):
        ids, mask = (jnp.concatenate(a) for a in zip(*calibration(192, seed=seed), strict=True))
        goal = encoder().compiled(encoder().params, ids, mask)

        def loss(p: Any, ids: jax.Array, mask: jax.Array, goal: jax.Array) -> jax.Array:
            return jnp.mean(jnp.sum((encoder()(p, ids, mask) - goal) ** 2, axis=1))

        parts = [(ids[i : i + 32], mask[i : i + 32], goal[i : i + 32]) for i in (0, 32, 64)]
        found = quant.sensitivity(
            loss, encoder().params, parts, formats, only="layers.*/kernel", metric="loss"
        )
        four = jom.compress(encoder().params, [Rule("layers.*/kernel", formats[widths.index(4)])])
        budget = stored_bytes(four)
        mixed = jom.compress(encoder().params, quant.allocate_bits(found, budget_bytes=budget))
        fresh = ids[96:], mask[96:], goal[96:]
        pair = [float(jax.jit(loss)(jom.materialize(p), *fresh)) for p in (mixed, four)]
        logger.info("search, seed %s: loss %.4f, uniform %.4f", seed, *pair)
        values.append(pair[0] / pair[1])
    claim = f"bit search on kernels at 4 bits: loss over uniform, worst of {len(values)} seeds"
    return [Row(claim, max(values), "<= 1", tuple(values))]


def probes(quick: bool) -> dict[str, tuple[Any, float]]:
    """Returns the sentences of each linear probe, and its accuracy on float vectors."""
    count = (200, 200) if quick else (2000, 1000)
    parts = {"sentiment": _probes.sentiment(*count), "domain": _probes.domains(*count)}
    return {n: (p, _probes.accuracy(encoder().params, p)) for n, p in parts.items()}


def lost(small: Any, name: str, known: dict[str, tuple[Any, float]]) -> list[Row]:
    """Returns by how many points probes on the vectors are worse than on float ones."""
    return [
        Row(
            f"{name}, {kind} probe: points lost",
            dense - _probes.accuracy(small, parts),
            "<= 1",
            note=f"float {dense:.1f} %",
        )
        for kind, (parts, dense) in known.items()
    ]


def run(*, quick: bool = False) -> list[Row]:
    """Measures everything on the sentences kept for the test."""
    texts = sentences("movie").test.texts
    agreement = Agreement(texts, sets=1, size=64) if quick else Agreement(texts)
    known = probes(quick)
    claim = "{}: share of sentences with the same neighbour"
    trees = {"8 bits per channel, GPTQ": lambda: eight(32 if quick else 1024)}
    trees |= {name: functools.partial(plain, fmt) for name, fmt in NEAREST.items()}
    found = []
    for name, make in trees.items():
        small = make()
        note = f"{bits_per_weight(small):.2f} bits a weight"
        values, bar = agreement(small), "" if name in NEAREST else ">= 0.96"
        logger.info("%s: %s, cosine %.4f", name, values, agreement.cosine)
        found.append(Row(claim.format(name), statistics.fmean(values), bar, tuple(values), note))
    for words, kernels, limit, bars in ((4, 5, 4.5, (0.8, 0.86)), (3, 4, 3.5, (0.62, 0.7))):
        count, steps = (32, 2) if quick else (1024, STEPS[limit])
        small = calibrated(words, kernels, count=count, searched=True)
        start = calibrated(words, kernels, count=count, searched=False)
        learned = tuned(start, kernels, steps=steps, key=KEY)
        bits = max(map(bits_per_weight, (small, learned)))
        found.append(Row(f"at most {limit} bits a weight", bits, f"<= {limit}"))
        for what, tree, bar in (
            ("calibrated", small, f">= {bars[0]}"),
            ("start of the learned", start, ""),
            ("learned", learned, f">= {bars[1]}"),
        ):
            values = agreement(tree)
            logger.info("%s, %s: %s, cosine %.4f", limit, what, values, agreement.cosine)
            found.append(mean_row(claim.format(f"{limit} bits, {what}"), values, bar))
            if limit == 4.5 and bar:
                found += lost(tree, f"{limit} bits, {what}", known)
    return [*found, *awq(quick=quick), *search(quick=quick)]
