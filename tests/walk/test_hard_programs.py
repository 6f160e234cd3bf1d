"""Programs that once broke the walk, or what it says of them."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import quant

RNG = np.random.default_rng(17)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"w": normal(8, 8), "u": normal(8, 8), "v": normal(4, 8, 8) / 3, "e": normal(8, 8, 8) / 3}
X = normal(3, 8)
SMALL = jom.compress(
    PARAMS,
    [jom.Rule("w|u", quant.Int(bits=4)), jom.Rule("v|e", quant.Int(bits=4), jom.Axes(stack=1))],
)


def layer(h, w):
    return jnp.tanh(h @ w), None


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("m",), axis_types=(kind,))


def constrained(p, x):
    spec = NamedSharding(mesh(), P(None, None, "m"))
    return lax.scan(layer, x, lax.with_sharding_constraint(p["v"], spec))[0]


def other_random_numbers(p, x):
    with jax.threefry_partitionable(False):
        return x @ p["w"] + jax.random.uniform(jax.random.key(0), (3, 8))


def series(p, x):
    w = p["w"]
    for _ in range(12):
        w = w * (1.1 - 0.1 * w * w)
    return x @ w


def through_a_ref(p, x):
    ref = jax.new_ref(p["w"])
    ref[...] = ref[...] * 2
    return x @ ref[...]


PROGRAMS = {
    "relu of a stack": lambda p, x: lax.scan(layer, x, jax.nn.relu(p["v"]))[0],
    "relu of a square stack": lambda p, x: lax.scan(layer, x, jax.nn.relu(p["e"]))[0],
    "a constrained stack": constrained,
    "a context of JAX": other_random_numbers,
    "a long series": series,
    "a mutable array": through_a_ref,
    "a callback": lambda p, x: (jax.debug.callback(lambda w: None, p["w"]), x @ p["w"])[1],
    "no samples": lambda p, x: x[:0] @ p["w"],
}


def test_layers_stacked_by_hand_stay_packed_and_have_statistics_of_their_own():
    params = {f"w{i}": PARAMS["v"][i] for i in range(4)}

    def fn(p, x):
        return lax.scan(layer, x, jnp.stack([p[f"w{i}"] for i in range(4)]))[0]

    small = jom.compress(params, [jom.Rule("w.", quant.Int(bits=4))])
    run = jom.accelerate(fn)
    want = fn(jom.materialize(small), X)
    np.testing.assert_allclose(run(small, X), want, rtol=2e-5, atol=2e-5)
    assert "f32[4,8,8]" not in str(jax.make_jaxpr(run)(small, X))
    stats = jom.calibrate(fn, params, [(X,)], ["gram"])
    h = X
    for i in range(4):
        np.testing.assert_allclose(stats[f"w{i}"].gram, h.T @ h, rtol=1e-4, atol=1e-5)
        assert stats[f"w{i}"].axes == jom.Axes(out=(1,)) and stats[f"w{i}"].count == 3
        h = jnp.tanh(h @ params[f"w{i}"])
    table = run.explain(small, X)
    assert table.column("runs") == ["scales after the product on cuda"] * 4
    assert table.column("multiply-adds") == [3 * 64] * 4 and table.data["multiply_adds"] == 12 * 64


@pytest.mark.parametrize("change", [lambda w: jnp.cumsum(w, 0), lambda w: w[np.arange(8)[::-1]]])
def test_rounding_of_inputs_is_not_dropped_by_what_hides_a_parameter(change):
    small = jom.compress(PARAMS, [jom.Rule("w", quant.Input(bits=4))])
    with pytest.raises(ValueError, match="w: its input could not be rounded, as it goes through"):
        jom.simulate(lambda p, x: x @ change(p["w"]))(small, X)
    jom.simulate(lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2))(small, X)


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_statistics_and_table(name):
    fn = PROGRAMS[name]
    got, want = jom.accelerate(fn)(SMALL, X), fn(jom.materialize(SMALL), X)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    jom.calibrate(fn, PARAMS, [(X,)])
    assert len(jom.accelerate(fn).explain(SMALL, X)) >= 4


def test_an_embedding_on_an_explicit_mesh():
    ids = jnp.array([1, 5])

    def fn(p, ids):
        return p["w"].at[ids].get(out_sharding=P("m", None))

    with jax.set_mesh(mesh(AxisType.Explicit)):
        got = jax.jit(jom.accelerate(fn))(SMALL, ids)
    np.testing.assert_array_equal(got, SMALL["w"].materialize()[ids])


def test_an_inner_jit_says_where_its_result_is():
    spec = NamedSharding(mesh(), P(None, "m"))

    def fn(p, x):
        return jax.jit(lambda w, x: x @ w, out_shardings=spec)(p["w"], x)

    assert jom.accelerate(fn)(SMALL, X).sharding.is_equivalent_to(spec, 2)


USES = {
    "straight through": lambda w, x: x @ (w + lax.stop_gradient(jnp.round(w) - w)),
    "absolute": lambda w, x: x @ jnp.where(w > 0, w, -w),
    "gated": lambda w, x: x @ (w * jax.nn.relu(w)),
    "rolled out": lambda w, x: x @ jnp.roll(w, 2, 1),
    "rolled in": lambda w, x: x @ jnp.roll(w, 2, 0),
    "halves": lambda w, x: x @ jnp.concatenate(jnp.split(w, 2, 0)[::-1], 0),
}


@pytest.mark.parametrize("name", USES)
def test_a_product_counts_once_by_however_many_ways_it_is_reached(name):
    stats = jom.calibrate(
        lambda p, x: USES[name](p["w"], x), PARAMS, [(X,)], ["gram", "mean", "histogram"]
    )["w"]
    turned = {"rolled in": np.roll(X, -2, 1), "halves": np.roll(X, 4, 1)}.get(name, X)
    assert stats.count == 3
    np.testing.assert_allclose(stats.mean, turned.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.gram, turned.T @ turned, rtol=1e-5, atol=1e-5)
    assert stats.histogram.counts.sum() == X.size
    table = jom.accelerate(lambda p, x: USES[name](p["w"], x)).explain(PARAMS, X)
    assert sum(r["multiply-adds"] for r in table if r["path"] == "w") == 3 * 64


def test_a_second_use_that_cannot_be_read_is_listed():
    stats = jom.calibrate(
        lambda p, x: (x @ p["w"], x @ jnp.cumsum(p["w"], 0), jnp.sum(p["w"] ** 2)),
        PARAMS,
        [(X,)],
    )
    assert stats["w"].count == 3
    assert stats.missing["w"] == "another use is not counted: cumsum is no product with an input"
    quiet = jom.calibrate(lambda p, x: (x @ p["w"], jnp.sum(p["w"] ** 2)), PARAMS, [(X,)])
    assert "w" not in quiet.missing


def test_a_constant_order_is_no_lookup():
    order = np.arange(8)[::-1]
    stats = jom.calibrate(lambda p, x: x @ p["w"][order], PARAMS, [(X,)])
    assert "constant" in stats.missing["w"] and "w" not in stats


def test_zeros_do_not_widen_a_histogram():
    x = jnp.concatenate([1e-4 * normal(50, 8), jnp.zeros((1, 8))])
    bins = jom.calibrate(lambda p, x: x @ p["w"], PARAMS, [(x,)], ["histogram"])["w"].histogram
    assert int(bins.exponent) == int(np.frexp(float(jnp.abs(x).max()))[1])
    assert np.count_nonzero(bins.counts) > 200


def test_eight_bit_floats_and_mixed_branches():
    small = X.astype(jnp.float8_e4m3fn)
    w = {"w": PARAMS["w"].astype(jnp.float8_e4m3fn)}

    def product(p, x):
        return lax.dot_general(
            x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type="float32"
        )

    stats = jom.calibrate(product, w, [(small,)])
    np.testing.assert_array_equal(stats["w"].absmax, jnp.abs(small.astype(jnp.float32)).max(0))
    with jax.enable_x64(True):
        stats = jom.calibrate(
            lambda p, x: lax.cond(
                x[0, 0] > 9,
                lambda: (x @ p["w"]).astype(jnp.float64),
                lambda: x.astype(jnp.float64) @ p["w"].astype(jnp.float64),
            ),
            PARAMS,
            [(X,)],
        )
    assert stats["w"].count == 3


def test_what_cannot_be_hashed_and_what_is_traced():
    class Options:
        __hash__ = None

    stats = jom.calibrate(lambda p, x, options: x @ p["w"], PARAMS, [(X, Options())] * 2)
    assert stats["w"].count == 6
    with pytest.raises(TypeError, match="call it outside of jit"):
        jax.jit(lambda x: jom.calibrate(lambda p, x: x @ p["w"], PARAMS, [(x,)])["w"].absmax)(X)


def test_functions_are_let_go():
    def use(run):
        def fn(p, x):
            return x @ p["w"]

        run(fn)
        return weakref.ref(fn)

    runs = (
        lambda fn: jom.accelerate(fn)(SMALL, X),
        lambda fn: jom.calibrate(fn, PARAMS, [(X,)]),
        lambda fn: jom.taps(fn, ["w"])(PARAMS, X),
    )
    kept = [use(run) for run in runs]
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]
