"""Scores of replaced parameters by what the model then gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._bits import wide_dtype
from .._call import Frame, check_batches, name_of, take_apart

#: Scores `[candidates]` of tensors that stand in for the parameter with this position.
Scorer = Callable[[int, Sequence[jax.Array]], jax.Array]


def as_batches(batches: Any, who: str) -> list[tuple[Any, ...]]:
    """Returns batches as a list, each checked to be a tuple of arguments."""
    if batches is None or isinstance(batches, tuple | dict) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{who}: batches is {type(batches).__name__}; give a list of tuples of the arguments "
            "after params: [(x,) for x in ...]"
        )
    return check_batches(batches, who)


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
        start = Compiled(self._output, 0)
        self.references = [start(*model.apart(batch)) for batch in model.batches]
        if not all(bool(_finite(r)) for r in self.references):
            raise ValueError(
                f"sensitivity: {name_of(model.fn)} gives NaN or Inf before anything is compressed"
            )
        if metric == "mse" and not any(
            bool(jnp.any(x != 0)) for x in jax.tree.leaves(self.references)
        ):
            raise ValueError(f"sensitivity: {name_of(model.fn)} gives zeros only on these batches")
        self._measure = Compiled(self._measured, 0)
        self._together = Compiled(self._measured_together, 0, 1)

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


class Compiled:
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
