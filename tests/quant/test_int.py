import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxopt_models import Axes, quant
from jaxopt_models._bits import pack_codes, unpack_codes
from jaxopt_models.quant import Int
from jaxopt_models.testing import bits

SHAPE = (12, 5)
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.1, -0.3]
)
TENSORS = hnp.arrays(np.float32, SHAPE, elements=FLOATS)
FEW = settings(max_examples=25, deadline=None)
WIDTHS = [2, 3, 4, 5, 8]


@jax.jit
def parts(leaf):
    return leaf.integers(), leaf.materialize()


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def spread(x, groups):
    """Scales `[columns, groups]` to the shape of a `[rows, columns]` matrix."""
    return np.repeat(np.asarray(x, np.float64).T, SHAPE[0] // groups, axis=0)


@pytest.mark.parametrize("width", WIDTHS)
@FEW
@given(w=TENSORS)
def test_symmetric_codes_are_those_of_numpy(width, w):
    top = 2 ** (width - 1) - 1
    q = Int(bits=width, group=4)(jnp.asarray(w))
    scale = np.abs(w).reshape(3, 4, 5).max(1).T / np.float32(top)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, 1)
    assert bits(q.scale) == bits(scale.astype(np.float32))
    exact = np.asarray(w, np.float64) / spread(scale, 3)
    codes, value = (np.asarray(a, np.float64) for a in parts(q))
    assert np.abs(codes).max() <= top
    assert np.abs(codes - exact).max() <= 0.5 + 1e-5  # the quotient is rounded once before
    assert (np.abs(w - value) <= spread(scale, 3) * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("width", WIDTHS)
@FEW
@given(w=TENSORS)
def test_asymmetric_grids_cover_the_range(width, w):
    q = Int(bits=width, symmetric=False)(jnp.asarray(w))
    codes, value = (np.asarray(a, np.float64) for a in parts(q))
    zero = np.asarray(q.zero_point, int)[:, 0]
    assert codes.min() >= 0
    assert codes.max() <= 2**width - 1
    scale = spread(q.scale, 1)
    np.testing.assert_allclose(value, scale * (codes - zero), rtol=1e-12)  # exact products
    # The largest code is short of the range by the cut of the scale.
    assert (np.abs(w - value) <= scale * 0.505 + 2.0**-15 * np.abs(w)).all()
    assert not np.any(value[w == 0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@FEW
@given(w=TENSORS)
def test_encoding_again_changes_no_bit(symmetric, width, w):
    encoder = Int(bits=width, symmetric=symmetric)
    once = encoder(jnp.asarray(w)).materialize()
    assert bits(encoder(once).materialize()) == bits(once)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [2, 5, 8])
@FEW
@given(seed=st.integers(0, 2**31))
def test_encoding_again_changes_no_bit_of_narrow_types(dtype, width, seed):
    w = jnp.asarray(np.random.default_rng(seed).standard_t(3, size=SHAPE), dtype)
    once = Int(bits=width)(w).materialize()
    assert bits(Int(bits=width)(once).materialize()) == bits(once)


@pytest.mark.parametrize("encoder", [Int(bits=4), Int(bits=3, symmetric=False), Int(bits=8)])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-39, 1e-37, 3.4e38, -3.4e38])
def test_the_ends_of_the_range(encoder, value):
    for w in (jnp.full((4, 3), value), jnp.array([[value], [0.0]]), jnp.array([[value], [-value]])):
        if not encoder.symmetric and abs(value) > 2e38 and w.shape == (2, 1) and float(w[1, 0]):
            continue  # a step may lead beyond float32; see the next test
        got = np.asarray(encoder(w).materialize(), np.float64)
        assert np.isfinite(got).all()
        step = abs(value) / (1 if encoder.symmetric else 2) if abs(value) > 1e-36 else 2e-37
        assert (np.abs(got - np.asarray(w, np.float64)) <= step).all()
        assert not np.any(got[np.asarray(w) == 0])


def test_an_asymmetric_range_beyond_float32_stays_finite():
    w = jnp.array([[3e38], [-3e38], [1e38]])
    got = np.asarray(Int(bits=8, symmetric=False)(w).materialize(), np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, np.asarray(w, np.float64), rtol=0.03)


@pytest.mark.parametrize(
    ("width", "symmetric"),
    [(2, True), (2, False), (3, True), (4, False), (5, True), (6, False), (7, True)]
    + [(8, True), (8, False)]
    + [pytest.param(b, b % 2 == 0, marks=pytest.mark.full) for b in range(3, 8)],
)
def test_storage_is_packed(width, symmetric):
    q = Int(bits=width, symmetric=symmetric)(normal(16, 24))
    native = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8 if symmetric else jnp.uint8}
    if width in native:
        assert q.codes.dtype == native[width]
        assert q.codes.shape == (16, 24)
    else:
        assert (q.codes.dtype, q.codes.shape) == (jnp.uint8, (16, width, 3))
    side = 24 * (32 + (0 if symmetric else 8))
    assert q.storage_bits() == 16 * 24 * width + side


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", range(1, 9))
def test_packed_codes_come_back(width, signed):
    if width == 1 and signed:
        low, high = -1, 0
    else:
        low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)

    @jax.jit
    def again(several):
        packed = [pack_codes(codes, bits=width, signed=signed) for codes in several]
        pairs = zip(packed, several, strict=True)
        return [unpack_codes(p, c.shape[-1], bits=width, signed=signed) for p, c in pairs]

    several = []
    for n in (1, 8, 9):
        codes = np.random.default_rng(n).integers(low, high + 1, size=(2, 3, n)).astype(np.int32)
        codes[0, 0, :1], codes[1, 2, -1:] = low, high
        several.append(codes)
    for got, codes in zip(again(several), several, strict=True):
        np.testing.assert_array_equal(got, codes)


