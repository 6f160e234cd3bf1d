"""NumPy float64 layers that write down what each weight is multiplied with."""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from zoo import Case, Use

from jaxopt_models._paths import flatten


class Tape:
    """Weights by path in float64, and the inputs that they met so far.

    Every product is computed from the rows that are written down, so that an output equal to
    the model's proves the rows.
    """

    def __init__(self, params: Any):
        self.weights: dict[str, np.ndarray] = {}
        for p in flatten(params)[0]:
            if not jnp.issubdtype(p.value.dtype, jax.dtypes.prng_key):
                self.weights[p.path] = np.asarray(p.value, np.float64)
        self.seen: dict[str, dict[int, list[np.ndarray]]] = {}
        self.roles: dict[str, tuple[tuple[int, ...], int, int]] = {}

    def __getitem__(self, path: str) -> np.ndarray:
        return self.weights[path]

    def dot(
        self, path: str, x: np.ndarray, out: Sequence[int] = (-1,), layer: int | None = None
    ) -> np.ndarray:
        """Multiplies `[..., *in axes]` with a weight, or one layer of it, to `[..., *out axes]`."""
        w = self[path] if layer is None else self[path][layer]
        out = tuple(a % w.ndim for a in out)
        inner = tuple(a for a in range(w.ndim) if a not in out)
        assert x.shape[x.ndim - len(inner) :] == tuple(w.shape[a] for a in inner), path
        batch = x.shape[: x.ndim - len(inner)]
        rows = np.asarray(x, np.float64).reshape(
            math.prod(batch), math.prod(w.shape[a] for a in inner)
        )
        self._write(path, layer or 0, rows, (out, int(layer is not None), 1))
        matrix = w.transpose(*inner, *out).reshape(rows.shape[1], -1)
        return (rows @ matrix).reshape(*batch, *(w.shape[a] for a in out))

    def grouped(self, path: str, patches: np.ndarray, groups: int) -> np.ndarray:
        """Multiplies patches `[..., *kernel, channels]` with a kernel in channel groups."""
        w = self[path]
        spatial = w.ndim - 2
        batch = patches.shape[: patches.ndim - spatial - 1]
        split = patches.reshape(math.prod(batch), *w.shape[:spatial], groups, w.shape[-2])
        rows = np.moveaxis(split, -2, 0).reshape(groups, math.prod(batch), -1)
        for group in range(groups):
            self._write(path, group, rows[group], ((w.ndim - 1,), 0, groups))
        matrix = w.reshape(rows.shape[-1], groups, -1)
        return np.einsum("gsr,rgo->sgo", rows, matrix).reshape(*batch, w.shape[-1])

    def lookup(self, path: str, ids: np.ndarray) -> np.ndarray:
        """Looks rows of a table up by a product with one-hot rows."""
        return self.dot(path, np.eye(self[path].shape[0])[np.asarray(ids)])

    def _write(self, path: str, index: int, rows: np.ndarray, roles: Any) -> None:
        assert self.roles.setdefault(path, roles) == roles, path
        self.seen.setdefault(path, {}).setdefault(index, []).append(rows)

    def uses(self, macs: Mapping[str, int]) -> dict[str, Use]:
        """Returns what every weight met."""
        assert macs.keys() == self.seen.keys(), (macs.keys(), self.seen.keys())
        found = {}
        for path, (out, stack, groups) in self.roles.items():
            seen = self.seen[path]
            none = next(iter(seen.values()))[0][:0]
            many = self[path].shape[0] if stack else groups
            parts = [np.concatenate([none, *seen.get(i, [])]) for i in range(many)]
            inputs: Any = parts
            if many == 1 and not stack:
                inputs = parts[0]
            elif len({p.shape for p in parts}) == 1:
                inputs = np.stack(parts)
            found[path] = Use(out, stack, macs[path], inputs, groups)
        return found


def make(
    name: str,
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    forward: Callable[..., np.ndarray],
    macs: Mapping[str, int],
    stacked: str = "",
) -> Case:
    """Makes a case: the forward pass in NumPy fills the tape that the expectations come from."""
    tape = Tape(params)
    expected = forward(tape, *(np.asarray(a) for a in args))
    return Case(name, fn, params, args, tape.uses(macs), expected, stacked)


def filled(params: Any, name: str) -> Any:
    """Replaces shapes by normal values, biases too, with a seed from the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaves, unflatten = flatten(params)

    def draw(path: str, like: Any) -> jax.Array:
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.zeros(like.shape, like.dtype)
        value = 0.5 * rng.normal(size=like.shape)
        if path.split("/")[-1] == "var":
            value = 0.5 + np.abs(value)
        return jnp.asarray(value, like.dtype)

    return unflatten([draw(p.path, p.value) for p in leaves])


def patches(
    x: np.ndarray,
    kernel: Sequence[int],
    padding: Sequence[tuple[int, int]],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    spread: Sequence[int] | None = None,
) -> np.ndarray:
    """Cuts `[batch, *space, channels]` into windows `[batch, *positions, *kernel, channels]`.

    Args:
      x: the images.
      kernel: size of the window.
      padding: zeros before and after each axis.
      stride: step between windows.
      dilation: step between the taps of a window.
      spread: step between the entries of ``x``, with zeros put in.
    """
    n = len(kernel)
    stride, dilation, spread = stride or [1] * n, dilation or [1] * n, spread or [1] * n
    space = [(s - 1) * d + 1 for s, d in zip(x.shape[1:-1], spread, strict=True)]
    wide = np.zeros((x.shape[0], *space, x.shape[-1]))
    wide[(slice(None), *(slice(None, None, d) for d in spread))] = x
    wide = np.pad(wide, [(0, 0), *padding, (0, 0)])
    positions = [
        (s - (k - 1) * d - 1) // t + 1
        for s, k, d, t in zip(wide.shape[1:-1], kernel, dilation, stride, strict=True)
    ]
    found = np.zeros((x.shape[0], *positions, *kernel, x.shape[-1]))
    for at in itertools.product(*(range(p) for p in positions)):
        corner = [a * t for a, t in zip(at, stride, strict=True)]
        window = [
            slice(c, c + (k - 1) * d + 1, d)
            for c, k, d in zip(corner, kernel, dilation, strict=True)
        ]
        found[(slice(None), *at)] = wide[(slice(None), *window)]
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lstm(
    gates: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]], x: np.ndarray, hidden: int
) -> np.ndarray:
    """Runs an LSTM over `[batch, time, features]`; ``gates(x, h)`` gives i, f, g, o."""
    h = c = np.zeros((x.shape[0], hidden))
    found = []
    for t in range(x.shape[1]):
        i, f, g, o = gates(x[:, t], h)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        found.append(h)
    return np.stack(found, 1)
