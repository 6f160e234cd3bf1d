"""Scores of replaced parameters by the curvature of the loss, and by the inputs of a layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._axes import Axes, Matrix
from .._bits import wide_dtype
from .._call import Frame, name_of
from .._paths import Parameter, flatten
from ._rows import split_columns
from ._scores import Compiled, Model, scalar


class Hessian:
    r"""Scores by the mean curvature of the loss along one parameter; see ``sensitivity``."""

    def __init__(
        self,
        model: Model,
        chosen: Sequence[int],
        stacks: Sequence[int],
        probes: int,
        key: jax.Array,
    ):
        self.model, self.chosen = model, list(chosen)
        self.stacks = dict(zip(chosen, stacks, strict=True))
        keys = jax.random.split(key, probes)
        run, totals = Compiled(self._probes, 0), None
        for batch in model.batches:
            found = run(*model.apart(batch), keys)
            totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        estimates = [np.asarray(t, np.float64) / len(model.batches) for t in totals]
        if not all(np.isfinite(t).all() for t in estimates):
            raise ValueError(
                f"sensitivity: second derivatives of {name_of(model.fn)} are NaN or Inf; use "
                "metric='loss'"
            )
        #: The trace of each stacked tensor, `[*stack]`, by position.
        self.traces = {i: t.mean(axis=0) for i, t in zip(self.chosen, estimates, strict=True)}
        #: One standard error of the trace of a parameter, by position.
        self.errors = {
            i: float(np.std(t.reshape(probes, -1).sum(1), ddof=1) / probes**0.5)
            for i, t in zip(self.chosen, estimates, strict=True)
        }

    def _probes(self, frame: Frame, arrays: Sequence[Any], keys: jax.Array) -> list[jax.Array]:
        params, args, kwargs = frame.restore(arrays)
        leaves, unflatten = flatten(params)
        values = [p.value for p in leaves]

        def loss(chosen: list[jax.Array]) -> jax.Array:
            full = list(values)
            for i, w in zip(self.chosen, chosen, strict=True):
                full[i] = w
            return scalar(self.model.fn(unflatten(full), *args, **kwargs), name_of(self.model.fn))

        at = [values[i] for i in self.chosen]

        def probe(key: jax.Array) -> list[jax.Array]:
            # Drawn at once: a generator for each parameter takes long to compile.
            signs = jax.random.rademacher(key, (sum(w.size for w in at),), jnp.int8)
            cuts = np.cumsum([w.size for w in at])[:-1].tolist()
            parts = zip(jnp.split(signs, cuts), at, strict=True)
            v = [part.reshape(w.shape).astype(w.dtype) for part, w in parts]
            _, curved = jax.jvp(jax.grad(loss), (at,), (v,))
            return [
                jnp.sum(
                    (a * b).astype(wide_dtype(a.dtype)), axis=tuple(range(self.stacks[i], a.ndim))
                )
                for i, a, b in zip(self.chosen, v, curved, strict=True)
            ]

        return lax.map(probe, keys)

    def __call__(self, at: int, tensors: Sequence[jax.Array]) -> jax.Array:
        """Returns the scores of tensors in place of a parameter."""
        w, stack = self.model.values[at], self.stacks[at]
        errors = jnp.stack([_squared_error(w, q, stack) for q in tensors])
        trace = jnp.asarray(self.traces[at], errors.dtype)
        entries = max(1, w.size // max(1, trace.size))
        return jnp.sum((errors * trace[None]).reshape(len(tensors), -1), axis=1) / (2 * entries)


@functools.partial(jax.jit, static_argnums=2)
def _squared_error(w: jax.Array, q: jax.Array, stack: int) -> jax.Array:
    wide = wide_dtype(w.dtype)
    return jnp.sum(jnp.square(q.astype(wide) - w.astype(wide)), axis=tuple(range(stack, w.ndim)))


class Gram:
    """Scores by the squared error of what one layer puts out; see ``sensitivity``."""

    def __init__(self, leaves: Sequence[Parameter], values: Sequence[Any], stats: Any):
        self.leaves, self.values, self.stats = leaves, values, stats

    def __call__(self, at: int, tensors: Sequence[jax.Array]) -> jax.Array:
        """Returns the scores of tensors in place of a parameter."""
        w, found = self.values[at], self.stats[self.leaves[at].path]
        wide = wide_dtype(w.dtype)
        uses = (found, *found.others)

        def seen(x: jax.Array) -> jax.Array:
            return sum(_output_square(x, s.gram, s.axes.resolve(x.ndim), s.groups) for s in uses)

        whole = seen(w.astype(wide))
        misses = jnp.stack([seen(q.astype(wide) - w.astype(wide)) for q in tensors])
        return misses / jnp.where(whole > 0, whole, 1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _output_square(
    x: jax.Array, gram: jax.Array, axes: Axes, groups: tuple[tuple[int, int], ...]
) -> jax.Array:
    r"""Returns :math:`\mathrm{tr}\, x^\top G x` of the `[in, out]` view, summed over the stack."""

    def core(x: jax.Array, gram: jax.Array) -> jax.Array:
        m = Matrix(tuple(x.shape), axes.out)
        order = sorted(range(len(groups)), key=lambda i: groups[i][0])
        n = len(groups)
        gram = gram.transpose(*order, n, n + 1).reshape(-1, *gram.shape[n:])
        parts = split_columns(m.view(x), groups, m)
        seen = jnp.matmul(gram.astype(x.dtype), parts, precision=lax.Precision.HIGHEST)
        return jnp.sum(parts * seen)

    for _ in range(axes.stack):
        core = jax.vmap(core)
    return jnp.sum(core(x, gram))
