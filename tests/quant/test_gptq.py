"""GPTQ against the elimination it stands for, without a Cholesky factor, in NumPy and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant
from jaxopt_models.quant._solver import factor
from jaxopt_models.testing import leaf_bits


def inputs(rows, seed=0, samples=400):
    """Inputs that depend on each other, of different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rows, rows)) / np.sqrt(rows)
    x = rng.normal(size=(samples, rows)) @ mix * np.exp(rng.normal(size=rows) / 2)
    return x.astype(np.float32)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(params, x):
    return x @ params["w"]


def conv(groups):
    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return fn


def solved(fn, w, x, encoder):
    params, recipe = {"w": w}, [jom.Rule("w", encoder)]
    stats = jom.calibrate(fn, params, [(x,)], recipe)
    return jom.compress(params, recipe, stats=stats)["w"], stats["w"]


@functools.cache
def layer():
    """A dense layer: its weights, inputs and statistics."""
    w, x = normal(32, 16), inputs(32)
    return w, x, jom.calibrate(dense, {"w": w}, [(x,)], ["gram"])["w"]


def output_errors(fn, w, leaf, x):
    miss = np.asarray(fn({"w": w - np.asarray(leaf.materialize())}, x), np.float64)
    return np.sum(np.square(miss).reshape(-1, miss.shape[-1]), axis=0)


@functools.partial(jax.jit, static_argnames=("fmt", "group"))
def fitted(fmt, w, group=None):
    """Grids for runs of a matrix."""
    return fmt.fit(w.reshape(-1, group or len(w), w.shape[1]))


def oracle(w, gram, grid, top, *, order, group, refit=None):
    """Optimal brain quantization, row by row: the inverse loses the row that was rounded."""
    w, h = np.asarray(w, np.float64).copy(), np.asarray(gram, np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h)))
    codes, scale = np.zeros(w.shape), np.asarray(grid, np.float64).copy()
    rows = np.argsort(-np.diag(h), kind="stable") if order else np.arange(len(h))
    for i in rows:
        g = i // group
        if refit and i % group == 0:
            scale[g] = np.abs(w[i : i + group]).max(0) / top
        codes[i] = np.clip(np.round(w[i] / scale[g]), -top, top)
        error = (w[i] - codes[i] * scale[g]) / inverse[i, i]
        w[i] = codes[i] * scale[g]
        column = inverse[:, i].copy()
        column[i] = 0
        w -= np.outer(column, error)
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1
    return codes, scale


@jax.jit
def integers(leaf):
    return leaf.integers()


@pytest.mark.parametrize(
    ("order", "group"),
    [("activation", 16), (None, 96), pytest.param(None, 16, marks=pytest.mark.full)],
)
def test_codes_are_those_of_elimination_by_the_inverse(order, group):
    w, x, fmt = normal(96, 48), inputs(96), quant.Int(bits=3)
    grid = fitted(fmt, w, group)
    codes, _ = quant.gptq(w, x.T @ x, fmt, grid, order=order, block=40)
    want, _ = oracle(w, x.T @ x, grid.scale, 3, order=order, group=group)
    assert np.mean(np.asarray(codes) == want) >= 0.999


def test_groups_are_chosen_anew_when_their_turn_comes():
    w, x, fmt = normal(96, 48), inputs(96), quant.Int(bits=3, group=24)
    grid = fitted(fmt, w, 24)
    codes, new = quant.gptq(w, x.T @ x, fmt, grid, order=None, block=16, regroup=True)
    want, scale = oracle(w, x.T @ x, grid.scale, 3, order=None, group=24, refit=True)
    assert np.mean(np.asarray(codes) == want) >= 0.999
    np.testing.assert_allclose(new.scale, scale, rtol=1e-3)

    w, x, stats = layer()
    leaf = quant.GPTQ(quant.Int(bits=3, group=8), order=None, regroup=True)(w, stats=stats)
    near = quant.Int(bits=3, group=8)(w)
    assert not leaf.check()
    got, want = (output_errors(dense, w, a, x) for a in (leaf, near))
    assert (got <= want * (1 + 1e-4)).all()
    assert got.sum() < 0.8 * want.sum()


