"""The loops of a pipeline: forward, all forward then all backward, and one by one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._arrangement import both
from ._line import Line
from ._timetable import Timetable


def forward(line: Line, params: Any) -> Any:
    """Returns what is wanted of each micro-batch, `[M, ...]`; of the last stage's device alone."""

    def tick(wire: Any, t: jax.Array) -> tuple[Any, Any]:
        wire, done = line.forward(params, wire, t - line.stage)
        return line.send(wire), done

    before = line.slices.count - 1
    _, done = jax.lax.scan(tick, line.wire.zeros(), jnp.arange(line.microbatches + before))
    return jax.tree.map(lambda x: x[before:], done)


def gpipe(line: Line, trained: Any, rest: Any, *, remat: bool) -> tuple[Any, Any]:
    """Returns the sum of losses over this device, and derivatives of their mean over all.

    The way back is the derivative of the way forward, so it runs through the same loop in
    reverse: with ``remat`` only what came to a stage in each tick is kept for it.
    """

    def run(trained: Any, wire: Any, m: jax.Array) -> Any:
        return line.forward(both(trained, rest), wire, m)

    # No two loops are merged into one, so nothing has to keep them apart.
    step = jax.checkpoint(run, prevent_cse=False) if remat else run

    def total(trained: Any) -> Any:
        def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
            wire, value = carry
            wire, loss = step(trained, wire, t - line.stage)
            return (line.send(wire), value + loss), None

        ticks = line.microbatches + line.slices.count - 1
        zero = jnp.zeros(line.final.shape, line.final.dtype)
        (_, value), _ = jax.lax.scan(tick, (line.wire.zeros(), zero), jnp.arange(ticks))
        return value / line.microbatches

    return jax.value_and_grad(total)(trained)


def one_by_one(line: Line, trained: Any, rest: Any, table: Timetable) -> tuple[Any, Any]:
    """Returns the same as :func:`gpipe`, each micro-batch going back as soon as it can.

    Stage `s` takes micro-batch `t - s` forward and `t - (2 (S - 1) - s)` backward in tick `t`.
    What came with `m` waits in place `m mod R` of a ring; with `R = 2 S - 3` no stage but the
    first, which reads its inputs again, overwrites what it still needs.
    """
    last, here = line.slices.count - 1, line.stage
    whole = both(trained, rest)
    wire, behind = line.wire.zeros(), line.wire.zeros(trained=True)
    ring = jax.tree.map(lambda x: jnp.zeros((table.stash, *x.shape), x.dtype), wire)
    zero = jnp.zeros(line.final.shape, line.final.dtype)
    carry = wire, behind, ring, jax.tree.map(jnp.zeros_like, trained), zero

    def ahead(carry: Any, t: jax.Array) -> Any:
        wire, behind, ring, grads, value = carry
        m = t - here
        kept = line.busy(m) & (here > 0)
        ring = jax.tree.map(
            lambda r, x: r.at[jnp.where(kept, m % table.stash, table.stash)].set(x, mode="drop"),
            ring,
            wire,
        )
        # The last stage's micro-batch goes back in the same tick, and is computed there.
        out, _ = line.forward(whole, wire, m, skip_last=True)
        return out, behind, ring, grads, value

    def back(carry: Any, t: jax.Array) -> Any:
        wire, behind, ring, grads, value = carry
        m = t - (2 * last - here)
        came = jax.tree.map(
            lambda r: jax.lax.dynamic_index_in_dim(r, m % table.stash, keepdims=False), ring
        )
        more, behind, loss = line.backward(trained, rest, came, m, behind, 1 / line.microbatches)
        return wire, behind, ring, jax.tree.map(jnp.add, grads, more), value + loss

    start = 0
    for phase in table.phases:

        def tick(carry: Any, t: jax.Array, phase: Any = phase) -> tuple[Any, None]:
            if phase.forward:
                carry = ahead(carry, t)
            if phase.backward:
                carry = back(carry, t)
            wire, behind, *rest = carry
            wire = line.send(wire) if phase.forward else wire
            behind = line.send(behind, back=True) if phase.backward else behind
            return (wire, behind, *rest), None

        carry, _ = jax.lax.scan(tick, carry, start + jnp.arange(phase.ticks))
        start += phase.ticks
    *_, grads, value = carry
    return value / line.microbatches, grads