def loop_oracle(w, out, group, top):
    """Scales and codes by a loop over outputs and runs of inputs, in float64."""
    inner = [a for a in range(w.ndim) if a not in out]
    matrix = np.transpose(w, inner + list(out)).reshape(-1, int(np.prod([w.shape[a] for a in out])))
    value, scales = np.zeros_like(matrix), np.zeros((matrix.shape[1], matrix.shape[0] // group))
    for j in range(matrix.shape[1]):
        for g in range(matrix.shape[0] // group):
            run = matrix[g * group : (g + 1) * group, j]
            scales[j, g] = np.abs(run).max() / top
            value[g * group : (g + 1) * group, j] = np.round(run / scales[j, g]) * scales[j, g]
    shape = [w.shape[a] for a in inner] + [w.shape[a] for a in out]
    back = np.argsort(inner + list(out))
    return np.transpose(value.reshape(shape), back), scales


@pytest.mark.parametrize(
    ("shape", "out", "group"),
    [
        ((3, 3, 4, 6), (3,), 12),
        ((3, 3, 4, 6), (3,), 36),
        ((3, 3, 4, 6), (0, 1, 3), 2),
        ((5, 5, 1, 8), (3,), 25),
        ((1, 1, 16, 8), (3,), 4),
        ((8, 4, 6), (1, 2), 4),
        ((8, 4, 6), (0,), 12),
        ((10, 8), (0,), 8),
        ((4, 2, 3), (1,), 3),
        ((6, 4), (), 8),
        ((6, 4), (0, 1), 1),
    ],
)
def test_layouts_against_a_loop(shape, out, group):
    w = normal(*shape)
    q = Int(bits=4, group=group)(w, axes=Axes(out=out))
    value, scales = loop_oracle(np.asarray(w, np.float64), out, group, 7)
    np.testing.assert_allclose(q.materialize(), value, rtol=1e-6, atol=1e-7)
    assert q.scale.shape == (*[shape[a] for a in out], scales.shape[1])
    np.testing.assert_allclose(np.asarray(q.scale).reshape(scales.shape), scales, rtol=1e-6)
    assert q.group == group


def test_one_scale_for_a_tensor_and_for_a_vector():
    w = normal(6, 4)
    assert Int(bits=8, per="tensor")(w).scale.shape == (1,)
    assert Int(bits=8)(w[0]).scale.shape == (1,)
    assert Int(bits=8)(w[0], axes=Axes(out=(0,))).scale.shape == (4, 1)
    assert Int(bits=8)(w[0, 0]).scale.shape == (1,)
    np.testing.assert_allclose(Int(bits=8, per="tensor")(w).scale[0], jnp.abs(w).max() / 127)


def test_a_symmetric_grid_never_uses_the_lowest_code():
    w, widths = jnp.array([[-1.0], [0.99], [-0.999]]), range(2, 9)
    lowest = jax.jit(lambda w: [Int(bits=b)(w).integers().min() for b in widths])(w)
    assert list(map(int, lowest)) == [1 - 2 ** (b - 1) for b in widths]


def test_wrong_options_raise():
    for make, why in [
        (lambda: Int(bits=1), "not a width of 2 to 8"),
        (lambda: Int(bits=9), "not a width of 2 to 8"),
        (lambda: Int(bits=4, per="row"), "neither 'channel' nor 'tensor'"),
        (lambda: Int(bits=4, group=0), "needs to be positive"),
        (lambda: Int(bits=4, group=8, per="tensor"), "needs to be positive and per="),
        (lambda: Int(bits=4, group=5)(jnp.ones((12, 2))), r"\[2, 3, 4, 6, 12\]"),
    ]:
        with pytest.raises(ValueError, match=why):
            make()


def test_a_leaf_is_sliced_like_its_tensor():
    w = normal(3, 8, 6)
    q = Int(bits=3)(w, axes=Axes(stack=1))
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], q)
        assert isinstance(one, quant.Quantized)
        assert bits(one.materialize()) == bits(q.materialize()[i])


def test_widths_and_groups_are_whole_numbers():
    assert Int(bits=np.int64(4)) == Int(bits=4)
    for make in (lambda: Int(bits=4.0), lambda: Int(bits=4, group=2.0), lambda: Int(bits=True)):
        with pytest.raises(TypeError, match="is no whole number"):
            make()
