import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxopt_models import Axes, Rule, chain, compress, partition, prune, quant
from jaxopt_models.quant import MSE, MX, NF4, NVFP4, Binary, Float, Int, Table, Ternary

FEW = settings(max_examples=25, deadline=None)
# Not so small that products are flushed to zero.
ELEMENTS = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-25 else 0.0)
NUMBERS = hnp.arrays(np.float32, (8, 6), elements=ELEMENTS)
KINDS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cast(x, kind):
    """What `ml_dtypes` makes of numbers, the largest where it has none so large."""
    top = float(ml_dtypes.finfo(KINDS[kind]).max)
    return np.clip(x, -top, top).astype(KINDS[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(w=NUMBERS)
def test_floats_are_those_of_ml_dtypes(kind, w):
    small = Float(kind)(jnp.asarray(w))
    top = np.float32(ml_dtypes.finfo(KINDS[kind]).max)
    scale = np.abs(w).max(0) / top
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    np.testing.assert_array_equal(np.asarray(small.scale)[:, 0], scale)
    np.testing.assert_array_equal(small.materialize(), cast(w / scale, kind) * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_every_float_is_its_own_nearest_and_halves_go_to_the_even_one(kind):
    values = np.arange(2 ** ml_dtypes.finfo(KINDS[kind]).bits, dtype=np.uint8)
    values = values.view(KINDS[kind]).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2])  # the largest gives scale 1
    np.testing.assert_array_equal(
        Float(kind)(jnp.asarray(x[:, None])).materialize()[:, 0], cast(x, kind)
    )


@pytest.mark.parametrize("kind", ["e4m3", "e3m2", "e2m3", "e2m1"])
@FEW
@given(w=NUMBERS)
def test_microscaling_follows_the_standard(kind, w):
    small = MX(kind, group=4)(jnp.asarray(w))
    emax = int(np.floor(np.log2(float(ml_dtypes.finfo(KINDS[kind]).max))))
    runs = w.reshape(2, 4, 6)
    top = np.abs(runs).max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(top.astype(np.float64))) - emax
    scale = np.exp2(np.where(top > 0, np.maximum(exponent, -126), 0))
    want = cast((runs / scale).astype(np.float32), kind) * scale
    np.testing.assert_array_equal(small.materialize(), want.reshape(8, 6).astype(np.float32))
    assert small.scale.dtype == jnp.float8_e8m0fnu


def test_nvfp4_has_a_float_of_a_byte_for_sixteen_and_one_scale_for_all():
    w = normal(64, 8)
    small = NVFP4()(jnp.asarray(w))
    whole = np.float32(np.abs(w).max()) / np.float32(6 * 448)
    runs = w.reshape(4, 16, 8)
    block = (np.abs(runs).max(1) / np.float32(6) / whole).astype(np.float32)
    scale = cast(block, "e4m3") * whole
    want = cast(runs / scale[:, None], "e2m1") * scale[:, None]
    np.testing.assert_allclose(small.materialize(), want.reshape(64, 8), rtol=1e-5)
    assert small.storage_bits() == 64 * 8 * 4 + 4 * 8 * 8 + 32


def test_nf4_takes_the_nearest_quantile():
    w = normal(64, 3)
    small = NF4()(jnp.asarray(w))
    table = np.array(NF4().table)
    assert table[7] == 0
    assert np.all(np.diff(table) > 0)
    top = np.abs(w).max(0)
    nearest = np.abs((w / top)[..., None] - table).argmin(-1)
    np.testing.assert_array_equal(small.integers(), nearest)
    np.testing.assert_allclose(small.materialize(), table[nearest] * top, rtol=1e-6)


def test_a_users_table_spans_the_range_on_the_sides_it_has():
    w = jnp.array([[4.0], [-1.2], [0.4]])
    positive = Table((0.0, 0.25, 1.0))(w)
    np.testing.assert_array_equal(positive.materialize().ravel(), [4.0, 0.0, 0.0])
    assert positive.bits == 2
    lopsided = Table((-2.0, 0.0, 1.0))(w)
    np.testing.assert_array_equal(lopsided.materialize().ravel(), [4.0, 0.0, 0.0])


TABLES = [(1.0,), (0.0, 0.0), (1.0, 0.0), (0.0, np.inf), range(257)]
# What float32 cannot hold, or tell apart.
TABLES += [(-1e300, 1e300), (-1e-45, 1e-45), (0.0, 1e-45, 1.0), (1.0, 1 + 1e-12)]


