import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models import Axes, quant
from jaxopt_models.quant import MSE, NF4, AbsMax, Entropy, Int, MinMax, MovingAverage, Percentile
from jaxopt_models.quant._entropy import entropy_range

FEW = settings(max_examples=15, deadline=None)


def heavy(*shape, seed=0):
    """Numbers with a few large ones among them."""
    return np.random.default_rng(seed).standard_t(2.5, size=shape).astype(np.float32)


def loss(encoder, w):
    return np.square(w - np.asarray(encoder(jnp.asarray(w)).materialize(), np.float64)).sum(0)


@pytest.mark.parametrize("symmetric", [True, False])
@FEW
@given(seed=st.integers(0, 999), width=st.sampled_from([2, 3, 8]))
def test_the_searched_range_is_never_worse_than_the_whole(symmetric, seed, width):
    w = heavy(40, 5, seed=seed)
    plain = Int(bits=width, symmetric=symmetric)
    searched = Int(bits=width, symmetric=symmetric, observer=MSE(16))
    assert np.all(loss(searched, w) <= loss(plain, w) * (1 + 1e-5))


def test_the_search_finds_the_least_error_of_its_ranges():
    w = heavy(60, 4)
    scale = np.asarray(Int(bits=3, observer=MSE(9, least=0.2))(jnp.asarray(w)).scale)[:, 0]
    for column, got in zip(w.T.astype(np.float64), scale, strict=True):
        tried = np.abs(column).max() * np.linspace(1, 0.2, 9) / 3
        errors = [np.square(column - s * np.clip(np.round(column / s), -3, 3)).sum() for s in tried]
        np.testing.assert_allclose(got, tried[int(np.argmin(errors))], rtol=1e-5)


def test_other_formats_are_searched_alike():
    w = heavy(64, 4)
    assert np.all(loss(NF4(observer=MSE()), w) <= loss(NF4(), w))


def test_errors_weigh_what_the_input_squared_weighs():
    w, x = heavy(16, 3), heavy(200, 16, seed=1)
    x[:, :4] *= 30  # the rows that count
    stats = jom.calibrate(
        lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, [(jnp.asarray(x),)], ["l2"]
    )
    rule = [jom.Rule("w", Int(bits=3, observer=MSE(weighted=True)))]
    small = jom.compress({"w": jnp.asarray(w)}, rule, stats=stats)["w"].materialize()
    plain = Int(bits=3, observer=MSE())(jnp.asarray(w)).materialize()
    importance = np.square(x.astype(np.float64)).sum(0)[:, None]

    def error(q):
        return (importance * np.square(w - np.asarray(q, np.float64))).sum()

    assert error(small) < error(plain)
    with pytest.raises(ValueError, match="needs the statistics"):
        jom.compress({"w": jnp.asarray(w)}, rule)


def test_statistics_of_other_axes_are_refused():
    w = jnp.ones((4, 4))
    stats = jom.calibrate(lambda p, x: x @ p["w"], {"w": w}, [(jnp.ones((2, 4)),)], ["l2"])
    with pytest.raises(ValueError, match="the rule says"):
        rule = jom.Rule("w", Int(bits=3, observer=MSE(weighted=True)), Axes(out=(0,)))
        jom.compress({"w": w}, [rule], stats=stats)


def test_percentiles_are_those_of_numpy():
    w = heavy(1000, 2)
    small = Int(bits=8, observer=Percentile(99.0), symmetric=False)(jnp.asarray(w))
    span = np.percentile(w, 99, axis=0) - np.percentile(w, 1, axis=0)
    np.testing.assert_allclose(np.asarray(small.scale)[:, 0], span / 255, rtol=1e-3)


def test_pruned_entries_have_no_part_in_percentiles():
    w = np.concatenate([np.zeros(900), np.linspace(-1, 1, 101)]).astype(np.float32)[:, None]
    small = Int(bits=8, observer=Percentile(99.0))(jnp.asarray(w), keep=jnp.asarray(w != 0))
    assert np.abs(small.materialize()).max() > 0.95


