"""The time of GPTQ on one matrix, beside Qwix's, the objectives of HQQ, formats beside Qwix's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import quant

from . import _quantized_qwix
from ._quantized_qwix import installed, missing
from ._rows import Row

FORMAT = quant.Int(bits=4)


def problem(n: int) -> tuple[jax.Array, jax.Array]:
    """Returns a matrix `[n, n]` and the gram of inputs that depend on each other."""
    a, b, c = (jax.random.normal(k, (n, n)) for k in jax.random.split(jax.random.key(n), 3))
    inputs = a @ b / n**0.5 + a
    return c, inputs.T @ inputs


def seconds(fn: Callable[..., Any], *args: Any) -> float:
    """Returns how long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def ours(w: jax.Array, gram: jax.Array) -> Any:
    """Runs GPTQ with a scale for each output."""
    return quant.gptq(w, gram, FORMAT, FORMAT.fit(w[None]))[0]


def theirs(w: jax.Array, gram: jax.Array) -> Any:
    """Runs Qwix's, whose matrices are transposed."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=[0])
    return gptq_core.quantize_weight(w.T, gram, how)[0].qvalue


def timing(*, quick: bool) -> list[Row]:
    """Times both on 512 x 512, in turns, and ours on 4096 x 4096."""
    size, rounds = (128, 1) if quick else (512, 3)
    small, mine, other = problem(size), [], []
    seconds(ours, *small)
    if installed():
        seconds(theirs, *small)
    for _ in range(rounds):
        mine += [seconds(ours, *small) for _ in range(5)]
        other += [seconds(theirs, *small)] if installed() else []
    fast = statistics.median(mine)
    found = [Row(f"GPTQ, {size} x {size}, seconds, warm", fast)]
    claim, bar = f"GPTQ, {size} x {size}: times faster than Qwix", ">= 60"
    if other:
        slow = statistics.median(other)
        found.append(Row(claim, slow / fast, bar, note=f"Qwix took {slow:.2f} s, warm"))
    else:
        found.append(missing(claim, bar))
    size = 1024 if quick else 4096
    large = problem(size)
    seconds(ours, *large)
    value = statistics.median(seconds(ours, *large) for _ in range(rounds))
    found.append(Row(f"GPTQ, {size} x {size}, seconds, warm", value, "<= 20"))
    return found


def hqq() -> Row:
    """Returns HQQ's objective over rounding to nearest's, worst of 4, 3 and 2 bits."""
    w = jax.random.t(jax.random.key(0), 5.0, (512, 256))
    worst = 0.0
    for bits in (4, 3, 2):
        loss = [
            jnp.sum(jnp.abs(w - encoder(w).materialize()) ** 0.7)
            for encoder in (
                quant.HQQ(bits=bits, group=64),
                quant.Int(bits=bits, group=64, symmetric=False),
            )
        ]
        worst = max(worst, float(loss[0] / loss[1]))
    return Row("HQQ: objective over rounding to nearest's, worst of 4, 3, 2 bits", worst, "<= 1")


def rows(*, quick: bool) -> list[Row]:
    """Gives all rows."""
    return [hqq(), *timing(quick=quick), *_quantized_qwix.rows()]
