"""Inputs rounded where parameters say so, in value and derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import quant

RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


W, V, K, X = normal(6, 5), normal(3, 6, 6), normal(3, 3, 2, 4), normal(4, 6)
IMAGES = normal(3, 5, 5, 2)
CONV = ("NHWC", "HWIO", "NHWC")


def rounded(x, axes, bits=8, symmetric=True):
    """The definition, in NumPy float64."""
    x = np.asarray(x, np.float64)
    low = np.minimum(x.min(axes, keepdims=True), 0)
    high = np.maximum(x.max(axes, keepdims=True), 0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(-low, high) / top
        return scale * np.clip(np.round(x / scale), -top, top)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return scale * (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero)


def small_of(params, encoder, stacked="none"):
    rules = [jom.Rule(stacked, encoder, jom.Axes(stack=1))] if stacked != "none" else []
    rest = [p for p in params if p != stacked]
    return jom.compress(params, [*rules, *([jom.Rule("|".join(rest), encoder)] if rest else [])])


@pytest.mark.parametrize("run", [jom.accelerate, jom.simulate])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("per", "axes"), [("row", (1,)), ("tensor", (0, 1))])
def test_dynamic(run, symmetric, per, axes):
    small = small_of({"w": W}, quant.Input(bits=4, per=per, symmetric=symmetric))
    got = run(lambda p, x: x @ p["w"])(small, X)
    want = rounded(X, axes, 4, symmetric) @ np.asarray(W, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_an_example_of_a_convolution_is_a_row():
    small = small_of({"k": K}, quant.Input(bits=4))

    def fn(p, x):
        return lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=CONV)

    want = fn({"k": K}, jnp.asarray(rounded(IMAGES, (1, 2, 3), 4), jnp.float32))
    np.testing.assert_allclose(jom.simulate(fn)(small, IMAGES), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_grids_of_stacked_layers(symmetric):
    both = jom.chain(quant.Int(bits=8), quant.Input(bits=6, per="static", symmetric=symmetric))
    recipe = [jom.Rule("v", both)]

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["v"])[0]

    stats = jom.calibrate(fn, {"v": V}, [(X,)], recipe)
    small = jom.compress({"v": V}, recipe, stats=stats)
    assert small["v"].scale.shape == (3,)
    h = np.asarray(X, np.float64)
    dense = np.asarray(small["v"].materialize(), np.float64)
    seen = np.asarray(X, np.float64)
    for q, w in zip(dense, np.asarray(V, np.float64), strict=True):
        low, high = min(seen.min(), 0), max(seen.max(), 0)
        top, zero = 31, 0
        scale = max(-low, high) / top
        if not symmetric:
            scale = (high - low) / 63
            zero = np.round(-low / scale)
        edge = (-top, top) if symmetric else (0, 63)
        h = np.tanh(scale * (np.clip(np.round(h / scale) + zero, *edge) - zero) @ q)
        seen = np.tanh(seen @ w)
    np.testing.assert_allclose(jom.simulate(fn)(small, X), h, rtol=1e-3, atol=1e-3)


def test_derivatives_pass_inside_the_grid_only():
    stats = jom.calibrate(lambda p, x: x @ p["w"], {"w": W}, [(X / 2,)], ["minmax"])
    static = [jom.Rule("w", quant.Input(bits=8, per="static"))]
    small = jom.compress({"w": W}, static, stats=stats)
    grad = jax.grad(lambda x: jom.simulate(lambda p, x: x @ p["w"])(small, x).sum())(X)
    inside = np.abs(X) <= np.abs(X).max() / 2 * (1 + 0.5 / 127)
    np.testing.assert_allclose(grad, np.where(inside, W.sum(1), 0), rtol=1e-6)


def test_training_with_rounded_weights_and_inputs():
    recipe = [jom.Rule("w", jom.chain(quant.Int(bits=4), quant.Input(bits=4)))]
    params, target = {"w": W * 0}, X @ W
    show = jom.straight_through([jom.Rule("w", quant.Int(bits=4))])
    wrap = [jom.Rule("w", quant.Input(bits=4))]

    @jax.jit
    def loss(p):
        small = jom.compress(show(p), wrap)
        return jnp.mean((jom.simulate(lambda p, x: x @ p["w"])(small, X) - target) ** 2)

    for _ in range(200):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    shipped = jom.compress(params, recipe)
    out = jom.accelerate(lambda p, x: x @ p["w"])(shipped, X)
    np.testing.assert_allclose(jnp.mean((out - target) ** 2), loss(params), rtol=1e-4)
    assert loss(params) < 0.02 * jnp.mean(target**2)


def test_without_an_input_spec_it_is_the_rebuilt_model():
    small = small_of({"w": W}, quant.Int(bits=8))
    got = jom.simulate(lambda p, x: x @ p["w"])(small, X)
    np.testing.assert_allclose(got, X @ small["w"].materialize(), rtol=1e-6, atol=1e-6)


def test_a_row_over_several_devices_has_one_grid():
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
    specs = (P("m"), P(None, "m"))
    f = jax.shard_map(lambda w, x: lax.psum(x @ w, "m"), mesh=mesh, in_specs=specs, out_specs=P())
    small = small_of({"w": W}, jom.chain(quant.Int(bits=8), quant.Input(bits=4)))
    one = jom.simulate(lambda p, x: x @ p["w"])(small, X)
    two = jom.simulate(lambda p, x: f(p["w"], x))(small, X)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_lookups_and_sums_leave_inputs_alone_and_explain_says_so():
    small = small_of({"w": W}, quant.Input(bits=2))

    def fn(p, t):
        return p["w"][t]

    tokens = jnp.array([0, 5])
    np.testing.assert_array_equal(jom.simulate(fn)(small, tokens), W[tokens])
    [row] = jom.accelerate(fn).explain(small, tokens)
    assert "its input is not rounded here" in row["note"]


def test_other_encoders_encode_the_values_in_place():
    leaf = quant.Int(bits=8)(quant.Input(bits=8)(W))
    assert leaf.kind() == "WithInput(Quantized)" == quant.Input(bits=8)(leaf).kind()
    assert quant.Input(bits=8)(quant.Int(bits=8)(W)).kind() == leaf.kind()
    assert leaf.check() == [] and leaf.storage_bits() == quant.Int(bits=8)(W).storage_bits()


REVERSED = {
    "a reversed stack": lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["v"][::-1])[0],
    "a carry": lambda p, x: x @ lax.scan(lambda w, _: (0.5 * w, None), p["v"][0], length=2)[0],
    "returned by remat": lambda p, x: x @ jax.checkpoint(lambda v: v[0] * 2)(p["v"]),
}


@pytest.mark.parametrize("name", REVERSED)
def test_rounding_is_never_dropped_in_silence(name):
    small = jom.compress({"v": V}, [jom.Rule("v", quant.Input(bits=2), jom.Axes(stack=1))])
    with pytest.raises(ValueError, match="v: its input could not be rounded, as it is"):
        jom.simulate(REVERSED[name])(small, X)
    undeclared = jom.compress({"v": V}, [jom.Rule("v", quant.Input(bits=2))])
    with pytest.raises(ValueError, match=r"Axes\(stack=1\)"):
        jom.simulate(lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["v"])[0])(undeclared, X)


def test_static_grids_of_a_stack_sliced_by_hand():
    recipe = [jom.Rule("v", quant.Input(bits=6, per="static"), jom.Axes(stack=1))]

    def scanned(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["v"])[0]

    def unrolled(p, x):
        for w in p["v"]:
            x = jnp.tanh(x @ w)
        return x

    def fori(p, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["v"][i]), x)

    small = jom.compress(
        {"v": V}, recipe, stats=jom.calibrate(scanned, {"v": V}, [(X,)], ["minmax"])
    )
    want = jom.simulate(scanned)(small, X)
    for fn in (unrolled, fori):
        np.testing.assert_allclose(jom.simulate(fn)(small, X), want, rtol=1e-5, atol=1e-6)


def test_parameters_that_meet_one_input_agree_or_say_so():
    params = {"w": W, "u": W + 1}
    same = jom.compress(params, [jom.Rule("w|u", quant.Input(bits=4))])
    got = jom.simulate(lambda p, x: x @ (p["w"] + p["u"]))(same, X)
    want = rounded(X, (1,), 4) @ np.asarray(2 * W + 1, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    two = [jom.Rule("w", quant.Input(bits=4)), jom.Rule("u", quant.Input(bits=8))]
    with pytest.raises(ValueError, match="w, u meet one input and round it in different ways"):
        jom.simulate(lambda p, x: x @ (p["w"] + p["u"]))(jom.compress(params, two), X)


def test_a_whole_input_over_several_devices_has_one_grid():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    small = small_of({"w": W}, quant.Input(bits=3, per="tensor"))
    one = jom.simulate(lambda p, x: x @ p["w"])(small, X)
    np.testing.assert_allclose(
        jom.simulate(lambda p, x: f(p["w"], x))(small, X), one, rtol=1e-5, atol=1e-6
    )


def test_errors():
    with pytest.raises(ValueError, match="bits=9 is not a width of 2 to 8"):
        quant.Input(bits=9)
    with pytest.raises(ValueError, match="per='token' is not"):
        quant.Input(bits=8, per="token")
    with pytest.raises(ValueError, match=r"w: .* needs the statistics"):
        small_of({"w": W}, quant.Input(bits=8, per="static"))
    with pytest.raises(ValueError, match="keeps the values as they are"):
        quant.Input(bits=8)(quant.Int(bits=8)(W), keep=W > 0)
    with pytest.raises(TypeError, match="fn is NoneType"):
        jom.simulate(None)
    stats = jom.calibrate(
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["v"])[0],
        {"v": V},
        [(X,)],
        ["minmax"],
    )
    small = jom.compress({"v": V}, [jom.Rule("v", quant.Input(bits=8, per="static"))], stats=stats)
    with pytest.raises(ValueError, match=r"an input scale for each of \(3,\) stacked tensors"):
        jom.simulate(lambda p, x: jnp.einsum("bi,lij->lbj", x, p["v"]))(small, X)
