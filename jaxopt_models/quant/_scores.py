"""Scores of replaced parameters: by running the model, by its curvature, by its inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._axes import Axes, Matrix
from .._bits import wide_dtype
from .._call import Frame, name_of, take_apart
from .._paths import Parameter, flatten
from ._rows import split_columns

#: Scores `[candidates]` of tensors that stand in for the parameter with this position.
Scorer = Callable[[int, Sequence[jax.Array]], jax.Array]


def as_batches(batches: Any, who: str) -> list[tuple[Any, ...]]:
    """Returns batches as a list, each checked to be a tuple of arguments."""
    if batches is None or isinstance(batches, tuple | dict) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{who}: batches is {type(batches).__name__}; give a list of tuples of the arguments "
            "after params: [(x,) for x in ...]"
        )
    found = list(batches)
    for batch in found:
        if not isinstance(batch, tuple):
            raise TypeError(
                f"{who}: a batch is {type(batch).__name__}; give the tuple of the arguments after "
                "params: [(x,) for x in ...]"
            )
    if not found:
        raise ValueError(f"{who}: there is no batch; give at least one tuple of arguments")
    return found


class Model:
    """A function, the tree of its parameters with all but arrays in place, and its data.

    Args:
      fn: function of `(params, ...)`.
      unflatten: makes the tree of values.
      values: the dense values.
      batches: tuples of the arguments after ``params``.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        unflatten: Callable[[list[Any]], Any],
        values: Sequence[Any],
        batches: Sequence[tuple[Any, ...]],
    ):
        self.fn, self.unflatten, self.values, self.batches = fn, unflatten, list(values), batches

    def call(self, frame: Frame, arrays: Sequence[Any]) -> Any:
        """Calls the function on what a frame and its arrays are."""
        params, args, kwargs = frame.restore(arrays)
        return self.fn(params, *args, **kwargs)

    def apart(self, batch: tuple[Any, ...], at: int = 0, value: Any = None) -> tuple[Frame, list]:
        """Returns a call on a batch, with another value at one position."""
        values = list(self.values)
        if value is not None:
            values[at] = value
        return take_apart(self.unflatten(values), batch, {})


class Outputs:
    """Scores by the outputs of a model in which one parameter is replaced.

    One program serves all parameters and candidates: every parameter is an argument of it.
    """

    def __init__(self, model: Model, metric: str, *, vectorize: bool):
        self.model, self.vectorize = model, vectorize
        self.read, self.compare = _METRICS[metric]
        start = _Compiled(self._output, 0)
        self.references = [start(*model.apart(batch)) for batch in model.batches]
        if not all(bool(_finite(r)) for r in self.references):
            raise ValueError(
                f"sensitivity: {name_of(model.fn)} gives NaN or Inf before anything is compressed"
            )
        if metric == "mse" and not any(
            bool(jnp.any(x != 0)) for x in jax.tree.leaves(self.references)
        ):
            raise ValueError(f"sensitivity: {name_of(model.fn)} gives zeros only on these batches")
        self._measure = _Compiled(self._measured, 0)
        self._together = _Compiled(self._measured_together, 0, 1)

    def _output(self, frame: Frame, arrays: Sequence[Any]) -> Any:
        return self.read(self.model.call(frame, arrays), name_of(self.model.fn))

    def _measured(self, frame: Frame, arrays: Sequence[Any], reference: Any) -> jax.Array:
        return jnp.stack(self.compare(reference, self._output(frame, arrays)))

    def _measured_together(
        self, frame: Frame, place: int, arrays: Sequence[Any], reference: Any
    ) -> jax.Array:
        axes = [0 if i == place else None for i in range(len(arrays))]
        run = functools.partial(self._measured, frame)
        return jax.vmap(run, in_axes=(axes, None))(list(arrays), reference)

    def __call__(self, at: int, tensors: Sequence[jax.Array]) -> jax.Array:
        """Returns the scores of tensors in place of a parameter."""
        if self.vectorize:
            sums = self._run_together(at, jnp.stack(tensors))
        else:
            sums = jnp.stack([self._run(at, w) for w in tensors])
        return sums[:, 0] / sums[:, 1]

    def _run(self, at: int, w: jax.Array) -> jax.Array:
        total = jnp.zeros(2)
        for batch, reference in zip(self.model.batches, self.references, strict=True):
            frame, arrays = self.model.apart(batch, at, w)
            total = total + self._measure(frame, arrays, reference)
        return total

    def _run_together(self, at: int, stack: jax.Array) -> jax.Array:
        total = jnp.zeros((len(stack), 2))
        for batch, reference in zip(self.model.batches, self.references, strict=True):
            frame, arrays = self.model.apart(batch, at, stack)
            [place] = [i for i, a in enumerate(arrays) if a is stack]
            total = total + self._together(frame, place, arrays, reference)
        return total


