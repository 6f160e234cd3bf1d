"""What the linen and nnx models compute, layer by layer in NumPy, and their multiply-adds."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from zoo import Case
from zoo_oracle import Tape, filled, lstm, make, patches, softmax

import jaxopt_models as jom


@dataclasses.dataclass(frozen=True)
class Truth:
    """The forward pass of a model in NumPy.

    Args:
      shape: of the input; of ids below 10 where ``ids``.
      macs: multiply-adds of each weight.
      forward: function of a tape and the input.
      stacked: paths with a leading stack axis.
      ids: whether the input is ids.
    """

    shape: tuple[int, ...]
    macs: dict[str, int]
    forward: Callable[[Tape, np.ndarray], np.ndarray]
    stacked: str = ""
    ids: bool = False

    def input(self, name: str) -> jax.Array:
        """Draws the input; twins see the same."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if self.ids:
            return jnp.asarray(rng.integers(10, size=self.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=self.shape), jnp.float32)


def dense(t: Tape, x: np.ndarray, name: str = "") -> np.ndarray:
    return t.dot(f"{name}kernel", x) + t[f"{name}bias"]


def dense_general(t: Tape, x: np.ndarray) -> np.ndarray:
    h = np.tanh(t.dot("up/kernel", x, out=(1, 2)) + t["up/bias"])
    return t.dot("down/kernel", h) + t["down/bias"]


def attention(t: Tape, x: np.ndarray) -> np.ndarray:
    q, k, v = (
        t.dot(f"{name}/kernel", x, out=(1, 2)) + t[f"{name}/bias"]
        for name in ("query", "key", "value")
    )
    weights = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
    return t.dot("out/kernel", np.einsum("bhqk,bkhd->bqhd", weights, v)) + t["out/bias"]


def stacked_einsum(t: Tape, x: np.ndarray) -> np.ndarray:
    return np.stack([t.dot("kernel", x[e], layer=e) for e in range(3)])


def conv(t: Tape, x: np.ndarray, **windows: Any) -> np.ndarray:
    kernel = t["kernel"].shape[:-2]
    return t.dot("kernel", patches(x, kernel, **windows)) + t["bias"]


def grouped(t: Tape, x: np.ndarray, groups: int, **windows: Any) -> np.ndarray:
    kernel = t["kernel"].shape[:-2]
    return t.grouped("kernel", patches(x, kernel, **windows), groups) + t["bias"]


def scan(t: Tape, x: np.ndarray) -> np.ndarray:
    for i in range(3):
        x = np.tanh(t.dot("layers/dense/kernel", x, layer=i) + t["layers/dense/bias"][i])
    return x


def two_layers(t: Tape, x: np.ndarray) -> np.ndarray:
    return dense(t, np.tanh(dense(t, x, "first/")), "second/")


def tied(t: Tape, ids: np.ndarray) -> np.ndarray:
    # Only the head counts as a use, which the tape must see with one role of the axes.
    h = np.tanh(dense(t, t["embed/embedding"][ids], "up/"))
    return t.dot("embed/embedding", dense(t, h, "down/"), out=(0,))


def cell(t: Tape, x: np.ndarray, forget: str) -> np.ndarray:
    def gates(x: np.ndarray, h: np.ndarray) -> list[np.ndarray]:
        return [
            t.dot(f"cell/i{g}/kernel", x) + dense(t, h, f"cell/h{g.strip('_')}/")
            for g in ("i", forget, "g", "o")
        ]

    return lstm(gates, x, 6)


def fused_cell(t: Tape, x: np.ndarray) -> np.ndarray:
    def gates(x: np.ndarray, h: np.ndarray) -> list[np.ndarray]:
        y = t.dot("cell/dense_i/kernel", x) + dense(t, h, "cell/dense_h/")
        return np.split(y, 4, axis=-1)

    return lstm(gates, x, 6)


def norm(t: Tape, x: np.ndarray, stats: str) -> np.ndarray:
    h = (dense(t, x, "dense/") - t[f"{stats}mean"]) / np.sqrt(t[f"{stats}var"] + 1e-5)
    return h * t["norm/scale"] + t["norm/bias"]


def gate_macs(forget: str) -> dict[str, int]:
    """Of a batch of 3, 5 steps, 4 inputs, 6 hidden units."""
    found = {f"cell/i{g}/kernel": 3 * 5 * 4 * 6 for g in ("i", forget, "g", "o")}
    return found | {f"cell/h{g}/kernel": 3 * 5 * 6 * 6 for g in "ifgo"}


