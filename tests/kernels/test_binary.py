"""Products of signs: exact sums on every path there is, and the scales of the simulation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Rule, kernels, quant
from jaxopt_models.kernels import binary
from jaxopt_models.kernels.binary import PackedSigns
from jaxopt_models.quant._xnor import WithSign
from jaxopt_models.testing import bits

PATHS = ["native", "portable"] + ["avx2", "avx512"] * (kernels.status().path == "avx512")
RNG = np.random.default_rng(5)
needs_kernels = pytest.mark.skipif(not kernels.status().path, reason=kernels.status().why)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def signs(w, *, scaled=True, unit=False, axes=None):
    """A weight as its signs, and laid out."""
    encoder = jom.chain(quant.Binary(unit=unit), quant.Sign(scaled=scaled))
    leaf = encoder(jnp.asarray(w), axes=axes)
    return leaf, jom.pack(leaf, target="cpu")


@pytest.mark.parametrize(
    ("core", "out", "dtype"),
    [
        ((33, 65), (1,), "float32"),
        ((70, 8), (0,), "bfloat16"),
        ((2, 31, 9), (0, 2), "float32"),
        ((3, 2, 40, 7), (3,), "bfloat16"),
        ((1, 1), (1,), "float32"),
        ((64,), (), "float32"),
        ((5,), (0,), "float32"),
    ],
)
def test_what_is_laid_out_is_rebuilt_to_the_bit(core, out, dtype):
    leaf, packed = signs(normal(*core).astype(dtype), axes=jom.Axes(out=out))
    assert packed.kind() == "WithSign(PackedSigns)"
    assert not packed.check()
    assert bits(packed.materialize()) == bits(leaf.materialize())


def test_stacks_and_what_has_no_layout():
    leaf, packed = signs(normal(3, 40, 70), axes=jom.Axes(stack=1))
    assert packed.values.signs.shape == (3, 2, 2, 64)
    assert bits(packed.materialize()) == bits(leaf.materialize())
    assert not packed.check()
    broken = dataclasses.replace(packed.values, signs=~packed.values.signs)
    assert broken.check() == ["signs are set beyond the tensor"]
    grouped = jom.chain(quant.Binary(group=32), quant.Sign())(jnp.ones((64, 2)))
    for w, why in [
        (quant.Sign()(jnp.ones((4, 2))), "dense values"),
        (jom.chain(quant.Int(bits=8), quant.Sign())(jnp.ones((4, 2))), "layout for Quantized"),
        (grouped, "groups"),
        (quant.XNOR()(jnp.ones((3, 3, 1, 4))), "only 1 entries"),
    ]:
        assert jom.pack(w, target="cpu") is w
        [row] = jom.accelerate(lambda p, x: jnp.tensordot(x, p, x.ndim)).explain(
            w, jnp.ones(w.shape[:-1])
        )
        assert why in row["note"]
    with pytest.raises(TypeError, match="w is WithSign"):
        binary.matmul(jnp.ones((1, 4)), quant.XNOR()(jnp.ones((4, 2))))
    with pytest.raises(ValueError, match="last axis must be 40"):
        binary.matmul(jnp.ones((1, 4)), signs(normal(40, 2))[1])
    with pytest.raises(ValueError, match="stack axes"):
        binary.matmul(jnp.ones((1, 40)), packed)
    with pytest.raises(ValueError, match="stands for a tensor"):
        binary.conv(jnp.ones((1, 3, 3, 40)), signs(normal(40, 2))[1])


def by_hand(positive, scale, scaled):
    """Lays out a matrix of signs without the library."""
    k, n = positive.shape
    words, panels = -(-k // 32), -(-n // 64)
    full = np.zeros((words * 32, panels * 64), np.uint32)
    full[:k, :n] = positive
    place = np.arange(32, dtype=np.uint32)[:, None]
    packed = (full.reshape(words, 32, panels * 64) << place).sum(1, dtype=np.uint32)
    packed = packed.reshape(words, panels, 64).swapaxes(0, 1)
    side = np.pad(scale, (0, panels * 64 - n)).reshape(panels, 64)
    leaf = PackedSigns(jnp.asarray(packed), jnp.asarray(side), (k, n), (1,), "float32")
    return WithSign(leaf, (k, n), scaled)


@needs_kernels
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.sampled_from([0, 1, 2, 3, 5, 6, 7, 13, 33]),
    st.sampled_from([1, 2, 31, 32, 33, 64, 100, 1023, 2048]),
    st.sampled_from([1, 15, 16, 17, 64, 65, 130]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_sums_are_exact_on_every_path(m, k, n, dtype):
    positive, x = RNG.random((k, n)) < 0.4, normal(m, k).astype(dtype)
    x[RNG.random(x.shape) < 0.1] = -0.0
    scale = RNG.uniform(0.5, 2, n).astype(np.float32)
    sums = np.where(x >= 0, 1, -1) @ np.where(positive, 1, -1)
    plain, scaled = by_hand(positive, np.ones_like(scale), False), by_hand(positive, scale, True)
    found = set()
    for path in PATHS:
        with kernels.forced(path):
            y = binary.matmul(x, plain, implementation="cpu")
            np.testing.assert_array_equal(y, sums.astype(dtype))
            found.add(bits(y := binary.matmul(x, scaled, implementation="cpu")))
    assert len(found) == 1
    size = np.abs(x.astype(np.float64)).mean(1, keepdims=True)
    tolerance = 4e-3 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(np.asarray(y, np.float64), sums * scale * size, rtol=tolerance)


CONVS = [
    # images, kernel, strides, padding, dilation
    ((2, 6, 5, 64), (3, 3, 64, 70), (1, 1), "SAME", (1, 1)),
    ((1, 7, 7, 33), (3, 3, 33, 16), (2, 2), "SAME", (1, 1)),
    ((3, 5, 4, 9), (1, 1, 9, 65), (1, 1), "VALID", (1, 1)),
    ((1, 8, 9, 40), (2, 4, 40, 3), (1, 2), ((2, 0), (-1, 5)), (3, 2)),
    ((1, 2, 2, 8), (5, 5, 8, 1), (1, 1), ((4, 4), (4, 4)), (1, 1)),
    ((1, 3, 3, 100), (4, 1, 100, 17), (1, 1), "VALID", (1, 1)),
    ((0, 3, 3, 32), (3, 3, 32, 64), (1, 1), "SAME", (1, 1)),
]


@needs_kernels
@pytest.mark.parametrize(("images", "kernel", "strides", "padding", "dilation"), CONVS)
def test_convolutions_on_every_path(images, kernel, strides, padding, dilation):
    w, x = normal(*kernel), normal(*images)
    x[..., :1] *= RNG.random(x[..., :1].shape) < 0.9  # zeros count as positive, padding does not
    options = {"strides": strides, "padding": padding, "dilation": dilation}
    plain, scaled = signs(w, scaled=False, unit=True)[1], signs(w)[1]
    want = binary.conv(x, plain, implementation="xla", **options)
    found = set()
    for path in PATHS:
        with kernels.forced(path):
            y = binary.conv(x, plain, implementation="cpu", **options)
            np.testing.assert_array_equal(y, want)
            found.add(bits(y := binary.conv(x, scaled, implementation="cpu", **options)))
    assert len(found) == 1
    near = binary.conv(x, scaled, implementation="xla", **options)
    np.testing.assert_allclose(y, near, rtol=2e-5, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("scaled", [True, False])
def test_nan_and_infinity_stay_where_they_are(scaled):
    x, w = normal(5, 70), signs(normal(70, 20), scaled=scaled)[1]
    x[1, 3], x[3, 60], x[4, 0] = np.nan, np.inf, -np.inf
    for path in PATHS:
        with kernels.forced(path):
            y = np.asarray(binary.matmul(x, w, implementation="cpu"))
        want = np.asarray(binary.matmul(x, w, implementation="xla"))
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(want))
        assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()
        assert np.isfinite(y[3:]).all() != scaled
    x, w = normal(1, 5, 5, 8), signs(normal(3, 3, 8, 4), scaled=scaled)[1]
    x[0, 0, 0, 5] = np.nan
    y = np.asarray(binary.conv(x, w, implementation="cpu"))
    assert np.isnan(y[0, :2, :2]).all() and np.isnan(y).sum() == 16


@needs_kernels
def test_transformations():
    leaf, packed = signs(normal(64, 130))
    x = normal(3, 4, 64)
    run = jax.jit(lambda x, w: binary.matmul(x, w, implementation="cpu"))
    y = run(x, packed)
    np.testing.assert_array_equal(jax.vmap(run, (0, None))(x, packed), y)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(run, (0, None)), (1, None), 1)(x, packed), y)
    simulated = jom.simulate(lambda p, x: x @ p)
    np.testing.assert_allclose(y, simulated(leaf, x), rtol=2e-5, atol=2e-5)

    def loss(run, leaf):
        def of(x, scale):
            w = dataclasses.replace(leaf, values=dataclasses.replace(leaf.values, scale=scale))
            return jnp.sum(jnp.sin(run(x, w)))

        return of

    got = jax.grad(loss(run, packed), (0, 1))(x, packed.values.scale)
    want = jax.grad(loss(lambda x, w: simulated(w, x), leaf), (0, 1))(x, leaf.values.scale)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3, atol=1e-4)
    by_scale = got[1].reshape(-1)[:130]
    np.testing.assert_allclose(by_scale, want[1].reshape(-1), rtol=1e-3, atol=1e-3)
    stack = jom.pack(jax.vmap(quant.XNOR())(normal(3, 64, 16)), target="cpu")
    each = jax.vmap(run)(x, stack)
    one_by_one = jom.simulate(lambda p, x: jnp.einsum("bik,bkn->bin", x, p))(stack, x)
    np.testing.assert_allclose(each, one_by_one, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_meshes(axis_type):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    x, (_, packed) = normal(6, 40), signs(normal(40, 256))
    want = binary.matmul(x, packed, implementation="cpu")
    specs = packed.specs(P(None, "b"), (40, 128))
    assert packed.specs(P("a", None), (20, 256)) is None
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), packed, specs)
        rows = jax.device_put(x, NamedSharding(mesh, P("a", None)))
        run = jax.jit(lambda x, w: binary.matmul(x, w, implementation="cpu"))
        y = run(rows, placed)
        if axis_type == AxisType.Auto:
            assert "all-gather" not in run.lower(rows, placed).compile().as_text()
            assert y.sharding.spec == P("a", "b")
    np.testing.assert_array_equal(y, want)


class Net(nn.Module):
    """The order of XNOR-Net: normalization, binary layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(40, (3, 3))(x)
        x = nn.Conv(33, (3, 3), strides=2, use_bias=False)(nn.LayerNorm()(x))
        x = nn.Conv(64, (1, 1), padding="VALID")(nn.LayerNorm()(x))
        x = nn.Conv(64, (3,))(x.reshape(x.shape[0], -1, 64))
        x = nn.DenseGeneral(10, axis=(1, 2))(nn.LayerNorm()(x))
        return nn.Dense(3)(x)


