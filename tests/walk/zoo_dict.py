"""Programs on plain dicts, with the ways in which a weight can reach its product."""

import dataclasses
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from zoo import Case
from zoo_oracle import Tape, filled, lstm, make, patches, sigmoid


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of a dict and one input, once in JAX and once on a tape.

    Args:
      shapes: of the parameters.
      shape: of the input; of ids below 10 where ``ids``.
      fn: function of parameters and input.
      forward: the same in NumPy.
      macs: multiply-adds of each weight.
      stacked: paths with a leading stack axis.
      ids: whether the input is ids.
    """

    shapes: dict[str, tuple[int, ...] | dict[str, tuple[int, ...]]]
    shape: tuple[int, ...]
    fn: Callable[..., jax.Array]
    forward: Callable[[Tape, np.ndarray], np.ndarray]
    macs: dict[str, int]
    stacked: str = ""
    ids: bool = False


def fori(p, x):
    return lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["v"][i]), x)


def fori_np(t, x):
    for i in range(4):
        x = np.tanh(t.dot("v", x, layer=i))
    return x


def repeated(p, x):
    def body(carry):
        return carry[0] + 1, jnp.tanh(carry[1] @ p["w"])

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def repeated_np(t, x):
    for _ in range(3):
        x = np.tanh(t.dot("w", x))
    return x


def branches(p, x):
    return lax.cond(x[0, 0] > 100.0, lambda x: x @ p["off"], lambda x: x @ p["on"], x)


def branches_np(t, x):
    t.dot("off", x[:0])
    return t.dot("on", x)


def time_lstm(p, x):
    def step(carry, x):
        h, c = carry
        y = jnp.concatenate([x, h], axis=1) @ p["w"] + p["b"][None]
        i, f, g, o = jnp.split(y, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[0], 6))
    return lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def time_lstm_np(t, x):
    def gates(x, h):
        return np.split(t.dot("w", np.concatenate([x, h], axis=1)) + t["b"], 4, axis=1)

    return lstm(gates, x, 6)


def haiku(p, x):
    h = jax.nn.relu(x @ p["linear"]["w"] + p["linear"]["b"][None])
    return h @ p["linear_1"]["w"] + p["linear_1"]["b"][None]


def haiku_np(t, x):
    h = np.maximum(t.dot("linear/w", x) + t["linear/b"], 0)
    return t.dot("linear_1/w", h) + t["linear_1/b"]


def glu(p, x):
    return jax.nn.sigmoid(x @ p["gate"]) * (x @ p["up"]) @ p["down"]


def glu_np(t, x):
    return t.dot("down", sigmoid(t.dot("gate", x)) * t.dot("up", x))


def torch_conv(p, x):
    dims = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=dims)


def torch_conv_np(t, x):
    # Windows come with the channels last, the weight has them before its window.
    windows = patches(x.transpose(0, 2, 3, 1), (3, 2), [(0, 0), (0, 0)])
    return t.dot("w", np.moveaxis(windows, -1, 3), out=(0,)).transpose(0, 3, 1, 2)


def experts(p, x):
    return jax.vmap(jnp.matmul)(x, p["v"])


def experts_np(t, x):
    return np.stack([t.dot("v", x[e], layer=e) for e in range(3)])


PROGRAMS = {
    "matmul": Program(
        {"w": (6, 10)},
        (3, 6),
        lambda p, x: x @ p["w"],
        lambda t, x: t.dot("w", x),
        {"w": 3 * 6 * 10},
    ),
    "transposed": Program(
        {"w": (10, 6)},
        (3, 6),
        lambda p, x: x @ p["w"].T,
        lambda t, x: t.dot("w", x, out=(0,)),
        {"w": 3 * 6 * 10},
    ),
    "merged axes": Program(
        {"w": (4, 6, 8)},
        (3, 24),
        lambda p, x: x @ p["w"].reshape(24, 8),
        lambda t, x: t.dot("w", x.reshape(3, 4, 6)),
        {"w": 3 * 24 * 8},
    ),
    "split axis": Program(
        {"w": (12, 8)},
        (2, 3, 4),
        lambda p, x: jnp.einsum("bij,ijo->bo", x, p["w"].reshape(3, 4, 8)),
        lambda t, x: t.dot("w", x.reshape(2, 12)),
        {"w": 2 * 12 * 8},
    ),
    "used twice": Program(
        {"w": (6, 10)},
        (3, 12),
        lambda p, x: x[:, :6] @ p["w"] + jnp.tanh(x[:2, 6:] @ p["w"]).sum(0, keepdims=True),
        lambda t, x: t.dot("w", x[:, :6]) + np.tanh(t.dot("w", x[:2, 6:])).sum(0),
        {"w": 3 * 6 * 10 + 2 * 6 * 10},
    ),
    "one of a stack": Program(
        {"v": (4, 6, 6)},
        (3, 6),
        lambda p, x: x @ p["v"][2],
        lambda t, x: t.dot("v", x, layer=2),
        {"v": 3 * 6 * 6},
        "v",
    ),
    "fori loop": Program({"v": (4, 6, 6)}, (3, 6), fori, fori_np, {"v": 4 * 3 * 6 * 6}, "v"),
    "cond": Program(
        {"on": (6, 10), "off": (6, 10)},
        (3, 6),
        branches,
        branches_np,
        {"on": 3 * 6 * 10, "off": 0},
    ),
    "while loop": Program({"w": (6, 6)}, (2, 6), repeated, repeated_np, {"w": 3 * 2 * 6 * 6}),
    "concatenated": Program(
        {"a": (6, 10), "b": (6, 4)},
        (3, 6),
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1),
        lambda t, x: np.concatenate([t.dot("a", x), t.dot("b", x)], axis=1),
        {"a": 3 * 6 * 10, "b": 3 * 6 * 4},
    ),
    "scaled": Program(
        {"w": (6, 10)},
        (3, 6),
        lambda p, x: x @ (p["w"] * 0.5),
        lambda t, x: t.dot("w", x) * 0.5,
        {"w": 3 * 6 * 10},
    ),
    "some columns": Program(
        {"w": (6, 10)},
        (4, 6),
        lambda p, x: x @ p["w"][:, :3],
        lambda t, x: t.dot("w", x)[:, :3],
        {"w": 4 * 6 * 3},
    ),
    "some rows": Program(
        {"w": (6, 10)},
        (3, 8),
        lambda p, x: x[:, :4] @ p["w"][:4],
        lambda t, x: t.dot("w", np.pad(x[:, :4], [(0, 0), (0, 2)])),
        {"w": 3 * 4 * 10},
    ),
    "haiku": Program(
        {"linear": {"w": (8, 10), "b": (10,)}, "linear_1": {"w": (10, 6), "b": (6,)}},
        (3, 8),
        haiku,
        haiku_np,
        {"linear/w": 3 * 8 * 10, "linear_1/w": 3 * 10 * 6},
    ),
    "gated": Program(
        {"gate": (6, 10), "up": (6, 10), "down": (10, 4)},
        (3, 6),
        glu,
        glu_np,
        {"gate": 3 * 6 * 10, "up": 3 * 6 * 10, "down": 3 * 10 * 4},
    ),
    "experts": Program({"v": (3, 6, 4)}, (3, 2, 6), experts, experts_np, {"v": 3 * 2 * 6 * 4}, "v"),
    "scan over time": Program(
        {"w": (10, 24), "b": (24,)},
        (3, 5, 4),
        time_lstm,
        time_lstm_np,
        {"w": 3 * 5 * 10 * 24},
    ),
    "conv with channels first": Program(
        {"w": (5, 4, 3, 2)},
        (2, 4, 6, 5),
        torch_conv,
        torch_conv_np,
        {"w": 2 * 4 * 4 * 4 * 3 * 2 * 5},
    ),
    "take": Program(
        {"w": (10, 6)},
        (3, 4),
        lambda p, ids: jnp.take(p["w"], ids, axis=0),
        lambda t, ids: t.lookup("w", ids),
        {"w": 0},
        ids=True,
    ),
}


def cases() -> list[Case]:
    """Makes the cases of all programs."""
    found = []
    for name, program in PROGRAMS.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = jnp.asarray(rng.normal(size=program.shape), jnp.float32)
        if program.ids:
            x = jnp.asarray(rng.integers(10, size=program.shape), jnp.int32)
        shapes = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            program.shapes,
            is_leaf=lambda s: isinstance(s, tuple),
        )
        full = f"dict {name}"
        params = filled(shapes, full)
        found.append(
            make(full, program.fn, params, (x,), program.forward, program.macs, program.stacked)
        )
    return found