@pytest.mark.parametrize("entries", TABLES)
def test_a_table_is_ascending_and_finite(entries):
    with pytest.raises(ValueError, match="ascending"):
        Table(tuple(entries))


def test_a_table_holds_numbers():
    with pytest.raises(TypeError, match="no numbers"):
        Table(("a", "b"))
    with pytest.raises(TypeError, match="entries='12' are no numbers; give a tuple"):
        Table("12")


def test_binary_keeps_signs_and_the_mean_of_what_is_kept():
    w = normal(10, 4)
    keep = np.abs(w) > 0.5
    small = Binary()(jnp.asarray(w), keep=jnp.asarray(keep))
    alpha = (np.abs(w) * keep).sum(0) / keep.sum(0)
    want = np.where(keep, np.where(w >= 0, 1, -1) * alpha, 0)
    np.testing.assert_allclose(small.materialize(), want, rtol=1e-5)
    assert Binary()(jnp.asarray(w)).storage_bits() == 10 * 8 + 4 * 32  # 4 outputs fill a byte
    np.testing.assert_array_equal(Binary(unit=True)(jnp.asarray(w)).materialize(), np.sign(w))


def test_zero_is_positive_in_binary():
    np.testing.assert_array_equal(
        Binary()(jnp.array([[0.0], [-2.0]])).materialize().ravel(), [1, -1]
    )


def test_ternary_is_that_of_the_paper():
    w = normal(50, 3)
    delta = 0.7 * np.abs(w).mean(0)
    large = np.abs(w) > delta
    alpha = (np.abs(w) * large).sum(0) / large.sum(0)
    np.testing.assert_allclose(
        Ternary()(jnp.asarray(w)).materialize(), np.sign(w) * large * alpha, rtol=4e-5
    )


@FEW
@given(w=NUMBERS, width=st.sampled_from([2, 4, 8]))
def test_powers_of_two_are_the_least_that_cover(w, width):
    small = Int(bits=width, scale="power_of_two")(jnp.asarray(w))
    scale = np.asarray(small.scale, np.float64)[:, 0]
    top = np.abs(w).max(0) / (2 ** (width - 1) - 1)
    np.testing.assert_array_equal(np.log2(scale), np.round(np.log2(scale)))
    assert np.all((scale >= top) | (top == 0))
    assert np.all((scale < 2 * top) | (top < np.finfo(np.float32).tiny))


def test_powers_of_two_are_not_handed_to_an_optimizer():
    trainable, _ = partition({"w": Int(bits=4, scale="power_of_two")(jnp.ones((8, 2)))})
    assert jax.tree.leaves(trainable) == []


@pytest.mark.parametrize(("scale", "width"), [("bfloat16", 16), ("float16", 16), ("float32", 32)])
def test_scales_are_kept_in_the_type_that_is_asked_for(scale, width):
    w = normal(64, 8)
    small = Int(bits=4, group=16, scale=scale)(jnp.asarray(w))
    assert small.bits_by_part() == {"codes": 64 * 8 * 4, "scale": 4 * 8 * width}
    assert small.scale.dtype == scale
    # The codes are those of the scale that is kept.
    spread = np.repeat(np.asarray(small.scale, np.float32).T, 16, 0)
    np.testing.assert_array_equal(small.integers(), np.clip(np.round(w / spread), -7, 7))


HALVES = [Int(4, scale="float16"), NF4(group=4, scale="float16"), Binary(scale="float16")]
HALVES += [quant.LSQ(4, scale="float16"), quant.Ternary(scale="float16")]
HALVES += [NF4(group=4, scale=Int(8, scale="float16"))]


@pytest.mark.parametrize("encoder", HALVES, ids=repr)
def test_scales_that_float16_cannot_hold_raise(encoder):
    rule, fix = [Rule("w", encoder)], "give scale='bfloat16' or 'float32'"
    large = jnp.linspace(-6e7, 6e7, 32).reshape(8, 4)
    encode = jax.jit(lambda w: compress({"w": w}, rule)["w"].materialize())
    with pytest.raises(ValueError, match=f"w: .* scales are beyond 65504, .* float16; {fix}"):
        compress({"w": large}, rule)
    assert np.isfinite(encode(large)).all()
    small = jnp.asarray(1e-7 * normal(8, 4))
    with pytest.raises(ValueError, match=f"w: all scales are below 4e-06, .*; {fix}"):
        compress({"w": small}, rule)
    assert np.isfinite(encode(small)).all()
    # Outputs that are dead beside others that are not, or quite zero, are no reason to raise.
    usual = jnp.asarray(normal(8, 4)).at[:, 0].set(1e-9).at[:, 1].set(0)
    assert np.isfinite(compress({"w": usual}, rule)["w"].materialize()).all()