FORMATS = [
    quant.Int(bits=3, group=8, block=4, scale="power_of_two"),
    quant.Int(bits=2, symmetric=False, per="tensor"),
    quant.NF4(group=16, scale=quant.Int(bits=8, symmetric=False)),
    quant.Binary(),
    codebook.KMeans(bits=2, per="channel"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_every_format_is_better_than_nearest_in_sum_and_no_worse_in_any_output(fmt):
    w, x, stats = layer()
    leaf, near = quant.GPTQ(fmt)(w, stats=stats), fmt(w)
    assert type(leaf) is type(near)
    assert jax.tree.structure(leaf) == jax.tree.structure(near)
    assert not leaf.check()
    got, want = (output_errors(dense, w, a, x) for a in (leaf, near))
    assert (got <= want * (1 + 1e-4)).all()
    assert got.sum() < 0.8 * want.sum()


def test_a_mask_is_kept_and_its_error_made_up_for():
    w, x, stats = layer()
    pruned = prune.Magnitude(sparsity=0.5)
    leaf = jom.chain(pruned, quant.GPTQ(quant.Int(bits=4)))(w, stats=stats)
    near = jom.chain(pruned, quant.Int(bits=4))(w)
    assert leaf.kind() == near.kind() == "Masked(Quantized)"
    assert np.array_equal(leaf.keep(), near.keep())
    keep = np.asarray(near.keep())
    fixed = np.where(keep, w, 0)
    got, want = (output_errors(dense, fixed, a, x).sum() for a in (leaf, near))
    assert got < 0.7 * want
    # The core takes weights that are not zero yet, and makes up for dropping them, too.
    fmt, h = quant.Int(bits=8), x.T @ x
    grid = fitted(fmt, w)
    codes, _ = quant.gptq(w, h, fmt, grid, keep=keep)
    miss = w - np.where(keep, codes * np.asarray(grid.scale), 0)
    drop = w - fixed
    assert np.sum(miss * (h @ miss)) < 0.9 * np.sum(drop * (h @ drop))


@pytest.mark.parametrize(("groups", "shape"), [(4, (3, 3, 2, 8)), (8, (3, 3, 1, 8))])
def test_outputs_of_a_grouped_convolution_see_their_own_inputs(groups, shape):
    fn, w = conv(groups), normal(*shape)
    x = normal(4, 8, 8, 8, seed=2) @ normal(8, 8, seed=3)
    encoder = quant.GPTQ(quant.Int(bits=3, group=9))
    leaf, stats = solved(fn, w, x, encoder)
    near = output_errors(fn, w, quant.Int(bits=3, group=9)(w), x)
    assert (output_errors(fn, w, leaf, x) <= near * (1 + 1e-4)).all()
    each, grams, codes = 8 // groups, np.asarray(stats.gram), np.asarray(integers(leaf))

    @jax.jit
    def one_group(own, gram):
        grid = encoder.fmt.fit(own.reshape(-1, 9, each))
        alone, _ = quant.gptq(own, gram, encoder.fmt, grid)
        return alone, encoder.fmt(own).integers()

    for g in range(groups):
        own, got = (a[..., g * each : (g + 1) * each].reshape(-1, each) for a in (w, codes))
        alone, nearest = map(np.asarray, one_group(own, grams[g]))
        kept = np.all(got == alone, axis=0)
        assert all(kept | np.all(got == nearest, axis=0))
        assert groups == 8 or kept.any()


def test_each_layer_of_a_stack_has_its_own_inputs():
    w, x = normal(3, 16, 16) / 4, inputs(16)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    encoder = quant.GPTQ(quant.Int(bits=3), order=None)
    leaf, stats = solved(fn, w, x, encoder)
    for i, codes in enumerate(np.asarray(integers(leaf))):
        states = jax.tree.map(lambda a, i=i: np.asarray(a)[i], stats.states)
        own = jom.Stats(states, jom.Axes(out=(1,)))
        assert np.mean(codes == integers(encoder(w[i], stats=own))) >= 0.99


def test_inputs_that_were_never_seen_are_rounded_to_the_nearest():
    w, x, stats = layer()
    x = x * (np.abs(np.arange(32) - 6.5) > 2)
    fmt, gram = quant.Int(bits=3), x.T @ x
    near = np.asarray(integers(fmt(w)))

    def codes(gram):
        known = dataclasses.replace(stats, states={**stats.states, "gram": gram})
        return np.asarray(integers(quant.GPTQ(fmt)(w, stats=known)))

    assert np.array_equal(codes(gram)[5:9], near[5:9])
    # The others are those of a layer without.
    live = np.r_[0:5, 9:32]
    grid = fitted(fmt, w)
    want, _ = oracle(w[live], gram[live][:, live], grid.scale, 3, order=True, group=32)
    got, _ = quant.gptq(w, gram, fmt, grid)
    assert np.mean(np.asarray(got)[live] == want) >= 0.999
    # A layer that nothing reached at all, as an expert that was not chosen.
    assert np.array_equal(codes(0 * gram), near)


def test_damping_grows_until_there_is_a_factor():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    h = ((turn * np.r_[-0.5, np.ones(11)]) @ turn.T).astype(np.float32)
    once = jax.jit(factor)
    low = np.asarray(once(h, 0.01), np.float64)
    added = np.mean(np.diag(h)) * np.eye(12)
    np.testing.assert_allclose(low @ low.T - h, added, atol=1e-5)  # 0.01, 0.1, then 1
    singular = np.ones((12, 12), np.float32)
    assert np.isfinite(once(singular, 0.0)).all()
    assert not np.isfinite(once(singular * np.nan, 0.0)).all()  # and it ends
    w, fmt = normal(12, 3), quant.Int(bits=4)
    codes, _ = quant.gptq(w, singular, fmt, fitted(fmt, w), damp=0.0)
    assert np.abs(codes).max() <= 7


def test_an_observer_takes_the_diagonal_of_the_gram():
    w, x = normal(32, 16), inputs(32)
    fmt = quant.Int(bits=3, observer=quant.MSE(weighted=True))
    encoder = quant.GPTQ(fmt)
    assert encoder.needs == ("gram",)
    stats = jom.calibrate(dense, {"w": w}, [(x,)], ["gram", "l2"])["w"]
    alone = {n: state for n, state in stats.states.items() if n != "l2"}
    leaf = encoder(w, stats=dataclasses.replace(stats, states=alone))
    near = fmt(w, stats=stats)
    np.testing.assert_allclose(leaf.scale, near.scale, rtol=1e-6)


def test_tensors_of_sixteen_bits_and_compiled_programs():
    w, _, stats = layer()
    w, encoder = w.astype(jnp.bfloat16), quant.GPTQ(quant.Int(bits=3))
    leaf = encoder(w, stats=stats)
    assert leaf.materialize().dtype == jnp.bfloat16
    inside = jax.jit(lambda w, stats: encoder(w, stats=stats))(w, stats)
    assert leaf_bits(inside) == leaf_bits(leaf)


def test_what_does_not_fit_raises_with_the_path():
    w, x, stats = layer()
    encoder, stats = quant.GPTQ(quant.Int(bits=3)), {"w": stats}
    recipe = [jom.Rule("w", encoder)]
    with pytest.raises(ValueError, match=r"compress: w: .*needs the statistics \['gram'\]"):
        jom.compress({"w": w}, recipe)
    with pytest.raises(ValueError, match="needs statistics; calibrate"):
        encoder(w)
    with pytest.raises(ValueError, match="needs the statistic 'gram'"):
        encoder(w, stats=jom.calibrate(dense, {"w": w}, [(x,)], ["l2"])["w"])
    gram = np.asarray(stats["w"].gram) * np.where(np.arange(32) == 3, np.nan, 1)
    broken = dataclasses.replace(stats["w"], states={**stats["w"].states, "gram": gram})
    with pytest.raises(ValueError, match="compress: w: GPTQ: the gram of the inputs holds NaN"):
        jom.compress({"w": w}, recipe, stats={"w": broken})
    with pytest.raises(ValueError, match="compress: w: 1 of 512 entries are NaN"):
        broken = np.where(np.arange(512).reshape(32, 16) == 9, np.nan, w)
        jom.compress({"w": broken}, recipe, stats=stats)
    with pytest.raises(ValueError, match="out axes"):
        jom.compress({"w": w}, [jom.Rule("w", encoder, jom.Axes(out=(0,)))], stats=stats)


@pytest.mark.parametrize("solve", [quant.gptq, quant.adaround])
def test_a_gram_that_does_not_fit_is_named(solve):
    w, fmt = normal(12, 3), quant.Int(bits=4)
    grid, name = fitted(fmt, w), solve.__name__
    with pytest.raises(ValueError, match=rf"{name}: gram has shape \(11, 11\) for w of .*\(12, 3"):
        solve(w, np.eye(11, dtype=np.float32), fmt, grid)
    with pytest.raises(ValueError, match=f"{name}: gram holds NaN or Inf in 12 entries"):
        solve(w, np.diag(np.full(12, np.nan, np.float32)), fmt, grid)
    if solve is quant.gptq:
        with pytest.raises(ValueError, match="gptq: block=0 must be at least 1"):
            solve(w, np.eye(12, dtype=np.float32), fmt, grid, block=0)


STRANGE = [quant.GPTQ(quant.Int(3)), quant.AWQ(quant.Int(3)), quant.Input(8, per="static")]
STRANGE += [quant.Int(3, observer=quant.MSE(weighted=True)), quant.Hadamard(STRANGE[0])]


@pytest.mark.parametrize("encoder", STRANGE, ids=repr)
def test_statistics_of_another_parameter_are_refused(encoder):
    params = {"a": normal(8, 4), "b": normal(16, 4), "v": normal(3, 8, 4)}

    def fn(p, x):
        first = x[:, :8]
        return x @ p["b"], first @ p["a"], jax.lax.scan(lambda x, v: (x, x @ v), first, p["v"])[1]

    stats = jom.calibrate(fn, params, [(normal(6, 16),)], ["gram", "l2", "minmax"])
    recipe, key = [jom.Rule("a", encoder)], jax.random.key(0)
    with pytest.raises(ValueError, match=r"a: .* of 16 inputs, it has 8; calibrate this model"):
        jom.compress(params, recipe, stats={"a": stats["b"]}, key=key)
    with pytest.raises(ValueError, match=r"a: .*stack=1\), its shape is \(8, 4\); calibrate this"):
        jom.compress(params, recipe, stats={"a": stats["v"]}, key=key)
    stacked = [jom.Rule("v", encoder, jom.Axes(stack=1))]
    with pytest.raises(ValueError, match=r"v: .* of a stack \(\), it has \(3,\) .* this model"):
        jom.compress(params, stacked, stats={"v": stats["a"]}, key=key)


def test_options():
    with pytest.raises(TypeError, match="is no format"):
        quant.GPTQ(prune.Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match="draws its start"):
        quant.GPTQ(codebook.KMeans(bits=2, start="random"))
    with pytest.raises(ValueError, match="must not be negative"):
        quant.GPTQ(quant.NF4(), damp=-1)
    with pytest.raises(ValueError, match="order='size'"):
        quant.GPTQ(quant.NF4(), order="size")
    with pytest.raises(ValueError, match="needs order=None"):
        quant.GPTQ(quant.Int(bits=4, group=8), regroup=True)
    with pytest.raises(ValueError, match="needs groups of one output"):
        quant.GPTQ(quant.NVFP4(), order=None, regroup=True)
    with pytest.raises(TypeError, match="regroup=1"):
        quant.GPTQ(quant.NF4(), order=None, regroup=1)
    recipe = [jom.Rule(".*", quant.GPTQ(codebook.KMeans(bits=3), damp=0.1))]
    assert jom.recipe_from_json(jom.recipe_to_json(recipe)) == recipe