def test_a_network_runs_on_kernels_as_it_is_simulated(key):
    params = Net().init(key, jnp.ones((2, 8, 8, 3)))["params"]

    def fn(p, x):
        return Net().apply({"params": p}, x)

    recipe = [Rule(r"(Conv_[123]|DenseGeneral_0)/kernel", quant.XNOR())]
    small = jom.compress(params, recipe)
    packed = jom.pack(small, target="cpu")
    x = normal(2, 8, 8, 3)
    run, simulated = jom.accelerate(fn), jom.simulate(fn)
    np.testing.assert_allclose(run(packed, x), simulated(small, x), rtol=2e-4, atol=2e-4)
    rows = {r["path"]: r for r in run.explain(packed, x) if r["runs"] != "dense"}
    if kernels.status().path:
        assert {k: r["runs"] for k, r in rows.items()} == {
            **{f"Conv_{i}/kernel": "binary conv on cpu" for i in (1, 2, 3)},
            "DenseGeneral_0/kernel": "binary matmul on cpu",
        }
        assert all("laid out" in r["note"] for r in run.explain(small, x) if r["path"] in rows)
    with kernels.forced("off"):
        assert all("turned off" in r["note"] for r in run.explain(packed, x) if r["path"] in rows)
        off = jom.accelerate(fn)(packed, x)
    np.testing.assert_allclose(off, simulated(small, x), rtol=2e-4, atol=2e-4)


@needs_kernels
def test_the_kernel_checks_what_it_is_handed():
    name = kernels.status().target("binary_matmul")
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((2, 5), jnp.float32))
    x, w, scale = jnp.ones((2, 40)), jnp.zeros((1, 2, 64), jnp.uint32), jnp.ones((1, 64))
    good = {"runs": np.int64(1), "length": np.int64(40), "scaled": np.int64(1)}
    call(x, w, scale, **good)
    for operands, options in [
        ((x[:1], w, scale), good),
        ((x, w[:, :1], scale), good),
        ((x, w, scale[:, :9]), good),
        ((x, jnp.zeros((2, 2, 64), jnp.uint32), jnp.ones((2, 64))), good),
        ((x.astype(jnp.float16), w, scale), good),
        ((x, w, scale), {**good, "length": np.int64(41)}),
    ]:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="binary matmul"):
            call(*operands, **options)
