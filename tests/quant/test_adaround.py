"""AdaRound against trying every way to round, in NumPy and float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant
from jaxopt_models.quant._adaround import neighbours, one_by_one


def normal(*shape, seed=1):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def dense(params, x):
    return x @ params["w"]


@functools.cache
def layer():
    """A dense layer: its weights, inputs that depend on each other, and statistics."""
    w, x = normal(32, 16), normal(400, 8, seed=2) @ normal(8, 32, seed=3) + normal(400, 32, seed=4)
    return w, x, jom.calibrate(dense, {"w": w}, [(x,)], ["gram"])["w"]


def errors(w, leaf, x):
    miss = np.asarray(x, np.float64) @ (w - np.asarray(leaf.materialize(), np.float64))
    return np.sum(np.square(miss), axis=0)


FORMATS = [
    quant.Int(bits=3, group=8),
    quant.Float("e2m1"),
    quant.Ternary(),
    codebook.KMeans(bits=2, per="channel"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_neighbours_are_the_values_on_both_sides(fmt):
    fmt, w = quant.AdaRound(fmt).format, normal(32, 16)

    @jax.jit
    def found(w, tried):
        grid = fmt.fit(fmt.runs(0.8 * w, fmt.matrix(w, jom.Axes(out=(1,)))))
        spread = jax.tree.map(lambda a: jnp.repeat(a, 32 // len(a), axis=0), grid)
        every = jax.vmap(lambda v: fmt.round(jnp.full_like(w, v), spread))(tried)
        return every, [fmt.values(c, spread) for c in neighbours(w, fmt, grid)]

    every, three = found(w, jnp.linspace(-4, 4, 1601))
    w, every, (low, high, near) = np.asarray(w), np.asarray(every), map(np.asarray, three)
    below = np.max(np.where(every <= w, every, -np.inf), axis=0)
    above = np.min(np.where(every >= w, every, np.inf), axis=0)
    assert np.array_equal(low, np.where(np.isinf(below), above, below))
    assert np.array_equal(high, np.where(np.isinf(above), below, above))
    assert np.all((near == low) | (near == high))


def test_a_column_is_nearly_as_good_as_the_best_of_all_ways_to_round():
    x, w = normal(100, 4, seed=5) @ normal(4, 12, seed=6), normal(12, 6, seed=7)
    fmt, h = quant.Int(bits=3), x.T @ x
    grid = jax.jit(fmt.fit)(w[None])
    codes = np.asarray(quant.adaround(w, h, fmt, grid))
    scale, h = np.asarray(grid.scale, np.float64), np.asarray(h, np.float64)
    exact = np.asarray(w, np.float64)
    down = np.clip(np.floor(exact / scale), -3, 2)
    assert np.all((codes == down) | (codes == down + 1))
    ways = np.array(list(itertools.product([0, 1], repeat=12)))

    def error(q, column):
        miss = exact[:, column] - q * scale[0, column]
        return np.sum(miss @ h * miss, axis=-1)

    near = np.round(exact / scale)
    got, near, best = (
        np.array([np.min(error(q(c), c)) for c in range(6)])
        for q in (lambda c: codes[:, c], lambda c: near[:, c], lambda c: down[:, c] + ways)
    )
    assert (got <= near).all()
    assert np.sum(got - best) < 0.25 * np.sum(near - best)


def test_sides_are_changed_one_by_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 20)) @ rng.normal(size=(20, 20))
    h, step = x.T @ x, rng.random((20, 5))
    above, up = step * rng.random((20, 5)), rng.random((20, 5)) < 0.5
    given = [jnp.asarray(a, jnp.float32) for a in (above, step)]
    got = one_by_one(*given, jnp.asarray(up), jnp.asarray(h, jnp.float32), block=7)
    want = up.copy()
    for c in range(5):
        for i in range(20):
            options = []
            for side in (want[i, c], not want[i, c]):
                want[i, c] = side
                d = above[:, c] - np.where(want[:, c], step[:, c], 0)
                options.append((d @ h @ d, side))
            want[i, c] = options[0][1] if options[0][0] <= options[1][0] else options[1][1]
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "fmt", [quant.Int(bits=3, group=8), quant.NF4(group=16), codebook.KMeans(bits=3)], ids=repr
)
def test_no_output_is_worse_than_nearest(fmt):
    w, x, stats = layer()
    leaf, near = quant.AdaRound(fmt, steps=400)(w, stats=stats), fmt(w)
    assert jax.tree.structure(leaf) == jax.tree.structure(near)
    got, want = (errors(w, a, x) for a in (leaf, near))
    assert (got <= want * (1 + 1e-4)).all()
    assert got.sum() < 0.5 * want.sum()


def test_a_mask_is_kept_and_dead_inputs_are_rounded_to_the_nearest():
    w, x, _ = layer()
    x = x * (np.arange(32) != 3)
    fmt = quant.Int(bits=4)
    encoder = jom.chain(prune.Magnitude(sparsity=0.5), quant.AdaRound(fmt, steps=400))
    stats = jom.calibrate(dense, {"w": w}, [(x,)], ["gram"])["w"]
    leaf, near = encoder(w, stats=stats), jom.chain(prune.Magnitude(sparsity=0.5), fmt)(w)
    assert leaf.kind() == "Masked(Quantized)"
    assert np.array_equal(leaf.keep(), near.keep())
    assert np.array_equal(leaf.materialize()[3], near.materialize()[3])
    fixed = np.where(near.keep(), w, 0)
    assert errors(fixed, leaf, x).sum() < 0.7 * errors(fixed, near, x).sum()


def test_outputs_of_a_depthwise_convolution_see_their_own_inputs():
    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=8
        )

    w, x = normal(3, 3, 1, 8), normal(4, 8, 8, 8, seed=2).cumsum(axis=1)
    stats = jom.calibrate(fn, {"w": w}, [(x,)], ["gram"])["w"]
    leaf = quant.AdaRound(quant.Int(bits=3), steps=400)(w, stats=stats)
    near = quant.Int(bits=3)(w)
    got, want = (
        np.square(fn({"w": w - np.asarray(a.materialize())}, x)).sum(axis=(0, 1, 2))
        for a in (leaf, near)
    )
    assert (got <= want * (1 + 1e-4)).all()
    assert got.sum() < 0.8 * want.sum()


def test_what_does_not_fit_raises():
    w, _, stats = layer()
    encoder = quant.AdaRound(quant.Int(bits=3))
    with pytest.raises(ValueError, match="AdaRound needs statistics; calibrate"):
        encoder(w)
    broken = jom.Stats({**stats.states, "gram": np.full((32, 32), np.inf)}, stats.axes)
    with pytest.raises(ValueError, match="AdaRound: the gram of the inputs holds NaN or Inf"):
        encoder(w, stats=broken)
    with pytest.raises(ValueError, match="AdaRound: steps=0"):
        quant.AdaRound(quant.Int(bits=3), steps=0)
    with pytest.raises(ValueError, match=r"AdaRound: rate=0\.0 must be positive"):
        quant.AdaRound(quant.Int(bits=3), rate=0)
    with pytest.raises(TypeError, match="AdaRound: warm="):
        quant.AdaRound(quant.Int(bits=3), warm="none")
    recipe = [jom.Rule(".*", quant.AdaRound(quant.NF4(), steps=10))]
    assert jom.recipe_from_json(jom.recipe_to_json(recipe)) == recipe
