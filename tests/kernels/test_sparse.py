"""Products with what a mask keeps: the same weight to the bit, and the same sums on every path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Rule, kernels, prune, quant
from jaxopt_models._pack import why_not
from jaxopt_models.kernels import sparse
from jaxopt_models.kernels.sparse import PackedBlocks
from jaxopt_models.testing import bits

PATHS = ["native", "portable"] + ["avx2", "avx512"] * (kernels.status().path == "avx512")
RNG = np.random.default_rng(7)
needs_kernels = pytest.mark.skipif(not kernels.status().path, reason=kernels.status().why)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def both(w, encoder, **given):
    leaf = encoder(jnp.asarray(w), **given)
    return leaf, jom.pack(leaf, target="cpu")


def block(rows, sparsity=0.75, columns=1):
    return prune.Magnitude(sparsity=sparsity, structure=prune.Block(rows, columns))


PAIRS = prune.Magnitude(structure=prune.NofM(2, 4))


@pytest.mark.parametrize(
    ("shape", "encoder", "axes", "kind"),
    [
        ((64, 33), block(4), None, "PackedBlocks"),
        ((48, 17), block(16), None, "PackedBlocks"),
        ((24, 5), block(8, 0.5), None, "PackedBlocks"),
        ((32, 16), block(4, 0.9, columns=4), None, "PackedBlocks"),
        ((4, 12, 6), block(4), jom.Axes(out=(2,)), "PackedBlocks"),
        ((10, 32), block(16, 0.5), jom.Axes(out=(0,)), "PackedBlocks"),
        ((3, 32, 10), block(8), jom.Axes(stack=1), "PackedBlocks"),
        ((32, 10), jom.chain(block(4, 0.8), quant.Int(bits=8)), None, "PackedBlocks"),
        (
            (2, 32, 10),
            jom.chain(block(16, 0.9), quant.Int(bits=4)),
            jom.Axes(stack=1),
            "PackedBlocks",
        ),
        ((36, 33), PAIRS, None, "PackedPairs"),
        ((9, 64), PAIRS, jom.Axes(out=(0,)), "PackedPairs"),
        ((2, 32, 16), PAIRS, jom.Axes(stack=1), "PackedPairs"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_laid_out_is_rebuilt_to_the_bit(shape, encoder, axes, kind, dtype):
    w = normal(*shape).astype(dtype)
    w[..., 0] *= -0.0
    leaf, packed = both(w, encoder, axes=axes)
    assert packed.kind() == kind
    assert not packed.check()
    assert bits(packed.materialize()) == bits(leaf.materialize())


def test_what_is_not_laid_out_and_why():
    for encoder, why in [
        (prune.Magnitude(sparsity=0.9), "not kept or dropped together"),
        (block(4, 0.4), "60% are kept, and up to 50%"),
        (jom.chain(block(4), jom.codebook.KMeans(bits=2)), "a mask around Clustered"),
        (jom.chain(prune.Magnitude(sparsity=0.5), quant.NF4(group=None)), "around Tabulated"),
    ]:
        leaf, packed = both(normal(32, 32), encoder)
        assert packed is leaf
        assert why in why_not(leaf)
        [row] = jom.accelerate(lambda p, x: x @ p).explain(leaf, jnp.ones((2, 32)))
        assert why in row["note"] or "it is not laid out" in row["note"]
    # Codes that are better read whole keep their layout.
    for encoder in (block(4, 0.5), PAIRS, prune.Magnitude(sparsity=0.9)):
        both_ways = jom.chain(encoder, quant.Int(bits=8))
        assert both(normal(32, 32), both_ways)[1].kind() == "Packed"
    with pytest.raises(TypeError, match="w is Masked"):
        sparse.matmul(jnp.ones((1, 32)), PAIRS(jnp.ones((32, 2))))
    with pytest.raises(ValueError, match="last axis must be 32"):
        sparse.matmul(jnp.ones((1, 4)), both(normal(32, 2), PAIRS)[1])
    packed = both(normal(32, 8), block(4))[1]
    wrong = dataclasses.replace(packed, index=packed.index + jnp.uint16(8))
    assert wrong.check() == ["an index is beyond the inputs"]
    wrong = dataclasses.replace(packed, starts=packed.starts[::-1])
    assert wrong.check() == ["starts are not ascending from 0 to the number of units"]


def by_hand(rng, runs, unit, n, share, dtype):
    """Units of any number for each column, none among them, and the dense matrix."""
    alive = rng.random((n, runs)) < share
    column, index = np.nonzero(alive)
    values = rng.integers(-127, 128, (len(index), unit)).astype(np.int8)
    dense = np.zeros((runs, unit, n), np.float64)
    dense[index, :, column] = values
    scale = rng.choice([0.5, 1, 2], n).astype(np.float32)
    codes = dtype == "int8"
    leaf = PackedBlocks(
        jnp.asarray(values if codes else values.astype(dtype)),
        jnp.asarray(index.astype(np.uint16)),
        jnp.asarray(np.concatenate([[0], np.cumsum(alive.sum(1))]).astype(np.int32)),
        jnp.asarray(scale) if codes else None,
        (runs * unit, n),
        (1,),
        "float32",
    )
    return leaf, dense.reshape(runs * unit, n) * (scale if codes else 1)


@needs_kernels
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from([0, 1, 2, 3, 7, 15, 16, 17, 33, 50]),
    st.sampled_from([1, 3, 8, 33]),
    st.sampled_from([4, 8, 16]),
    st.sampled_from([1, 15, 16, 40]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_blocks_on_every_path(m, runs, unit, n, share, dtype, inputs):
    leaf, dense = by_hand(RNG, runs, unit, n, share, dtype)
    assert not leaf.check()
    np.testing.assert_array_equal(leaf.materialize(), dense)
    # Inputs of few bits, so that sums are exact in any order.
    x = (RNG.integers(-8, 9, (m, runs * unit)) / 4).astype(inputs)
    want = (x.astype(np.float64) @ dense).astype(np.float32).astype(inputs)
    for path in PATHS:
        with kernels.forced(path):
            np.testing.assert_array_equal(sparse.matmul(x, leaf, implementation="cpu"), want)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 1), (1, 36, 33), (7, 128, 16), (3, 4, 5)])
def test_pairs_on_every_path(m, k, n, dtype):
    w = RNG.integers(-8, 9, (k, n)).astype(dtype)
    leaf, packed = both(w, PAIRS)
    x = (RNG.integers(-8, 9, (m, k)) / 4).astype(dtype)
    dense = np.asarray(leaf.materialize()).astype(np.float64)
    want = (x.astype(np.float64) @ dense).astype(np.float32).astype(dtype)
    for path in PATHS:
        with kernels.forced(path):
            np.testing.assert_array_equal(sparse.matmul(x, packed, implementation="cpu"), want)


@needs_kernels
@pytest.mark.parametrize("encoder", [block(4), block(16), PAIRS])
@pytest.mark.parametrize("rows", [3, 20])
def test_nan_and_infinity_stay_in_their_row(encoder, rows):
    _, w = both(normal(64, 20), encoder)
    x = normal(rows, 64)
    x[1, 3], x[2, 60] = np.nan, np.inf
    for path in PATHS:
        with kernels.forced(path):
            y = np.asarray(sparse.matmul(x, w, implementation="cpu"))
        assert np.isnan(y[1:3]).all()
        good = [0, *range(3, rows)]
        np.testing.assert_allclose(y[good], x[good] @ np.asarray(w.materialize()), atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("encoder", [block(4), PAIRS, jom.chain(block(8, 0.9), quant.Int(bits=8))])
def test_transformations(encoder):
    leaf, packed = both(normal(32, 24), encoder)
    x = normal(3, 4, 32)
    run = jax.jit(lambda x, w: sparse.matmul(x, w, implementation="cpu"))
    y = run(x, packed)
    np.testing.assert_allclose(y, x @ np.asarray(leaf.materialize()), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, (0, None))(x, packed), y, rtol=1e-5, atol=1e-6)
    [name] = packed.trained()

    def loss(of, x, part):
        return jnp.sum(jnp.sin(of(x, dataclasses.replace(packed, **{name: part}))))

    part = getattr(packed, name)
    got = jax.grad(loss, (1, 2))(run, x, part)
    want = jax.grad(loss, (1, 2))(lambda x, w: x @ w.materialize(), x, part)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("encoder", [block(4), PAIRS])
def test_rows_divided_over_a_mesh(encoder):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    _, w = both(normal(32, 24), encoder)
    x = jax.device_put(normal(8, 32), NamedSharding(mesh, P("a", None)))
    run = jax.jit(lambda x, w: sparse.matmul(x, w, implementation="cpu"))
    y = run(x, w)
    assert tuple(y.sharding.spec)[:1] == ("a",)
    assert "all-gather" not in run.lower(x, w).compile().as_text()
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w.materialize()), rtol=1e-4, atol=1e-5)


def test_accelerate_uses_them(tmp_path):
    params = {"a": normal(64, 32), "b": normal(32, 32), "c": normal(2, 32, 32), "d": normal(8, 32)}
    codes = jom.chain(block(4, 0.9), quant.Int(bits=8))
    recipe = [Rule("a", block(16, 0.5)), Rule("b", PAIRS), Rule("c", codes, axes=jom.Axes(stack=1))]
    recipe += [Rule("d", block(4), axes=jom.Axes.torch())]

    def fn(p, x):
        x = jnp.tanh(x @ p["a"]) @ p["b"]
        x = jnp.einsum("sbi,sio->sbo", jnp.stack([x, -x]), p["c"])
        return x @ p["d"].T

    x = normal(5, 64)
    small = jom.compress(params, recipe)
    packed = jom.pack(small, target="cpu")
    want = fn(jom.materialize(small), x)
    run = jom.accelerate(fn)
    np.testing.assert_allclose(run(packed, x), want, rtol=1e-4, atol=1e-4)
    if kernels.status().path:
        rows = run.explain(packed, x)
        assert {r["path"]: r["runs"] for r in rows} == dict.fromkeys("abcd", "sparse matmul on cpu")
        notes = {r["path"]: r["note"] for r in run.explain(packed, jnp.ones((65, 64)))}
        assert "better rebuilt" in notes["b"]
    with pytest.raises(ValueError, match="laid out for the kernels"):
        jom.save(tmp_path / "never", packed)


@needs_kernels
def test_the_kernels_check_what_they_are_handed():
    _, w = both(normal(32, 24), block(8))
    x, scale, shape = normal(2, 32), jnp.ones(24), jax.ShapeDtypeStruct((2, 24), jnp.float32)
    call = jax.ffi.ffi_call(kernels.status().target("sparse_blocks"), shape)
    good = (x, w.values, w.index, w.starts, scale)
    call(*good)
    for i, other in [
        (0, x[:1]),
        (0, x[:, :24]),
        (1, w.values[:, :5]),
        (1, w.values.astype(jnp.float16)),
        (2, w.index[1:]),
        (2, w.index + jnp.uint16(9)),
        (3, w.starts[1:]),
        (3, w.starts[::-1]),
        (3, w.starts + 1),
        (4, scale[1:]),
    ]:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="sparse blocks"):
            call(*good[:i], other, *good[i + 1 :])
    _, w = both(normal(32, 24), PAIRS)
    call = jax.ffi.ffi_call(kernels.status().target("sparse_pairs"), shape)
    for operands in [
        (x[:, :4], w.values[:, :0], w.places),
        (x, w.values[:1], w.places[:1]),
        (x, w.values, w.places[:1]),
    ]:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="sparse pairs"):
            call(*operands)