class _Compiled:
    """A function of a frame and arrays, compiled where a program can be kept for the frame."""

    def __init__(self, f: Callable[..., Any], *static: int):
        self.f, self.compiled = f, jax.jit(f, static_argnums=static)

    def __call__(self, frame: Frame, *args: Any) -> Any:
        return (self.compiled if frame.hashable() else self.f)(frame, *args)


@jax.jit
def _finite(x: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(x)]))


def _floats(out: Any, name: str) -> list[jax.Array]:
    found = [x for x in map(jnp.asarray, jax.tree.leaves(out)) if _floating(x)]
    if not found:
        raise ValueError(f"sensitivity: {name} returns no floating array to compare")
    return [x.astype(wide_dtype(x.dtype)) for x in found]


def _floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def scalar(out: Any, name: str) -> jax.Array:
    """Returns a loss, checked to be one."""
    found = jax.tree.leaves(out)
    if len(found) != 1 or jnp.shape(found[0]) != () or not _floating(jnp.asarray(found[0])):
        shapes = [jnp.shape(x) for x in found]
        raise ValueError(
            f"sensitivity: {name} returns arrays of shapes {shapes}, not the one floating number "
            "that a loss is; give loss=, a function of (params, *batch), or metric='mse'"
        )
    return jnp.asarray(found[0]).astype(wide_dtype(found[0].dtype))


def _logits(out: Any, name: str) -> jax.Array:
    found = jax.tree.leaves(out)
    if len(found) != 1 or jnp.ndim(found[0]) == 0 or not _floating(jnp.asarray(found[0])):
        shapes = [jnp.shape(x) for x in found]
        raise ValueError(
            f"sensitivity: {name} returns arrays of shapes {shapes}; metric='kl' needs one array "
            "of logits [..., classes]"
        )
    x = jnp.asarray(found[0])
    return jax.nn.log_softmax(x.astype(wide_dtype(x.dtype)), axis=-1)


def _rise(reference: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    return new - reference, jnp.ones_like(new)


def _squares(reference: list[jax.Array], new: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    misses = [jnp.sum(jnp.square(a - b)) for a, b in zip(new, reference, strict=True)]
    return sum(misses), sum(jnp.sum(jnp.square(b)) for b in reference)


def _divergence(reference: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    gap = new - reference
    # The sum of p (e^d - 1 - d) is that of -p d, as both p sum to one, but has no negative term.
    terms = jnp.exp(reference) * (jnp.expm1(gap) - gap)
    return jnp.sum(terms), jnp.asarray(max(1, terms.size // terms.shape[-1]), terms.dtype)


_METRICS = {"loss": (scalar, _rise), "mse": (_floats, _squares), "kl": (_logits, _divergence)}


class Hessian:
    r"""Scores by the mean curvature of the loss along one parameter; see ``sensitivity``."""

    def __init__(
        self, model: Model, chosen: Sequence[int], stacks: Sequence[int], probes: int, key
    ):
        self.model, self.chosen = model, list(chosen)
        self.stacks = dict(zip(chosen, stacks, strict=True))
        keys = jax.random.split(key, probes)
        run, totals = _Compiled(self._probes, 0), None
        for batch in model.batches:
            found = run(*model.apart(batch), keys)
            totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        estimates = [np.asarray(t, np.float64) / len(model.batches) for t in totals]
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