WIDE = [Binary(), quant.Ternary(), quant.Normal(4), quant.LSQ(4), quant.LSQ(4, symmetric=False)]


@pytest.mark.parametrize("encoder", WIDE, ids=repr)
def test_weights_near_the_largest_float(encoder):
    w = np.float32([[3e38], [-3e38], [1e38], [2e38]])
    found = np.asarray(encoder(jnp.asarray(w)).materialize(), np.float64)
    small = np.asarray(encoder(jnp.asarray(w) / 2.0**100).materialize(), np.float64) * 2.0**100
    if encoder in (quant.Normal(4), quant.LSQ(4)):  # their range ends at the largest float
        np.testing.assert_allclose(found, w, atol=4.1e37)
    else:
        np.testing.assert_allclose(found, small, rtol=1e-4)


def test_scales_may_be_encoded_themselves():
    w = jnp.asarray(normal(64, 8))
    small = NF4(group=8, scale=Int(bits=8, symmetric=False))(w)
    assert small.bits_by_part()["codes"] == 64 * 8 * (4 + 1)  # codes of weights and of scales
    miss, plain = (float(jnp.std(w - q.materialize())) for q in (small, NF4(group=8)(w)))
    assert miss < 1.02 * plain
    trainable, _ = partition({"w": small})
    assert [x.shape for x in jax.tree.leaves(trainable)] == [(8, 1)]


@pytest.mark.parametrize("out", [(1,), (1, 2)])
def test_blocks_of_two_dimensions_share_a_scale(out):
    shape = (8, 12) if out == (1,) else (8, 2, 6)
    w = normal(*shape)
    small = Int(bits=8, group=4, block=3)(jnp.asarray(w), axes=Axes(out=out))
    blocks = w.reshape(2, 4, 4, 3)
    top = np.abs(blocks).max((1, 3))
    assert small.scale.shape == (*shape[1:-1], shape[-1] // 3, 2)
    np.testing.assert_allclose(np.asarray(small.scale).reshape(4, 2), top.T / 127, rtol=1e-6)
    want = np.round(blocks / (top / 127)[:, None, :, None]) * (top / 127)[:, None, :, None]
    np.testing.assert_allclose(small.materialize(), want.reshape(shape), atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "fix"),
    [
        (Int(bits=4, group=5), "groups that do: "),
        (Int(bits=4, block=5), "blocks that do: "),
        (MX("e2m1"), "groups that do: "),
        (NVFP4(), "groups that do: "),
    ],
)
def test_what_does_not_divide_raises_and_says_what_would(encoder, fix):
    with pytest.raises(ValueError, match=f"does not divide the .*{fix}"):
        encoder(jnp.ones((12, 4)))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale": "int8"}, ValueError, "scale='int8' is none of"),
        ({"block": 0}, ValueError, "block=0 needs"),
        ({"block": 2, "per": "tensor"}, ValueError, "block=2 needs"),
        ({"block": 1.5}, TypeError, "block=1.5"),
        ({"observer": "mse"}, TypeError, "no observer"),
        ({"symmetric": 1}, TypeError, "symmetric=1"),
    ],
)
def test_options_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        Int(bits=4, **options)


def test_kinds_of_floats_are_refused_by_name():
    with pytest.raises(ValueError, match="kind='e8m0' is none of e4m3"):
        Float("e8m0")
    with pytest.raises(TypeError, match=r"kind=\['e4m3'\] is no str; give one of e4m3"):
        Float(["e4m3"])


def test_encoders_print_as_they_are_typed():
    assert (
        repr(Int(4, group=64, observer=MSE(32))) == "Int(bits=4, group=64, observer=MSE(steps=32))"
    )
    assert repr(NF4(scale=Int(8))) == "NF4(scale=Int(bits=8))"
    assert repr(chain(prune.Magnitude(sparsity=0.5), NVFP4())).endswith(", NVFP4())")
    assert repr(quant.Input(bits=8)) == "Input(bits=8)"


@pytest.mark.parametrize("encoder", [NF4(group=8), Binary(), Int(bits=3, symmetric=False)])
def test_codes_under_a_mask_are_zero_so_that_files_give_every_bit(encoder):
    w, keep = normal(16, 4), normal(16, 4, seed=1) > 0
    small = encoder(jnp.asarray(w), keep=jnp.asarray(keep))
    assert not np.any(np.asarray(small.values.integers())[~keep])
    assert not np.any(np.asarray(small.materialize())[~keep])