def divergence(counts, levels):
    """TensorRT's loop, as its slides have it, in float64; the best number of bins."""
    best, at = np.inf, None
    for i in range(levels, 2049):
        p = counts[:i].astype(np.float64).copy()
        q = np.zeros(i)
        bounds = [-(-k * i // levels) for k in range(levels + 1)]
        for a, b in itertools.pairwise(bounds):
            hit = counts[a:b] > 0
            if hit.any():
                q[a:b][hit] = counts[a:b].sum() / hit.sum()
        p[-1] += counts[i:].sum()
        with np.errstate(invalid="ignore"):
            p, q = (smooth(d / max(d.sum(), 1e-38)) for d in (p, q))
        d = (p * np.log(p / q)).sum()
        if d < best - 1e-9:
            best, at = d, i
        if not counts[i:].any():
            break
    return at, best


def smooth(p):
    empty = p <= 0
    share = 1e-4 * empty.sum() / max((~empty).sum(), 1)
    return np.where(empty, 1e-4, np.maximum(p - share, 1e-4))


@pytest.mark.parametrize("levels", [8, 128])
def test_entropy_is_tensorrts_loop(levels):
    x = np.abs(heavy(20000, seed=3))
    counts, edges = np.histogram(x, 2048, (0, x.max()))
    want, _ = divergence(counts, levels)
    choose = jax.jit(entropy_range, static_argnums=2)
    got = choose(np.float32(counts), np.float32(edges[1]), levels)
    assert abs(float(got) / edges[1] - want) <= 2
    assert float(got) < x.max()


def test_inputs_take_every_observer():
    x = heavy(4, 500, 8)
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(8)}
    batches = [(jnp.asarray(b),) for b in x]
    tops = {}
    observers = (MinMax(), AbsMax(), MovingAverage(), Percentile(99.9), MSE(), Entropy())
    encoders = [quant.Input(bits=8, per="static", observer=o) for o in observers]
    what = {name for encoder in encoders for name in encoder.needs}
    stats = jom.calibrate(fn, params, batches, sorted(what))
    for observer, encoder in zip(observers, encoders, strict=True):
        small = jom.compress(params, [jom.Rule("w", encoder)], stats=stats)
        tops[observer] = float(small["w"].scale) * 127
    biggest = np.abs(x).max()
    np.testing.assert_allclose([tops[MinMax()], tops[AbsMax()]], biggest, rtol=1e-6)
    average = np.zeros(2)
    for b in x:
        average = 0.9 * average + 0.1 * np.array([-b.min(), b.max()])
    np.testing.assert_allclose(tops[MovingAverage()], max(average) / (1 - 0.9**4), rtol=1e-5)
    assert np.percentile(np.abs(x), 99.7) < tops[Percentile(99.9)] < biggest / 2
    assert tops[MSE()] < biggest
    assert tops[Entropy()] < biggest


def test_the_observer_of_an_input_sees_each_stacked_tensor():
    x = jnp.asarray(heavy(64, 6))
    params = {"w": jnp.stack([jnp.eye(6), 3 * jnp.eye(6)])}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    recipe = [jom.Rule("w", quant.Input(bits=8, per="static", observer=Percentile(99.0)))]
    stats = jom.calibrate(lambda p, x: fn(p, 3 * fn(p, x)) * 0 + fn(p, x), params, [(x,)], recipe)
    small = jom.compress(params, recipe, stats=stats)["w"]
    assert small.scale.shape == (2,)


def test_inputs_of_a_depthwise_convolution_are_pooled():
    x = heavy(2, 8, 8, 4) * np.float32([1, 1, 1, 50])
    params = {"w": np.ones((3, 3, 1, 4), np.float32)}

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )  # fmt: skip

    found, stats = [], jom.calibrate(fn, params, [(x,)], ["minmax", "histogram"])
    for observer in (MinMax(), Percentile(100.0)):
        recipe = [jom.Rule("w", quant.Input(bits=8, per="static", observer=observer))]
        found.append(float(jom.compress(params, recipe, stats=stats)["w"].scale) * 127)
    np.testing.assert_allclose(found[0], np.abs(x).max(), rtol=1e-6)
    assert found[0] <= found[1] <= found[0] * 1.01  # the edge of the last bin


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Percentile(40), ValueError, "percent=40.0 is not in"),
        (lambda: Percentile("9"), TypeError, "percent='9'"),
        (lambda: MSE(1), ValueError, "steps=1 must be at least 2"),
        (lambda: MSE(least=0.0), ValueError, "must be positive"),
        (lambda: MSE(weighted=1), TypeError, "weighted=1"),
        (lambda: quant.Input(bits=8, observer="x"), TypeError, "observer='x'"),
    ],
)
def test_options_are_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()
