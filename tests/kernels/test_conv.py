"""Convolutions with packed codes against their definition in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models import kernels, quant
from jaxopt_models.kernels.conv import conv
from jaxopt_models.kernels.conv.shapes import EDGES

if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)

PATHS = ["native", "portable"] + ["avx2", "avx512"] * (kernels.status().path == "avx512")
INPUTS = [
    None,
    quant.Input(bits=8),
    quant.Input(bits=8, symmetric=False),
    quant.Input(bits=4, per="tensor", symmetric=False),
]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def case(shape, encoder, inputs, batch=2):
    kernel = (shape.window, shape.window, shape.channels // shape.groups, shape.outputs)
    leaf = encoder(jnp.asarray(normal(kernel)))
    leaf = leaf if inputs is None else inputs(leaf)
    x = jnp.asarray(normal((batch, shape.size, shape.size, shape.channels), 1))
    return x, leaf, jom.pack(leaf, target="cpu")


def both(x, small, **options):
    return (conv(x, small, implementation=i, **options) for i in ("cpu", "xla"))


@pytest.mark.every(3)
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_every_kind_of_convolution(shape, inputs):
    x, _, small = case(shape, quant.Int(bits=4, symmetric=False), inputs)
    stride = (shape.stride, shape.stride)
    bias = jnp.asarray(normal(shape.outputs, 2))
    given = {"strides": stride, "groups": shape.groups, "bias": bias, "activation": "relu"}
    got, want = both(x, small, **given)
    assert got.shape == want.shape and got.dtype == want.dtype
    bound = (1e-4 if inputs is None else 3e-6) * float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("padding", ["VALID", ((2, 1), (0, 3)), ((0, 0), (5, 5))])
@pytest.mark.parametrize("groups", [1, 8])
def test_padding_and_dilation(padding, groups):
    leaf = quant.Input(bits=8, symmetric=False)(quant.Int(bits=8)(normal((3, 2, 8 // groups, 8))))
    x = jnp.asarray(normal((1, 7, 6, 8), 1)) + 2
    small = jom.pack(leaf, target="cpu")
    given = {"padding": padding, "dilation": (2, 1), "strides": (1, 2), "groups": groups}
    got, want = both(x, small, **given)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * float(jnp.abs(want).max()))


@settings(deadline=None, max_examples=5, derandomize=True)
@given(
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.sampled_from([1, 2, 3, 16, 33]),
    outputs=st.sampled_from([1, 2, 5, 16, 33]),
    groups=st.integers(1, 3),
    steps=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(-1, 2)),
    symmetric=st.booleans(),
)
def test_any_shape_to_the_bit(
    batch, size, window, channels, outputs, groups, steps, padding, symmetric
):
    # Whole numbers of which the largest is that of the grid: all scales are 1, all sums exact.
    rng = np.random.default_rng(batch)
    w = rng.integers(-127, 128, (*window, channels, outputs * groups)).astype(np.float32)
    x = rng.integers(-127 if symmetric else 0, 128, (batch, *size, channels * groups))
    x[:, 0, 0, 0] = 127 if symmetric else 255
    w[0, 0, 0] = 127
    leaf = quant.Input(bits=8, symmetric=symmetric)(quant.Int(bits=8)(jnp.asarray(w)))
    given = {"strides": steps, "dilation": steps[::-1], "groups": groups, "padding": (padding,) * 2}
    got, want = both(jnp.asarray(x, jnp.float32), jom.pack(leaf, target="cpu"), **given)
    np.testing.assert_array_equal(got, want)


def test_paths_agree_to_the_bit():
    for shape in EDGES[1:]:
        x, _, small = case(shape, quant.Int(bits=3), quant.Input(bits=8))
        found = []
        for path in PATHS:
            with kernels.forced(path):
                found.append(np.asarray(conv(x, small, groups=shape.groups, implementation="cpu")))
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("shape", [EDGES[2], EDGES[5]], ids=str)
def test_an_example_that_is_not_finite_is_alone(shape):
    x, _, small = case(shape, quant.Int(bits=8), quant.Input(bits=8), batch=3)
    got = np.asarray(conv(x.at[1, 0, 0].set(jnp.nan), small, groups=shape.groups))
    assert np.isnan(got[1]).any() and np.isfinite(got[[0, 2]]).all()
    clean = np.asarray(conv(x, small, groups=shape.groups))
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])


def test_derivative_batch_and_map():
    x, _, small = case(EDGES[1], quant.Int(bits=8), None)

    def loss(x, how):
        return jnp.sum(conv(x, small, implementation=how) ** 2)

    got, want = (jax.grad(loss)(x, how) for how in ("cpu", "xla"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * float(jnp.abs(want).max()))
    mapped = jax.vmap(lambda x: conv(x, small, implementation="cpu"))(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(mapped[0], conv(x, small, implementation="cpu"))


DIMENSIONS = [
    (("NHWC", "HWIO", "NHWC"), (1, 6, 6, 16)),
    (("NCHW", "HWIO", "NCHW"), (1, 16, 6, 6)),
    (("NHWC", "HWIO", "CNHW"), (1, 6, 6, 16)),
]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("dims", "shape"), DIMENSIONS)
def test_accelerate_runs_them_whatever_the_layout_of_images(dims, shape, wrap):
    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=dims)

    encoder = jom.chain(quant.Int(bits=8), quant.Input(bits=8)) if wrap else quant.Int(bits=8)
    small = jom.compress({"w": normal((3, 3, 16, 24))}, [jom.Rule("w", encoder)])
    packed, x = jom.pack(small, target="cpu"), jnp.asarray(normal(shape, 1))
    run = jom.accelerate(fn)
    assert [row["runs"] for row in run.explain(packed, x)] == ["packed conv on cpu"]
    want = jom.simulate(fn)(small, x)
    bound = (3e-6 if wrap else 1e-4) * float(jnp.abs(want).max())
    np.testing.assert_allclose(run(packed, x), want, rtol=0, atol=bound)


@pytest.mark.parametrize("wrap", [False, True])
def test_convolutions_of_sequences(wrap):
    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (2,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        )

    encoder = jom.chain(quant.Int(bits=8), quant.Input(bits=8)) if wrap else quant.Int(bits=8)
    small = jom.compress({"w": normal((3, 8, 16))}, [jom.Rule("w", encoder)])
    packed, x = jom.pack(small, target="cpu"), jnp.asarray(normal((2, 9, 8), 1))
    run = jom.accelerate(fn)
    assert run.explain(packed, x)[0]["runs"] == "packed conv on cpu"
    want = jom.simulate(fn)(small, x)
    np.testing.assert_allclose(run(packed, x), want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((5, 5, 3))}, "batch, height, width, channels"),
        ({"groups": 2}, "groups=2"),
        ({"x": jnp.ones((1, 5, 5, 4))}, "4 channels"),
        ({"w": jom.pack(quant.Int(bits=8)(jnp.ones((9, 8))), target="cpu")}, "with the last"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, _, small = case(EDGES[1], quant.Int(bits=8), None)
    given = {"x": x, "w": small, **change}
    with pytest.raises(ValueError, match=message):
        conv(given.pop("x"), given.pop("w"), **given)
