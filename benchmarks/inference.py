"""Whole models in integers on the CPU: MiniLM and EfficientNet-Lite0, with ONNX Runtime beside."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import Rule, kernels, quant

from . import _lite0, _minilm_onnx
from . import _minilm as minilm
from ._contest import Contest, Run, median, ratio
from ._rows import Row

logger = logging.getLogger(__name__)
SENTENCES = tuple((batch, length) for batch in (1, 32) for length in (32, 128))
IMAGES = (1, 8)
ROUNDED = jom.chain(quant.Int(bits=8), quant.Input(bits=8))
WORDS = jom.Axes(out=(0,))


def _tokens(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, length), np.int32)
    return ids, np.ones_like(ids)


def _sentences() -> Any:
    """Returns MiniLM in integers of 8 bits, laid out; inputs are rounded row by row."""
    recipe = [Rule(".*/embedding", quant.Int(bits=8), WORDS), Rule(".*/kernel", ROUNDED)]
    return jom.pack(jom.compress(minilm.encoder().params, recipe))


def _images() -> Any:
    """Returns Lite0 in integers of 8 bits, laid out; inputs are rounded row by row."""
    return jom.pack(jom.compress(_lite0.network(), [Rule(".*/kernel", ROUNDED)]))


def _run(fn: Any, params: Any, *args: Any) -> Run:
    made, args = jax.jit(lambda *given: fn(*given)), tuple(map(jnp.asarray, args))
    return lambda: made(params, *args).block_until_ready()


def sentences(batch: int, length: int) -> Run:
    """MiniLM by the kernels."""
    return _run(jom.accelerate(minilm.encoder()), _sentences(), *_tokens(batch, length))


def sentences_float(batch: int, length: int) -> Run:
    """MiniLM in JAX on float32."""
    return _run(minilm.encoder(), minilm.encoder().params, *_tokens(batch, length))


def sentences_ort(batch: int, length: int, quantized: bool) -> Run:
    """MiniLM in ONNX Runtime."""
    return _minilm_onnx.run(*_tokens(batch, length), quantized=quantized)


def images(batch: int) -> Run:
    """Lite0 by the kernels."""
    return _run(jom.accelerate(_lite0.apply), _images(), _lite0.named()[:batch])


def images_float(batch: int) -> Run:
    """Lite0 in JAX on float32."""
    return _run(_lite0.apply, _lite0.network(), _lite0.named()[:batch])


def kept(make: Callable[..., Run], *args: Any) -> Run:
    """Makes a function in a process that keeps its memory."""
    kernels.keep_memory()
    return make(*args)


def _compared(contest: Contest, name: str, functions: Any, bars: Any, rounds: int) -> list[Row]:
    times = contest.times(functions, rounds=rounds)
    note = ", ".join(f"{n} {1e3 * median(times, n):.3g} ms" for n in times)
    logger.info("%s: %s", name, note)
    rows = []
    for peer in functions:
        if peer != "ours":
            claim, bar = f"{name}: times faster than {peer}", bars.get(peer, "")
            rows.append(Row(claim, ratio(times, peer, "ours"), bar, note=note))
            note = ""
    return rows


def run(*, quick: bool) -> list[Row]:
    """Times both models, and says how near their results are to those of float32."""
    if not kernels.status().path:
        raise SystemExit(f"there are no kernels: {kernels.status().why}")
    rounds, rows, part = 3 if quick else 15, [], functools.partial
    with Contest() as contest:
        for batch, length in SENTENCES[:1] if quick else SENTENCES:
            functions = {
                "ours": part(sentences, batch, length),
                "JAX float32": part(sentences_float, batch, length),
                "ONNX Runtime int8": part(sentences_ort, batch, length, True),
                "ONNX Runtime float32": part(sentences_ort, batch, length, False),
            }
            bars = {"JAX float32": ">= 2.5", "ONNX Runtime int8": ">= 1.0"}
            name = f"MiniLM, {batch} x {length}"
            rows += _compared(contest, name, functions, bars, rounds)
        largest = SENTENCES[-1]
        if not quick:
            functions = {
                "ours": part(kept, sentences, *largest),
                "JAX float32": part(kept, sentences_float, *largest),
                "ONNX Runtime int8": part(sentences_ort, *largest, True),
            }
            with Contest() as fresh:
                name = "MiniLM, {} x {}, memory kept".format(*largest)
                rows += _compared(fresh, name, functions, {}, rounds)
        for batch in IMAGES[:1] if quick else IMAGES:
            functions = {"ours": part(images, batch), "JAX float32": part(images_float, batch)}
            name, bars = f"EfficientNet-Lite0, batch {batch}", {"JAX float32": ">= 2.5"}
            rows += _compared(contest, name, functions, bars, rounds)
    ids, mask = minilm.models.minilm_tokens(minilm.sentences("movie").test.texts[:32], length=48)
    float_ = minilm.encoder().compiled(minilm.encoder().params, ids, mask)
    for name, got in (
        ("ours", jax.jit(jom.accelerate(minilm.encoder()))(_sentences(), ids, mask)),
        ("ONNX Runtime int8", _minilm_onnx.run(ids, mask, quantized=True)()[0]),
    ):
        cosine = float(np.mean(np.sum(np.asarray(got) * np.asarray(float_), axis=1)))
        rows.append(Row(f"MiniLM, {name}: cosine with float32 on sentences", cosine))
    photographs = _lite0.named()[: 8 if quick else None]
    agreement = _lite0.Agreement(photographs)
    fast = jax.jit(jom.accelerate(_lite0.apply))
    found = [np.asarray(fast(_images(), *b)) for b in _lite0.batches(photographs)]
    same = np.concatenate(found).argmax(1) == agreement.float.argmax(1)
    claim = "EfficientNet-Lite0: share of images with the class of float32"
    return [*rows, Row(claim, float(np.mean(same)))]
