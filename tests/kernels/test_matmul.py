"""Products with packed codes: to the bit where inputs are rounded, on every path there is."""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models import codebook, kernels, quant
from jaxopt_models.kernels._layout import Packed, pack, to_panels
from jaxopt_models.kernels.matmul import matmul
from jaxopt_models.kernels.matmul.reference import integer_matmul
from jaxopt_models.kernels.matmul.shapes import EDGES

if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)

PATHS = ["native", "portable"] + (["avx2"] if kernels.status().path == "avx512" else [])
FORMATS = [
    quant.Int(bits=8),
    quant.Int(bits=5, symmetric=False),
    quant.Int(bits=4, group=32),
    quant.Int(bits=3),
    quant.Int(bits=2, group=32, symmetric=False),
    quant.Binary(),
    quant.Ternary(),
    quant.NF4(group=32),
    quant.Float("e2m1"),
    codebook.KMeans(bits=4),
]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def packed(bits, rows, columns, groups=1, seed=0, zero=False):
    """Codes of any value, scales and zero points as no encoder would choose them."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 1 << bits, (rows, columns))
    scale = rng.uniform(0.5, 1.5, (groups, columns)).astype(np.float32)
    z = rng.integers(-2, 3, (groups, columns)).astype(np.float32) if zero else None
    less = (
        q - (1 << (bits - 1)) - (0 if z is None else np.repeat(z, max(1, rows // groups), 0)[:rows])
    )
    sums = (
        less.reshape(groups, rows // groups, columns).sum(1)
        if rows
        else np.zeros((groups, columns))
    )
    return Packed(
        pack(jnp.asarray(q), bits),
        to_panels(jnp.asarray(scale)),
        None if z is None else to_panels(jnp.asarray(z)),
        to_panels(jnp.asarray(sums)),
        None,
        (rows, columns),
        (1,),
        bits,
        "float32",
    )


def codes_of_rows(x, symmetric):
    """Rounds rows as NumPy does; codes are signed."""
    if symmetric:
        scale = np.abs(x).max(1, initial=0) / np.float32(127)
    else:
        low = np.minimum(x.min(1, initial=0), 0)
        scale = (np.maximum(x.max(1, initial=0), 0) - low) / np.float32(255)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, 1).astype(np.float32)
    q = np.rint(x / scale[:, None])
    if symmetric:
        return np.clip(q, -127, 127), scale, np.zeros_like(scale)
    zero = np.rint(-low / scale)
    return np.clip(q + zero[:, None], 0, 255) - 128, scale, zero - 128


def rounding(leaf, symmetric):
    return quant.WithInput(leaf, None, None, leaf.core, 8, "row", symmetric)


def check_bits(shape, bits, groups, zero, symmetric, path):
    m, k, n = shape
    leaf, x = packed(bits, k, n, groups, zero=zero), normal((m, k), 1)
    a, scale, z = codes_of_rows(x, symmetric)
    want = integer_matmul(
        jnp.asarray(a, jnp.int8),
        jnp.asarray(scale),
        jnp.asarray(z, jnp.float32),
        dataclasses.replace(leaf, sums=None) if symmetric else leaf,
        None,
    )
    with kernels.forced(path):
        got = matmul(jnp.asarray(x), rounding(leaf, symmetric), implementation="cpu")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_integers_are_those_of_the_definition_to_the_bit(bits, path):
    for i, shape in enumerate(EDGES):
        groups = shape[1] // 32 if shape[1] and shape[1] % 32 == 0 else 1
        check_bits(shape, bits, groups, zero=i % 2 == 0, symmetric=i % 3 > 0, path=path)


@settings(deadline=None, max_examples=12)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 5),
    n=st.integers(0, 150),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    zero=st.booleans(),
    symmetric=st.booleans(),
)
def test_any_shape_to_the_bit(m, k, n, bits, zero, symmetric):
    check_bits((m, 32 * k, n), bits, k, zero, symmetric, "native")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("encoder", FORMATS, ids=str)
def test_inputs_that_are_not_rounded(encoder, path):
    leaf = encoder(jnp.asarray(normal((96, 70))))
    small, x, bias = jom.pack(leaf, target="cpu"), normal((5, 96), 1), normal(70, 2)
    dense = np.asarray(leaf.materialize(), np.float64)
    with kernels.forced(path):
        got = matmul(jnp.asarray(x), small, bias=jnp.asarray(bias), implementation="cpu")
    want = x.astype(np.float64) @ dense + bias
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: rounding(w, True)])
def test_paths_agree_to_the_bit(table, wrap):
    leaf, x = packed(4, 320, 100, 10, zero=not table), jnp.asarray(normal((7, 320)))
    leaf = dataclasses.replace(leaf, sums=None)
    if table:
        leaf = dataclasses.replace(leaf, table=jnp.asarray(normal(16)))
    leaf = wrap(leaf)
    found = []
    for path in [*PATHS, *["avx512"] * ("avx2" in PATHS)]:
        with kernels.forced(path):
            found.append(np.asarray(matmul(x, leaf, activation="gelu", implementation="cpu")))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
def test_activations(name):
    w = packed(8, 0, 2000)
    x = jnp.linspace(-12, 12, 2000)
    got, want = (
        matmul(jnp.zeros((1, 0)), w, bias=x, activation=name, implementation=i)
        for i in ("cpu", "xla")
    )
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    assert np.isnan(matmul(jnp.zeros((1, 0)), w, bias=x * jnp.nan, activation=name)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: rounding(w, True), lambda w: rounding(w, False)]
)
def test_a_row_that_is_not_finite_is_nan_and_alone(bad, wrap):
    leaf, x = packed(8, 70, 33), normal((9, 70))
    x[4, 69] = bad
    got = np.asarray(matmul(jnp.asarray(x), wrap(leaf), implementation="cpu"))
    rest = np.delete(np.arange(9), 4)
    assert np.isnan(got[4]).all() and np.isfinite(got[rest]).all()
    np.testing.assert_array_equal(
        got[rest], matmul(jnp.asarray(x[rest]), wrap(leaf), implementation="cpu")
    )


def test_bfloat16_and_static_inputs():
    leaf = packed(8, 64, 40)
    x = jnp.asarray(normal((3, 64)), jnp.bfloat16)
    got = matmul(x, leaf, implementation="cpu")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        got, matmul(x.astype(jnp.float32), leaf, implementation="cpu").astype(jnp.bfloat16)
    )
    for symmetric, zero in ((True, None), (False, jnp.float32(100))):
        fixed = quant.WithInput(leaf, jnp.float32(0.02), zero, leaf.core, 8, "static", symmetric)
        a, b = (matmul(x.astype(jnp.float32), fixed, implementation=i) for i in ("cpu", "xla"))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_derivatives_are_those_of_the_definition():
    leaf, x = packed(4, 64, 40, 2, zero=True), jnp.asarray(normal((3, 64)))

    def loss(x, scale, how):
        w = dataclasses.replace(leaf, scale=scale)
        return jnp.sum(matmul(x, w, implementation=how) ** 2) / 1e4

    for i in (0, 1):
        got, want = (jax.grad(loss, argnums=i)(x, leaf.scale, h) for h in ("cpu", "xla"))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))
    got, want = (
        jax.jvp(lambda x, h=h: matmul(x, leaf, implementation=h), (x,), (x,))[1]
        for h in ("cpu", "xla")
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    hessian = jax.hessian(lambda v: loss(v.reshape(1, 64), leaf.scale, "cpu"))(x[0])
    assert hessian.shape == (64, 64) and float(jnp.abs(hessian).max()) > 0


def test_rows_fold_and_stacks_are_mapped():
    leaf, x = packed(8, 64, 40), jnp.asarray(normal((4, 3, 64)))
    whole = matmul(x.reshape(12, 64), leaf, implementation="cpu").reshape(4, 3, 40)

    def run(x, w):
        return matmul(x, w, implementation="cpu")

    np.testing.assert_array_equal(jax.vmap(run, (0, None))(x, leaf), whole)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(run, (0, None)), (0, None))(x, leaf), whole)
    text = str(jax.make_jaxpr(jax.vmap(run, (0, None)))(x, leaf))
    assert "scan" not in text  # one call, not one for each
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a, a]), leaf)
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(x, stack), whole)
    np.testing.assert_array_equal(matmul(x[1], stack, index=3, implementation="cpu"), whole[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 63))}, "its last axis must be 64"),
        ({"x": jnp.ones((2, 64), jnp.int32)}, "give float32 or bfloat16"),
        ({"w": jnp.ones((64, 40))}, "jaxopt_models.pack"),
        ({"bias": jnp.ones(39)}, r"not \(40,\)"),
        ({"activation": "swish"}, "none of none, relu"),
        ({"implementation": "gpu"}, "is not 'cpu', 'xla', 'pallas_gpu' or None"),
        ({"implementation": "pallas_gpu"}, "laid out for a CPU"),
        ({"index": 0}, "index= for just one"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"x": jnp.ones((2, 64)), "w": packed(8, 64, 40), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        matmul(given.pop("x"), given.pop("w"), **given)


def test_many_threads_at_once():
    leaf, x = packed(8, 512, 512), jnp.asarray(normal((8, 512)))
    run = jax.jit(lambda x: matmul(x, leaf, implementation="cpu"))
    want = np.asarray(run(x))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: np.asarray(run(x)), range(200)))
    assert all(np.array_equal(f, want) for f in found)
