"""Programs drawn at random run on compressed parameters as on the rebuilt ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant

RNG = np.random.default_rng(1)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(8, 8)) / 3, jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(3, 8, 8)) / 3, jnp.float32),
    "k": jnp.asarray(RNG.normal(size=(3, 2, 2)) / 2, jnp.float32),
    "b": jnp.asarray(RNG.normal(size=8), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)


def compressed(encoder):
    rules = [jom.Rule("w|k", encoder), jom.Rule("v", encoder, jom.Axes(stack=1))]
    return jom.compress(PARAMS, rules)


TREES = [
    compressed(quant.Int(bits=8)),
    compressed(quant.Int(bits=4, group=2, symmetric=False)),
    compressed(jom.chain(prune.Magnitude(sparsity=0.5), codebook.KMeans(bits=3))),
]


@jax.custom_vjp
def halved(x, w):
    return jnp.tanh(x @ w)


halved.defvjp(
    lambda x, w: (jnp.tanh(x @ w), (x, w)),
    lambda r, g: (0.5 * g @ r[1].T, 0.5 * r[0].T @ g),
)


@jax.custom_jvp
def steep(x, w):
    return jnp.sin(x) + 0.1 * w


steep.defjvp(lambda p, t: (steep(*p), 2 * t[0] * jnp.cos(p[0]) + 0.1 * t[1]))


def convolved(h, k):
    dims = ("NHC", "HIO", "NHC")
    y = lax.conv_general_dilated(h.reshape(4, 4, 2), k, (1,), "SAME", dimension_numbers=dims)
    return y.reshape(4, 8)


# Each takes (parameters, h [4, 8]) to [4, 8].
SIMPLE = {
    "dot": lambda p, h: h @ p["w"],
    "transposed": lambda p, h: h @ p["w"].T,
    "reshaped": lambda p, h: h @ p["w"].reshape(2, 4, 8).transpose(1, 0, 2).reshape(8, 8),
    "cast": lambda p, h: h @ p["w"].astype(jnp.bfloat16).astype(jnp.float32),
    "scaled": lambda p, h: h @ (0.5 * p["w"] - p["v"][1]),
    "sliced": lambda p, h: h[:, :4] @ p["w"][2:6],
    "joined": lambda p, h: h @ jnp.concatenate([p["w"][:, :3], p["v"][0, :, 3:]], axis=1),
    "of a stack": lambda p, h: h @ p["v"][2],
    "einsum": lambda p, h: jnp.einsum("bi,lij->bj", h, p["v"]),
    "conv": lambda p, h: convolved(h, p["k"]),
    "lookup": lambda p, h: h + p["w"][jnp.argmax(h, axis=1)],
    "bias": lambda p, h: h + p["b"][None],
    "entrywise": lambda p, h: h * jax.nn.relu(p["w"])[:4],
    "custom_vjp": lambda p, h: halved(h, p["w"]),
    "custom_jvp": lambda p, h: steep(h, p["w"][:4]),
    "tanh": lambda p, h: jnp.tanh(h),
}


def nested(name, inner):
    """Returns a program with a body."""
    if name == "jit":
        return lambda p, h: jax.jit(inner)(p, h)
    if name == "remat":
        return lambda p, h: jax.checkpoint(inner)(p, h)
    if name == "scan":

        def over_layers(p, h):
            return lax.scan(lambda h, v: (jnp.tanh(inner({**p, "w": v}, h)), None), h, p["v"])[0]

        return over_layers
    if name == "repeat":
        return lambda p, h: lax.scan(lambda h, _: (jnp.tanh(inner(p, h)), h.sum()), h, length=2)[0]
    if name == "while":

        def bounded(p, h):
            # A scan inside, so that the loop can be differentiated in reverse.
            return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(inner(p, h) @ p["v"][i]), h)

        return bounded
    if name == "forward while":

        def loop(p, h):
            h = lax.stop_gradient(h)
            p = jax.tree.map(lax.stop_gradient, p)
            out = lax.while_loop(
                lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(inner(p, s[1]))), (0, h)
            )
            return out[1]

        return loop
    return lambda p, h: lax.cond(h.sum() > 0, inner, lambda p, h: h @ p["w"].T, p, h)


def chained(parts):
    def program(p, h):
        for part in parts:
            h = part(p, h)
        return h

    return program


BODIES = ["jit", "remat", "scan", "repeat", "while", "forward while", "cond"]
step = st.sampled_from(sorted(SIMPLE)).map(SIMPLE.get)
programs = st.recursive(
    st.lists(step, min_size=1, max_size=3).map(chained),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(BODIES), inner).map(lambda t: nested(*t)),
        st.lists(inner, min_size=1, max_size=2).map(chained),
    ),
    max_leaves=4,
)


def equal_to_dense(body, small):
    def program(p, h):  # whatever was drawn, some parameter is used
        return body(p, h) @ p["w"]

    trainable, rest = jom.partition(small)

    def of(run, read):
        def loss(t, x):
            return jnp.sum(jnp.sin(run(read(jom.combine(t, rest)), x)))

        return jax.jit(
            lambda t, x: (run(read(jom.combine(t, rest)), x), jax.grad(loss, (0, 1))(t, x))
        )

    got = of(jom.accelerate(program), lambda t: t)(trainable, X)
    want = of(program, jom.materialize)(trainable, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, want)


SETTINGS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}


@settings(max_examples=10, **SETTINGS)
@given(programs, st.sampled_from(range(len(TREES))))
def test_a_program_and_its_gradient(program, small):
    equal_to_dense(program, TREES[small])


@pytest.mark.full
@settings(max_examples=500, **SETTINGS)
@given(programs, st.sampled_from(range(len(TREES))))
def test_five_hundred_programs(program, small):
    equal_to_dense(program, TREES[small])
