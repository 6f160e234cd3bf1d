"""A bias and an activation function that follow a product are computed by its kernel."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models import kernels, quant
from jaxopt_models._activations import ACTIVATIONS
from jaxopt_models._epilogue import Tail
from jaxopt_models._kernels import KERNELS

if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)

W8A8 = jom.chain(quant.Int(bits=8), quant.Input(bits=8))
RNG = np.random.default_rng(0)
W, B, X = (jnp.asarray(RNG.standard_normal(s, np.float32)) for s in ((32, 48), 48, (5, 32)))
PARAMS = {"w": W, "b": B}


@pytest.fixture(autouse=True)
def promotion():
    """A bias is added to rows as people write it."""
    with jax.numpy_rank_promotion("allow"):
        yield


def packed(params, encoder=W8A8, rule=".*(w|kernel)"):
    return jom.pack(jom.compress(params, [jom.Rule(rule, encoder)]), target="cpu")


def runs(fn, small, *args):
    return [r["runs"] for r in jom.accelerate(fn).explain(small, *args) if r["multiply-adds"]]


def close(fn, small, *args, bound=1e-5):
    got, want = jax.jit(jom.accelerate(fn))(small, *args), jom.simulate(fn)(small, *args)
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(y)]) for y in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    act, tail = ACTIVATIONS[name], f" + {name}" if name != "none" else ""
    for fn in (
        lambda p, x: act(x @ p["w"] + p["b"]),
        lambda p, x: act(p["b"] + jnp.einsum("...i,io->...o", x, p["w"])),
    ):
        small = packed(PARAMS)
        assert runs(fn, small, X) == [f"packed matmul on cpu + bias{tail}"]
    close(fn, small, X)


def test_linen_and_nnx():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(16)(x), approximate=False)
            return nn.silu(nn.Dense(8, use_bias=False)(x))

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(32, 16, rngs=rngs)
            self.second = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return nnx.silu(self.second(nnx.gelu(self.first(x), approximate=False)))

    model = Net()
    for fn, params in (
        (model.apply, model.init(jax.random.key(0), X)),
        jom.functional(Layer(nnx.Rngs(0))),
    ):
        small = packed(jax.tree.map(lambda a: a + 0.25 if a.ndim == 1 else a, params))
        name = "packed matmul on cpu"
        assert runs(fn, small, X) == [f"{name} + bias + gelu", f"{name} + silu"]
        close(fn, small, X, bound=1e-2)  # a rounded input may fall to the next step


def test_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.silu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            return nn.Conv(4, (1, 1), use_bias=False)(x)

    model, x = Net(), jnp.asarray(RNG.standard_normal((2, 6, 5, 3), np.float32))
    params = jax.tree.map(lambda a: a + 0.1, model.init(jax.random.key(0), x))
    small = packed(params)
    name = "packed conv on cpu"
    assert runs(model.apply, small, x) == [f"{name} + bias + relu", f"{name} + bias + silu", name]
    close(model.apply, small, x)


@pytest.mark.parametrize("shape", [(32,), (1, 32)])
def test_two_products_that_are_added_up(shape):
    def fn(p, x, h):
        return jnp.tanh(x @ p["w"] + h @ p["u"])

    x, h = (jnp.asarray(RNG.standard_normal(shape, np.float32)) for _ in range(2))
    small = packed({"w": W, "u": 2 * W}, rule="w|u")
    names = sorted(runs(fn, small, x, h))
    assert names == ["packed matmul on cpu", "packed matmul on cpu + bias + tanh"]
    close(fn, small, x, h)


def test_a_wider_result_is_not_rounded_again():
    def fn(p, x):
        y = jax.lax.dot(
            x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), preferred_element_type=jnp.float32
        )
        return y + 1000 * p["b"]

    small = packed(PARAMS)
    assert runs(fn, small, X) == ["packed matmul on cpu"]
    close(fn, small, X, bound=5e-5)  # the product alone has the 8 bits of bfloat16


def test_a_forced_path_is_not_that_of_an_earlier_program():
    small = packed(PARAMS)
    jax.jit(jom.accelerate(lambda p, x: x @ p["w"]))(small, X)
    with kernels.forced("portable"):
        text = jax.jit(jom.accelerate(lambda p, x: x @ p["w"])).lower(small, X).as_text()
    assert "portable" in text and "native" not in text


def test_a_scanned_layer():
    params = {"w": jnp.stack([W[:, :32], W[:, 16:]]) / 8, "b": jnp.ones((2, 32))}

    def fn(p, x):
        return jax.lax.scan(lambda x, l: (jax.nn.gelu(x @ l["w"] + l["b"]), None), x, p)[0]

    recipe = [jom.Rule("w", W8A8, jom.Axes(stack=1))]
    small = jom.pack(jom.compress(params, recipe), target="cpu")
    assert runs(fn, small, X) == ["packed matmul on cpu + bias + gelu_tanh"]
    close(fn, small, X)


@jax.custom_jvp
def leaky(x):
    return jnp.maximum(x, 0.0)


leaky.defjvp(lambda x, t: (leaky(*x), t[0]))

LEFT = {
    "the product is read twice": (lambda p, x: (y := x @ p["w"]) * 2 + jnp.sin(y), ""),
    "the product is returned": (lambda p, x: (y := x @ p["w"], y + p["b"]), ""),
    "the sum is read twice": (lambda p, x: (y := x @ p["w"] + p["b"], jax.nn.silu(y)), " + bias"),
    "another derivative": (lambda p, x: leaky(x @ p["w"] + p["b"]), " + bias"),
    "another function": (lambda p, x: jnp.sin(x @ p["w"] + p["b"]), " + bias"),
    "nearly gelu": (lambda p, x: jax.nn.gelu(x @ p["w"] + p["b"]) * 1.5, " + bias + gelu_tanh"),
    "added to rows": (lambda p, x: x @ p["w"] + x[:, :1], ""),
    "added to entries": (lambda p, x: x @ p["w"] + jnp.ones((5, 48)), ""),
    "added to itself": (lambda p, x: (y := x @ p["w"]) + y, ""),
    "a number is added": (lambda p, x: x @ p["w"] + 1.0, ""),
    "the weight first": (lambda p, x: jnp.einsum("io,bi->ob", p["w"], x) + p["b"][:, None], ""),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fit_stays_outside(name):
    fn, tail = LEFT[name]
    small = packed(PARAMS)
    assert runs(fn, small, X) == [f"packed matmul on cpu{tail}"]
    close(fn, small, X)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_gradients_are_those_of_the_definition(name):
    def fn(p, x):
        return ACTIVATIONS[name](x @ p["w"] + p["b"])

    small = packed(PARAMS, quant.Int(bits=8))
    trained, rest = jom.partition(small)

    def loss(run):
        def of(trained, x):
            return jnp.sum(jnp.cos(run(fn)(jom.combine(trained, rest), x)))

        return jax.jit(jax.grad(of, argnums=(0, 1)))(trained, X)

    got, want = loss(jom.accelerate), loss(jom.simulate)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * float(jnp.abs(b).max()))


def test_a_bias_that_is_compressed_too():
    small = jom.compress(PARAMS, [jom.Rule("w", W8A8), jom.Rule("b", quant.Int(bits=8))])
    small = jom.pack(small, target="cpu")

    def fn(p, x):
        return jax.nn.silu(x @ p["w"] + p["b"])

    assert runs(fn, small, X) == ["packed matmul on cpu + bias + silu"]
    close(fn, small, X)


def test_where_the_kernel_does_not_run_the_epilogue_does(monkeypatch):
    elsewhere = [dataclasses.replace(k, platforms=("tpu",)) for k in KERNELS]
    monkeypatch.setattr("jaxopt_models._kernels.KERNELS", elsewhere)

    def fn(p, x):
        return jax.nn.silu(x @ p["w"] + p["b"])

    small = packed(PARAMS)
    assert runs(fn, small, X) == ["packed matmul on tpu + bias + silu"]
    close(fn, small, X, bound=1e-6)


@settings(deadline=None, max_examples=6)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 9),
    st.integers(1, 70),
)
def test_a_tail_is_what_matmul_takes(activation, biased, dtype, rows, columns):
    rng = np.random.default_rng(rows * 100 + columns)
    x = jnp.asarray(rng.standard_normal((rows, 32)), dtype)
    w = jom.pack(W8A8(jnp.asarray(rng.standard_normal((32, columns), np.float32))), target="cpu")
    tail = Tail(
        jnp.asarray(rng.standard_normal((1, columns)), dtype) if biased else None, activation
    )
    got = kernels.matmul.matmul(x, w, implementation="cpu", **tail.options)
    plain = kernels.matmul.matmul(x.astype(jnp.float32), w, implementation="xla")
    want = np.asarray(tail(plain), np.float32)
    bound = 1e-5 if dtype == "float32" else 1e-2
    atol = bound * max(1e-3, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=atol)
