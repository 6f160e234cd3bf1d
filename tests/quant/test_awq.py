import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, chain, prune
from jaxopt_models.quant import AWQ, MSE, NVFP4, Binary, Int
from jaxopt_models.testing import leaf_bits

FEW = settings(max_examples=12, deadline=None)


def anisotropic(samples, rows, columns, seed=0, spread=2.0):
    """Inputs of which some are much larger, and weights of which some are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, rows)) * np.exp(spread * rng.normal(size=rows))
    w = rng.standard_t(5, size=(rows, columns))
    return x.astype(np.float32), w.astype(np.float32)


def dense(p, x):
    return x @ p["w"]


@functools.cache
def compiled(encoder):
    """One program for all examples of a shape."""
    return jax.jit(lambda w, stats: encoder(w, stats=stats).materialize())


def stats_of(fn, w, x, what=("gram",)):
    return jom.calibrate(fn, {"w": w}, [(x,)], what)["w"]


def error(x, w, new):
    """The error of the output, summed over explicit samples in float64."""
    x, w, new = (np.asarray(a, np.float64) for a in (x, w, new))
    return float(np.sum((x @ (w - new)) ** 2))


@functools.cache
def seen(shape):
    """Statistics of some inputs of a layer of this shape."""
    return stats_of(dense, np.ones(shape, np.float32), np.ones((1, shape[0]), np.float32))


def pair(encoder, x, w):
    """Errors of AWQ and of rounding to the nearest on the same grid."""
    gram = (x.T.astype(np.float64) @ x).astype(np.float32)
    states = {"gram": jnp.asarray(gram), "l2": jnp.diagonal(gram)}
    stats = dataclasses.replace(seen(w.shape), states=seen(w.shape).states | states)
    found = [compiled(e)(w, stats) for e in (encoder, encoder.fmt)]
    return error(x, w, found[0]), error(x, w, found[1])


@pytest.mark.parametrize("fmt", [Int(bits=3, group=16), Binary(group=16)], ids=repr)
@FEW
@given(seed=st.integers(0, 2**16), spread=st.floats(0, 4), dead=st.booleans())
def test_the_error_is_never_above_that_of_the_nearest(fmt, seed, spread, dead):
    x, w = anisotropic(48, 32, 8, seed, spread)
    if dead:
        x[:, seed % 32] = 0
    ours, nearest = pair(AWQ(fmt), x, w)
    assert ours <= nearest * (1 + 1e-4)


@pytest.mark.parametrize(
    "fmt",
    [
        *(Int(bits=3, per="tensor"), Int(bits=4, group=8, block=4), NVFP4(group=8)),
        Int(bits=3, observer=MSE(weighted=True)),
    ],
    ids=repr,
)
def test_every_format_can_be_scaled(fmt):
    x, w = anisotropic(48, 32, 8, 1)
    ours, nearest = pair(AWQ(fmt), x, w)
    assert ours <= nearest * (1 + 1e-4)


def test_at_three_bits_a_third_of_the_error_is_gone():
    for seed in range(3):
        x, w = anisotropic(512, 256, 64, seed)
        ours, nearest = pair(AWQ(Int(bits=3, group=64)), x, w)
        assert ours * 1.3 < nearest


def test_the_exponent_is_that_of_the_least_error():
    # Rounding by hand, for each exponent, in float64 but for the scales that are kept.
    x, w = anisotropic(64, 32, 8, 3, spread=1.0)
    small = AWQ(Int(bits=3), clip=False, steps=10)(w, stats=stats_of(dense, w, x))
    size = np.sqrt((x.astype(np.float64) ** 2).mean(0))
    size /= size.max()
    tried = []
    for r in range(10):
        s = np.maximum(size ** (r / 10), 1e-4)
        s /= np.sqrt(s.max() * s.min())
        scale = (1 / s).astype(np.float16).astype(np.float64)
        v = w / scale[:, None]
        step = np.abs(v).max(0) / 3
        new = np.clip(np.round(v / step), -3, 3) * step * scale[:, None]
        tried.append((error(x, w, new), scale, new))
    least, scale, new = min(tried, key=lambda t: t[0])
    assert least < tried[0][0]
    np.testing.assert_allclose(small.scale, scale, rtol=2e-3)
    np.testing.assert_allclose(small.materialize(), new, rtol=1e-2, atol=1e-2)


def test_ranges_are_clipped_where_that_helps():
    x, w = anisotropic(64, 64, 16, 5, spread=0.0)
    stats = stats_of(dense, w, x)
    fmt = Int(bits=2, group=16)
    whole, clipped = (AWQ(fmt, clip=clip)(w, stats=stats) for clip in (False, True))
    assert error(x, w, clipped.materialize()) < 0.8 * error(x, w, whole.materialize())
    ratio = np.asarray(clipped.values.scale) / np.asarray(whole.values.scale)
    assert 0.4999 < ratio.min() < 0.95 and ratio.max() <= 1


def grouped(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    n = x.shape[-1] // p["w"].shape[2]
    return jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=n
    )


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (3, 3, 1, 8)], ids=str)
def test_convolutions_are_scaled_by_what_their_groups_see(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 6, 8)) * np.exp(1.5 * rng.normal(size=8))
    x, w = x.astype(np.float32), rng.normal(size=shape).astype(np.float32)
    axes = Axes(out=(3,))
    stats = stats_of(grouped, w, x)
    small = AWQ(Int(bits=3))(w, stats=stats, axes=axes)
    assert small.scale.shape == (np.prod(shape[:3]),) and small.check() == []
    miss = [
        np.sum(np.asarray(grouped({"w": new - w}, x), np.float64) ** 2)
        for new in (small.materialize(), Int(bits=3)(w, axes=axes).materialize())
    ]
    assert miss[0] < miss[1]


def test_stacked_layers_are_what_each_is_alone():
    pairs = [anisotropic(32, 24, 8, seed) for seed in range(3)]
    x, w = (np.stack(a) for a in zip(*pairs, strict=True))
    fn = lambda p, x: jax.lax.scan(lambda c, a: (c, a[0] @ a[1]), 0, (x, p["w"]))[1]  # noqa: E731
    stats = stats_of(fn, w, x)
    small = AWQ(Int(bits=3, group=8))(w, stats=stats, axes=stats.axes)
    assert small.shape == w.shape and small.scale.shape == (3, 24)
    whole = np.asarray(small.materialize())
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: np.asarray(a)[i], stats)
        alone = AWQ(Int(bits=3, group=8))(w[i], stats=own)
        np.testing.assert_allclose(alone.materialize(), whole[i], atol=1e-6)


def test_pruned_entries_stay_zero_and_a_file_gives_back_every_bit(tmp_path):
    x, w = anisotropic(64, 32, 8, 2)
    recipe = [Rule("w", chain(prune.Magnitude(sparsity=0.5), AWQ(Int(bits=4, group=8))))]
    stats = jom.calibrate(dense, {"w": w}, [(x,)], recipe)
    small = jom.compress({"w": jnp.asarray(w)}, recipe, stats=stats)
    assert small["w"].kind() == "Masked(Scaled(Quantized))"
    keep = np.asarray(small["w"].keep())
    assert keep.sum() == w.size // 2 and not np.any(np.asarray(small["w"].materialize())[~keep])
    rounded = chain(prune.Magnitude(sparsity=0.5), Int(bits=4, group=8))(w)
    kept = w * keep
    ours, nearest = (error(x, kept, q.materialize()) for q in (small["w"], rounded))
    assert ours < nearest
    path = str(tmp_path / "a.jom")
    jom.save(path, small)
    assert leaf_bits(jom.load(path)) == leaf_bits(small)
    jom.verify(path, {"w": jnp.asarray(w)})


def test_a_layer_that_saw_nothing_is_rounded_to_the_nearest():
    _, w = anisotropic(1, 16, 4)
    stats = stats_of(dense, w, np.zeros((4, 16), np.float32))
    small = AWQ(Int(bits=4))(w, stats=stats)
    np.testing.assert_array_equal(small.scale, 1)
    np.testing.assert_array_equal(small.materialize(), Int(bits=4)(w).materialize())


def test_16_bit_tensors_are_compared_as_they_are_stored():
    x, w = anisotropic(64, 32, 8, 4)
    w = jnp.asarray(w, jnp.bfloat16)
    stats = stats_of(dense, w, x)
    small = AWQ(Int(bits=8), scale="bfloat16")(w, stats=stats)
    assert (small.dtype, small.scale.dtype, small.values.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    ours, nearest = (error(x, w, q.materialize()) for q in (small, Int(bits=8)(w)))
    assert ours <= nearest * (1 + 1e-4)


def test_values_between_two_codes_round_alike_in_every_program():
    # XLA divides in one program and multiplies by the reciprocal in another, if it may.
    x, _ = anisotropic(48, 24, 32)
    w = jnp.asarray(np.random.default_rng(0).integers(-20, 21, (24, 32)) / 1.5, jnp.float32)
    encoder, stats = AWQ(Int(bits=8), clip=False), stats_of(dense, w, x)
    inside = jax.jit(lambda w: encoder(w * 1.5, stats=stats))(w)
    assert leaf_bits(inside) == leaf_bits(encoder(w * 1.5, stats=stats))


def test_weights_of_observers_lower_the_weighted_error():
    x, w = anisotropic(64, 32, 8, 6)
    stats = stats_of(dense, w, x, ["l2"])
    squares = np.asarray(stats.l2, np.float64)[:, None] ** 2
    found = [
        Int(bits=3, observer=MSE(weighted=weighted))(w, stats=stats).materialize()
        for weighted in (True, False)
    ]
    a, b = (np.sum(squares * (np.asarray(q, np.float64) - w) ** 2) for q in found)
    assert a < 0.8 * b


def test_errors_say_what_to_do():
    x, w = anisotropic(8, 16, 4)
    with pytest.raises(TypeError, match="fmt=4 is no format"):
        AWQ(4)
    with pytest.raises(TypeError, match="AWQ: steps"):
        AWQ(Int(bits=4), steps=2.5)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        AWQ(Int(bits=4), steps=0)
    with pytest.raises(TypeError, match="clip=1"):
        AWQ(Int(bits=4), clip=1)
    with pytest.raises(ValueError, match="none of float16, bfloat16, float32"):
        AWQ(Int(bits=4), scale="int8")
    with pytest.raises(ValueError, match="AWQ needs statistics"):
        AWQ(Int(bits=4))(w)
    with pytest.raises(ValueError, match="needs the statistic 'gram'"):
        AWQ(Int(bits=4))(w, stats=stats_of(dense, w, x, ["l2"]))
    stats = stats_of(dense, w, x)
    with pytest.raises(ValueError, match="the rule says"):
        AWQ(Int(bits=4))(w, stats=stats, axes=Axes(out=(0,)))
    broken = stats.gram.at[0, 0].set(jnp.inf)
    stats = {"w": dataclasses.replace(stats, states={**stats.states, "gram": broken})}
    with pytest.raises(ValueError, match="compress: w: AWQ: the gram of the inputs holds NaN or"):
        jom.compress({"w": w}, [Rule("w", AWQ(Int(bits=4)))], stats=stats)
    recipe = jom.recipe_to_json([Rule("w", AWQ(Int(bits=4, group=8), clip=False))])
    assert jom.recipe_from_json(recipe)[0].encoder == AWQ(Int(bits=4, group=8), clip=False)
