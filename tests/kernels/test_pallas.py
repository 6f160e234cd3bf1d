"""Products with codes where they lie: Triton's kernel, interpreted, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant
from jaxopt_models._axes import Matrix
from jaxopt_models.kernels.matmul import matmul, pallas_gpu, reference, stored

TORCH = jom.Axes.torch()
#: Encoder, axes, `(rows, inputs, outputs)`: one, odd, and no multiple of a tile or a byte.
CASES = [
    (quant.Int(bits=8), None, (1, 1, 1)),
    (quant.Int(bits=8, group=3), TORCH, (2, 33, 5)),
    (quant.Int(bits=8, group=64, symmetric=False), None, (3, 128, 70)),
    (quant.Int(bits=4, group=32), None, (1, 1056, 33)),
    (quant.Int(bits=4, group=8), None, (5, 24, 66)),
    (quant.Int(bits=4, group=32, symmetric=False), TORCH, (70, 96, 17)),
    (quant.Int(bits=4), TORCH, (1, 35, 70)),
    (quant.Int(bits=4, group=32, block=2, scale="bfloat16"), None, (2, 64, 130)),
    (quant.Int(bits=2, group=32), None, (17, 64, 36)),
    (quant.Int(bits=2), TORCH, (1, 66, 31)),
    (quant.Int(bits=3, group=32), None, (3, 96, 70)),
    (quant.Int(bits=5), TORCH, (2, 70, 9)),
    (quant.Binary(), None, (1, 40, 21)),
    (quant.NF4(group=64), None, (1, 192, 70)),
    (quant.Float("e4m3"), TORCH, (2, 40, 21)),
    (quant.NVFP4(), None, (2, 48, 18)),
    (quant.HQQ(bits=4, group=32), None, (2, 64, 33)),
    (codebook.KMeans(bits=4), None, (33, 70, 65)),
    (codebook.KMeans(bits=4), TORCH, (1, 70, 33)),
    (codebook.KMeans(bits=6, per="channel"), TORCH, (2, 66, 12)),
    (jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4, group=32)), None, (2, 64, 10)),
]


def made(encoder, axes, k, n, seed=0):
    """A leaf of `k` inputs and `n` outputs, and its output axes."""
    shape = (n, k) if axes is TORCH else (k, n)
    w = np.random.default_rng(seed).standard_normal(shape, np.float32)
    leaf = encoder(jnp.asarray(w), axes=axes)
    return leaf, (0,) if axes is TORCH else (1,)


def rows(m, k, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), dtype)


@pytest.mark.parametrize(("encoder", "axes", "shape"), CASES, ids=str)
def test_any_format_and_shape(encoder, axes, shape):
    m, k, n = shape
    leaf, out = made(encoder, axes, k, n)
    assert stored.why_not(stored.codes_of(leaf), out) == ""
    x = rows(m, k)
    got = pallas_gpu.product(x, leaf, out=out, interpret=True)
    dense = np.asarray(Matrix(leaf.core, out).view(leaf.materialize()), np.float64)
    want = np.asarray(x, np.float64) @ dense
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max() + 1e-6)


def test_bfloat16_many_rows_and_a_row_that_is_not_finite():
    leaf, out = made(quant.Int(bits=4, group=64), None, 128, 48)
    x = rows(130, 128, jnp.bfloat16)
    got = pallas_gpu.product(x, leaf, out=out, dtype=jnp.float32, interpret=True)
    want = np.asarray(x, np.float64) @ np.asarray(leaf.materialize(), np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    bad = pallas_gpu.product(x.at[7, 3].set(jnp.nan), leaf, out=out, interpret=True)
    assert bad.dtype == jnp.bfloat16 and np.isnan(bad[7].astype(jnp.float32)).all()
    assert bool(jnp.isfinite(jnp.delete(bad, 7, axis=0)).all())


def test_no_rows():
    leaf, out = made(quant.Int(bits=8), None, 8, 3)
    assert pallas_gpu.product(rows(0, 8), leaf, out=out, interpret=True).shape == (0, 3)


def test_maps_and_derivatives_are_those_of_the_definition():
    leaf, out = made(quant.Int(bits=4, group=32), None, 64, 20)
    x = rows(6, 64).reshape(2, 3, 64)
    run = functools.partial(pallas_gpu.product, out=out, interpret=True)
    plain = functools.partial(reference.product, out=out)
    text = str(jax.make_jaxpr(jax.vmap(run, (0, None)))(x, leaf))
    assert "f32[6,20]" in text  # one call, not one for each

    def loss(how, x, floats):
        y = jax.vmap(how, (0, None))(x, jom.combine(floats, rest))
        return jnp.sum(jnp.sin(y))

    floats, rest = jom.partition(leaf)
    both = [jax.grad(functools.partial(loss, h), argnums=(0, 1))(x, floats) for h in (run, plain)]
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), leaf)
    np.testing.assert_allclose(
        jax.vmap(run)(x, stack), jax.vmap(plain, (0, None))(x, leaf), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("spec", [P(None, "b"), P("a", None), P("a", "b")])
@pytest.mark.parametrize("encoder", [quant.Int(bits=4, group=16), quant.Int(bits=3)], ids=str)
def test_codes_divided_over_a_mesh_stay_there(encoder, spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    leaf, out = made(encoder, None, 64, 32)
    x = rows(4, 64)
    want = reference.product(x, leaf, out)
    local = tuple(n // (2 if s else 1) for n, s in zip(leaf.shape, spec, strict=True))
    placed = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), leaf, leaf.specs(spec, local)
    )
    given = jax.device_put(x, NamedSharding(mesh, P(None, spec[0])))
    run = jax.jit(functools.partial(pallas_gpu.product, out=out, interpret=True))
    np.testing.assert_allclose(run(given, placed), want, rtol=0, atol=1e-5)
    text = run.lower(given, placed).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    if leaf.codes.dtype == jnp.int4:  # planes along a divided axis are put together
        assert not any("s4[" in line or "u8[" in line for line in gathers)
        assert ("all-reduce" in text) == (spec[0] is not None)


def test_the_public_function():
    leaf, _ = made(quant.NF4(group=32), None, 64, 20)
    x, bias = rows(6, 64).reshape(2, 3, 64), jnp.ones(20)
    want = jax.nn.relu(x @ leaf.materialize() + 1)
    for how in (None, "xla"):
        got = matmul(x, leaf, bias=bias, activation="relu", implementation=how)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    stack = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), leaf)
    np.testing.assert_allclose(matmul(x, stack, index=0), x @ leaf.materialize(), atol=1e-5)
    with pytest.raises(TypeError, match="lay it out"):
        matmul(x, leaf, implementation="cpu")
    with pytest.raises(ValueError, match="index= for just one"):
        matmul(x, stack)
    with pytest.raises(ValueError, match="its last axis must be 64"):
        matmul(x[..., :5], leaf)


@pytest.mark.parametrize(
    ("core", "out", "encoder", "why"),
    [
        ((4, 6, 8), (1,), quant.Int(bits=8), "both sides of its outputs"),
        ((4, 6, 8), (1, 2), quant.Int(bits=3), "planes of 3 bits along one of several axes"),
        ((4, 8), (1,), prune.Magnitude(sparsity=0.5), "a mask around it"),
    ],
)
def test_what_cannot_be_read_says_why(core, out, encoder, why):
    leaf = encoder(jnp.ones(core), axes=jom.Axes(out=out))
    assert why in stored.why_not(stored.codes_of(leaf), out)