# Where the frameworks differ in names or programs, the framework leads the name.
TRUTHS = {
    "dense": Truth((3, 8), {"kernel": 3 * 8 * 10}, dense),
    "dense general": Truth(
        (3, 6), {"up/kernel": 3 * 6 * 5 * 4, "down/kernel": 3 * 5 * 4 * 7}, dense_general
    ),
    "attention": Truth(
        (2, 5, 6),
        {f"{name}/kernel": 2 * 5 * 6 * 3 * 4 for name in ("query", "key", "value", "out")},
        attention,
    ),
    "einsum": Truth(
        (2, 3, 4),
        {"kernel": 2 * 3 * 4 * 5 * 3},
        lambda t, x: t.dot("kernel", x, out=(0, 2)),
    ),
    "einsum stacked": Truth((3, 2, 4), {"kernel": 3 * 2 * 4 * 6}, stacked_einsum, "kernel"),
    "conv 1d": Truth(
        (2, 8, 4),
        {"kernel": 2 * 4 * 3 * 4 * 6},
        functools.partial(conv, padding=[(0, 1)], stride=[2]),
    ),
    "conv 2d dilated": Truth(
        (2, 7, 5, 2),
        {"kernel": 2 * 3 * 4 * 3 * 2 * 2 * 6},
        functools.partial(conv, padding=[(0, 0), (0, 0)], dilation=[2, 1]),
    ),
    "conv 3d": Truth(
        (2, 3, 4, 5, 2),
        {"kernel": 2 * 2 * 2 * 4 * 2 * 3 * 2 * 2 * 6},
        functools.partial(conv, padding=[(0, 0)] * 3),
    ),
    # 8 x 6 positions in a transposed convolution with strides of 2 x 2.
    "conv transpose": Truth(
        (2, 4, 3, 2),
        {"kernel": 2 * 8 * 6 * 3 * 2 * 2 * 5 // (2 * 2)},
        functools.partial(conv, padding=[(2, 1), (1, 1)], spread=[2, 2]),
    ),
    "conv transpose 1d": Truth(
        (2, 4, 4),
        {"kernel": 2 * 9 * 3 * 4 * 6 // 2},
        functools.partial(conv, padding=[(2, 2)], spread=[2]),
    ),
    "conv grouped": Truth(
        (2, 4, 5, 4),
        {"kernel": 2 * 4 * 5 * 3 * 2 * 2 * 6},
        functools.partial(grouped, groups=2, padding=[(1, 1), (0, 1)]),
    ),
    "conv depthwise": Truth(
        (2, 4, 5, 4),
        {"kernel": 2 * 3 * 3 * 2 * 3 * 1 * 8},
        functools.partial(grouped, groups=4, padding=[(0, 0), (0, 0)]),
    ),
    "conv 1x1": Truth(
        (2, 3, 5, 4),
        {"kernel": 2 * 3 * 5 * 4 * 6},
        functools.partial(conv, padding=[(0, 0), (0, 0)]),
    ),
    "scan": Truth((2, 8), {"layers/dense/kernel": 3 * 2 * 8 * 8}, scan, "layers/.*"),
    "remat": Truth((3, 8), {"first/kernel": 3 * 8 * 10, "second/kernel": 3 * 10 * 6}, two_layers),
    "remat scan": Truth((2, 8), {"layers/dense/kernel": 3 * 2 * 8 * 8}, scan, "layers/.*"),
    "tied embedding": Truth(
        (2, 5),
        {
            "embed/embedding": 2 * 5 * 6 * 10,
            "up/kernel": 2 * 5 * 6 * 8,
            "down/kernel": 2 * 5 * 8 * 6,
        },
        tied,
        ids=True,
    ),
    "embedding": Truth(
        (3, 4), {"embedding": 0}, lambda t, ids: t.lookup("embedding", ids), ids=True
    ),
    "linen lstm": Truth((3, 5, 4), gate_macs("f"), functools.partial(cell, forget="f")),
    "nnx lstm": Truth((3, 5, 4), gate_macs("f_"), functools.partial(cell, forget="f_")),
    "linen optimized lstm": Truth((3, 5, 4), gate_macs("f"), functools.partial(cell, forget="f")),
    "nnx optimized lstm": Truth(
        (3, 5, 4),
        {"cell/dense_i/kernel": 3 * 5 * 4 * 24, "cell/dense_h/kernel": 3 * 5 * 6 * 24},
        fused_cell,
    ),
    "linen batch norm": Truth(
        (3, 8),
        {"dense/kernel": 3 * 8 * 10},
        functools.partial(norm, stats="batch_stats/norm/"),
    ),
    "nnx batch norm": Truth(
        (3, 8), {"dense/kernel": 3 * 8 * 10}, functools.partial(norm, stats="norm/")
    ),
}


def functional(
    framework: str, model: Callable[..., Any], x: jax.Array, mutable: bool
) -> tuple[Any, Any]:
    """Returns the pure function and the shapes of its parameters; nothing is initialised."""
    if framework == "linen":
        module = model()
        return jom.functional((module, jax.eval_shape(module.init, jax.random.key(0), x)))
    module = nnx.eval_shape(lambda: model(nnx.Rngs(0)))
    fn, shapes = jom.functional(module, mutable=mutable)
    return (lambda params, *args: fn(params, *args)[0]) if mutable else fn, shapes


def cases(framework: str, models: Mapping[str, Callable[..., Any]]) -> list[Case]:
    """Makes the cases of one framework."""
    found = []
    for name, model in models.items():
        truth = TRUTHS.get(f"{framework} {name}") or TRUTHS[name]
        x = truth.input(name)
        # In a trace, nnx.remat gives its weights back, which counts as a change of state.
        fn, shapes = functional(framework, model, x, mutable="remat" in name)
        full = f"{framework} {name}"
        params = filled(shapes, full)
        found.append(make(full, fn, params, (x,), truth.forward, truth.macs, truth.stacked))
    return found
