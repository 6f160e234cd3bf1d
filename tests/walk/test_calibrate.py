"""Statistics equal those of the concatenated data, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import quant

ALL = ("absmax", "minmax", "l2", "mean", "histogram", "gram")
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def oracle(x):
    """The statistics of rows ``x``, in float64."""
    x = np.asarray(x, np.float64)
    top = np.abs(x).max(initial=0)
    e = int(np.frexp(np.float32(top))[1]) if top else -125
    return {
        "absmax": np.abs(x).max(0, initial=0),
        "minmax": (x.min(0, initial=np.inf), x.max(0, initial=-np.inf)),
        "l2": np.sqrt((x**2).sum(0)),
        "mean": x.sum(0) / max(len(x), 1),
        "gram": x.T @ x,
        "histogram": np.histogram(x, bins=4096, range=(-(2.0**e), 2.0**e))[0],
    }


def check(stats, x, rtol=1e-5, moved=4):
    want = oracle(x)
    scale = np.abs(np.asarray(x)).max(initial=1)
    for name in stats.names:
        got, exact = getattr(stats, name), want[name]
        if name == "histogram":
            # A value computed in float32 may fall beside the edge that the float64 one is on.
            assert np.abs(got.counts - exact).sum() <= moved and got.counts.sum() == exact.sum()
            continue
        atol = rtol * scale**2 * len(x) if name == "gram" else rtol * scale
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)
    assert stats.count == len(x)


def test_many_batches_are_the_concatenated_one_and_compile_once():
    params = {"w": normal(12, 5)}
    traced = []

    def fn(p, x):
        traced.append(1)
        return x @ p["w"]

    scales = np.exp(RNG.normal(size=64))
    batches = [(s * normal(50, 12) + 0.3,) for s in scales]
    stats = jom.calibrate(fn, params, iter(batches), ALL)
    check(stats["w"], np.concatenate([x for (x,) in batches]), moved=0)
    assert len(traced) == 2  # once for the shapes of the statistics, once for all batches
    assert stats["w"].axes == jom.Axes(out=(1,))


def test_one_device_and_eight():
    params = {"w": normal(12, 5), "b": normal(5, 5)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["b"]

    batches = [(normal(16, 12),) for _ in range(3)]
    one = jom.calibrate(fn, params, batches, ALL)
    place = NamedSharding(mesh, P("data"))
    eight = jom.calibrate(fn, params, [(jax.device_put(x, place),) for (x,) in batches], ALL)
    check(eight["w"], np.concatenate([x for (x,) in batches]))
    for path in params:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            eight[path].states,
            one[path].states,
        )


def forward(v, x):
    seen = []
    for w in np.asarray(v, np.float64):
        seen.append(x)
        x = np.tanh(x @ w)
    return seen


def looped(step):
    return {
        "scan": lambda p, x: lax.scan(lambda h, w: (step(h, w), None), x, p["v"])[0],
        "remat in scan": lambda p, x: lax.scan(
            jax.checkpoint(lambda h, w: (step(h, w), None)), x, p["v"]
        )[0],
        "two scans": lambda p, x: lax.scan(
            lambda h, ws: lax.scan(lambda h, w: (step(h, w), None), h, ws),
            x,
            p["v"].reshape(2, 2, 6, 6),
        )[0],
        "fori": lambda p, x: lax.fori_loop(0, 4, lambda i, h: step(h, p["v"][i]), x),
        "while": lambda p, x: lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, step(s[1], p["v"][s[0]])), (0, x)
        )[1],
        "unrolled": lambda p, x: step(
            step(step(step(x, p["v"][0]), *p["v"][1:2]), p["v"][2]), p["v"][3]
        ),
        "halves": lambda p, x: lax.scan(
            lambda h, w: (step(h, w), None),
            lax.scan(lambda h, w: (step(h, w), None), x, p["v"][:2])[0],
            p["v"][2:],
        )[0],
        "custom rule": lambda p, x: lax.scan(lambda h, w: (ruled(h, w), None), x, p["v"])[0],
    }


def plain(h, w):
    return jnp.tanh(h @ w)


@jax.custom_vjp
def ruled(h, w):
    return plain(h, w)


ruled.defvjp(lambda h, w: (plain(h, w), None), lambda r, g: (g, jnp.zeros((6, 6))))


@pytest.mark.parametrize("name", looped(plain))
def test_each_layer_of_a_stack_has_its_own(name):
    params, x = {"v": normal(4, 6, 6) / 3}, normal(7, 6)
    stats = jom.calibrate(looped(plain)[name], params, [(x,)], ALL)["v"]
    assert stats.axes == jom.Axes(out=(2,), stack=1)
    for i, seen in enumerate(forward(params["v"], x)):
        layer = jax.tree.map(lambda a, i=i: a[i], stats)
        check(layer, seen)


def test_a_branch_that_is_not_taken_counts_nothing():
    params, x = {"a": normal(6, 3), "b": normal(6, 3)}, normal(4, 6)
    stats = jom.calibrate(
        lambda p, x: lax.cond(x[0, 0] > 99, lambda: x @ p["a"], lambda: x @ p["b"]),
        params,
        [(x,)],
        ALL,
    )
    check(stats["a"], np.zeros((0, 6)))
    check(stats["b"], x)
    assert "not all were hit" in str(stats)


def test_a_loop_counts_every_iteration():
    params, x = {"w": normal(6, 6)}, normal(4, 6)
    stats = jom.calibrate(
        lambda p, x: lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, plain(s[1], p["w"])), (0, x)
        )[1],
        params,
        [(x,)],
        ALL,
    )
    check(stats["w"], np.concatenate(forward([params["w"]] * 3, x)))


def tensor_parallel(a, b, v, x):
    x = lax.scan(lambda h, w: (plain(h, w), None), x, v)[0]
    return lax.psum(jnp.tanh(x @ a) @ b, "model")


def test_shard_map():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = (P(None, "model"), P("model"), P(), P("data"))
    f = jax.shard_map(tensor_parallel, mesh=mesh, in_specs=specs, out_specs=P("data"))
    params, x = {"a": normal(6, 8) / 3, "b": normal(8, 4), "v": normal(3, 6, 6) / 3}, normal(16, 6)
    stats = jom.calibrate(lambda p, x: f(p["a"], p["b"], p["v"], x), params, [(x,)], ALL)
    *seen, last = forward([*params["v"], np.zeros((6, 6))], x)
    for i, s in enumerate(seen):
        check(jax.tree.map(lambda a, i=i: a[i], stats["v"]), s)
    check(stats["a"], last)
    check(stats["b"], np.tanh(last @ np.asarray(params["a"], np.float64)))


def test_compressed_parameters_see_what_their_layer_sees():
    params = {"a": normal(6, 6), "b": normal(6, 3)}
    # Small, as 1.0 and what is just below it have histograms of different ranges.
    x = normal(9, 6) / 16

    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    small = jom.compress(params, [jom.Rule("a", quant.Int(bits=3))])
    stats = jom.calibrate(fn, small, [(x,)], ALL)
    check(stats["a"], x)
    check(stats["b"], np.tanh(x @ np.asarray(small["a"].materialize(), np.float64)))


def test_a_tied_embedding_has_both_uses():
    params, tokens = {"e": normal(10, 4)}, jnp.array([[1, 2, 2]])
    stats = jom.calibrate(lambda p, t: p["e"][t] @ p["e"].T, params, [(tokens,)], ALL)["e"]
    check(stats, params["e"][tokens[0]])
    assert stats.axes == jom.Axes(out=(0,))
    [lookup] = stats.others
    check(lookup, np.eye(10)[np.asarray(tokens[0])])
    assert lookup.axes == jom.Axes(out=(1,))


def test_what_cannot_be_had_is_listed():
    params = {"w": normal(6, 4), "b": normal(4), "unused": normal(3, 3), "long": normal(9, 4)}
    stats = jom.calibrate(
        lambda p, x, y: x @ p["w"] + p["b"][None] + y @ p["long"],
        params,
        [(normal(5, 6), normal(5, 9))],
        ("gram", "absmax"),
        gram_rows=8,
    )
    assert sorted(stats) == ["long", "w"]
    assert stats["long"].names == ("absmax",)
    assert stats.missing == {
        "b": "it is added",
        "unused": "it is not in the program",
        "long": "gram of 9 rows: raise gram_rows",
    }


def test_a_recipe_gets_what_its_encoders_need_and_compress_uses_it():
    params, x = {"w": normal(6, 4), "v": normal(4, 3)}, normal(5, 6)
    recipe = [jom.Rule("w", jom.chain(quant.Int(bits=8), quant.Input(bits=8, per="static")))]

    def fn(p, x):
        return x @ p["w"] @ p["v"]

    stats = jom.calibrate(fn, params, [(x,)], recipe)
    assert list(stats) == ["w"] and stats["w"].names == ("minmax",)
    small = jom.compress(params, recipe, stats=stats)
    np.testing.assert_allclose(small["w"].scale, jnp.abs(x).max() / 127, rtol=1e-6)
    with pytest.raises(ValueError, match=r"calibrate: the recipe needs .* v: "):
        recipe = [jom.Rule("v", quant.Input(bits=8, per="static"))]
        jom.calibrate(lambda p, x: x @ p["w"], params, [(x,)], recipe)
    with pytest.raises(ValueError, match="no encoder of this recipe needs statistics"):
        jom.calibrate(fn, params, [(x,)], [jom.Rule("w", quant.Int(bits=8))])


def test_counts_are_exact_beyond_float32():
    params = {"w": normal(2, 2)}
    million = (jnp.ones((1 << 20, 2)),)
    stats = jom.calibrate(lambda p, x: x @ p["w"], params, [million] * 17, ["histogram", "mean"])
    one = jom.calibrate(lambda p, x: x @ p["w"], params, [(jnp.ones((3, 2)),)], ["histogram"])
    tally = stats["w"].states["count"].plus(one["w"].states["count"])
    assert int(tally.high) * 2**20 + int(tally.low) == 17 * 2**20 + 3
    assert stats["w"].histogram.counts.max() == 2 * 17 * 2**20
    np.testing.assert_array_equal(stats["w"].mean, [1, 1])


def test_a_generator_with_a_bar_and_batches_of_other_shapes(capsys):
    params, seen = {"w": normal(6, 3)}, []

    def batches():
        for n in (4, 4, 3):
            assert len(seen) <= 1  # none is kept
            seen[:] = [n]
            yield (normal(n, 6),)

    stats = jom.calibrate(lambda p, x: x @ p["w"], params, batches(), progress=True)
    assert stats["w"].count == 11


def test_statistics_are_pytrees():
    params, tokens = {"e": normal(10, 4)}, jnp.array([[1, 2, 2]])
    stats = jom.calibrate(lambda p, t: p["e"][t] @ p["e"].T, params, [(tokens,)])["e"]
    twice = jax.tree.map(jnp.add, stats, stats)
    np.testing.assert_array_equal(twice.absmax, 2 * stats.absmax)
    assert len(twice.others) == 1


def test_statistics_by_path_go_through_jit():
    params, recipe = (
        {"w": normal(6, 3), "b": normal(1, 3)},
        [jom.Rule("w", quant.GPTQ(quant.Int(4)))],
    )
    stats = jom.calibrate(lambda p, x: x @ p["w"] + p["b"], params, [(normal(9, 6),)], recipe)
    small = jax.jit(lambda p, s: jom.compress(p, recipe, stats=s))(params, stats)
    want = jom.compress(params, recipe, stats=stats)
    np.testing.assert_array_equal(small["w"].integers(), want["w"].integers())
    same = jax.tree.map(lambda x: x, stats)
    assert type(same) is type(stats)
    assert str(same) == str(stats)
    assert same.missing == stats.missing


def test_a_rule_that_is_not_entrywise_hides_axes():
    @jax.custom_jvp
    def turned(w):
        return w.T

    turned.defjvp(lambda p, t: (turned(*p), t[0].T))

    @jax.custom_jvp
    def two(a, b):
        return a + b, a - b

    two.defjvp(lambda p, t: (two(*p), two(*t)))
    params, x = {"w": normal(6, 6), "u": normal(6, 6)}, normal(4, 6)
    stats = jom.calibrate(lambda p, x: x @ turned(p["w"]), params, [(x,)])
    assert stats["w"].axes == jom.Axes(out=(0,))
    stats = jom.calibrate(lambda p, x: x @ two(p["w"], p["u"])[0], params, [(x,)])
    assert sorted(stats) == ["u", "w"]
    stats = jom.calibrate(lambda p, x: x @ jnp.cumsum(p["w"], 0), params, [(x,)])
    assert "w" in stats.missing


def test_a_vocabulary_over_several_devices_is_listed():
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))

    def lookup(e, t):
        mine = t - 4 * lax.axis_index("m")
        found = jnp.where((mine >= 0)[:, None] & (mine < 4)[:, None], e[jnp.clip(mine, 0, 3)], 0)
        return lax.psum(found, "m")

    f = jax.shard_map(lookup, mesh=mesh, in_specs=(P("m"), P()), out_specs=P())
    params, tokens = {"e": normal(8, 3)}, jnp.array([0, 5, 7])
    np.testing.assert_allclose(f(params["e"], tokens), params["e"][tokens])
    stats = jom.calibrate(lambda p, t: f(p["e"], t), params, [(tokens,)])
    assert stats.missing["e"] == "it is looked up in rows that shard_map divides"


def test_errors_say_what_to_do():
    params, x = {"w": normal(6, 4)}, normal(5, 6)

    def fn(p, x):
        return x @ p["w"]

    with pytest.raises(TypeError, match="give the tuple of the arguments"):
        jom.calibrate(fn, params, [x])
    with pytest.raises(ValueError, match="there is no batch"):
        jom.calibrate(fn, params, [])
    with pytest.raises(ValueError, match=r"what=\['absmin'\]; give statistics of"):
        jom.calibrate(fn, params, [(x,)], ["absmin"])
    with pytest.raises(ValueError, match=r"the input of w in fn holds NaN or Inf"):
        jom.calibrate(fn, params, [(x.at[0, 0].set(jnp.nan),)])
    with pytest.raises(ValueError, match="calibrate: no parameter reached the program"):
        jom.calibrate(lambda p, x: x @ params["w"], params, [(x,)])
    for wrong in (None, 3, jom.Rule("w", quant.Int(bits=8))):
        with pytest.raises(TypeError, match="give a list of names, or a recipe"):
            jom.calibrate(fn, params, [(x,)], wrong)
    with pytest.raises(ValueError, match="gram_rows=-1"):
        jom.calibrate(fn, params, [(x,)], gram_rows=-1)
    with pytest.raises(TypeError, match="gram_rows"):
        jom.calibrate(fn, params, [(x,)], gram_rows="many")
    with pytest.raises(TypeError, match="fn is NoneType"):
        jom.calibrate(None, params, [(x,)])
    with pytest.raises(AttributeError, match=r"has no 'gram'; it has \['absmax'\]"):
        _ = jom.calibrate(fn, params, [(x,)])["w"].gram
