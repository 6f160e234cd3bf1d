"""The walk: any program runs on compressed parameters as on the rebuilt ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant
from jaxopt_models._accelerate import accelerate
from jaxopt_models._encoded import is_encoded

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


W, V, X = normal(8, 8), normal(4, 8, 8), normal(3, 8)
KERNEL, IMAGES = normal(3, 3, 2, 8), normal(2, 6, 6, 2)
PARAMS = {"w": W, "v": V, "k": KERNEL, "b": normal(8)}
ENCODERS = [
    quant.Int(bits=8),
    quant.Int(bits=4, group=2, symmetric=False),
    prune.Magnitude(sparsity=0.5),
    codebook.KMeans(bits=3),
    jom.chain(prune.Magnitude(sparsity=0.5), codebook.KMeans(bits=3)),
    jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4)),
]


@jax.custom_vjp
def tenth(x, w):
    return x @ w


tenth.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (jnp.full_like(r[0], 0.1), r[1] * 0))


def layers(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["v"])[0]


def remat_layers(p, x):
    return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p["v"])[0]


def recurrent(p, x):
    return lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), h.sum()), jnp.zeros(8), x)


def conv(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(IMAGES, p["k"], (1, 1), "SAME", dimension_numbers=dims)
    return y.mean((1, 2))[:, :3].sum() + x


PROGRAMS = {
    "dot": lambda p, x: x @ p["w"] + p["b"][None],
    "transposed": lambda p, x: x @ p["w"].T,
    "reshaped": lambda p, x: x @ p["w"].reshape(2, 4, 8).reshape(8, 8),
    "cast": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    "twice": lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
    "einsum": lambda p, x: jnp.einsum("bi,lij->blj", x, p["v"]),
    "lookup": lambda p, x: p["w"][jnp.asarray([1, 5, 1])] * x,
    "elementwise": lambda p, x: jnp.maximum(p["w"], 0).sum() + x * p["w"][:1],
    "conv": conv,
    "jit": lambda p, x: jax.jit(lambda w, x: jnp.sin(x @ w))(p["w"], x),
    "remat": lambda p, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["w"], x),
    "scan": layers,
    "remat in scan": remat_layers,
    "recurrent": recurrent,
    "carried": lambda p, x: lax.scan(lambda w, r: (w * 0.5, r @ w), p["w"], x),
    "reversed scan": lambda p, x: lax.scan(
        lambda h, w: (h @ w, h.sum()), x, p["v"].transpose(0, 2, 1), reverse=True
    ),
    "while": lambda p, x: lax.while_loop(
        lambda s: s[0] < 3 + 0 * p["b"].sum(),
        lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])),
        (0.0, x),
    )[1],
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w.T, p["w"]),
    "switch in scan": lambda p, x: lax.scan(
        lambda h, i: (lax.switch(i % 2, [lambda: h @ p["w"], lambda: h @ p["w"].T]), None),
        x,
        jnp.arange(3),
    )[0],
    "custom_vjp": lambda p, x: tenth(x, p["w"]),
    "custom_jvp": lambda p, x: jax.nn.relu(p["w"]) * x[:1],
    "vmap inside": lambda p, x: jax.vmap(lambda r: p["w"] @ r)(x),
    "gradient inside": lambda p, x: jax.grad(lambda y: jnp.sum((y @ p["w"]) ** 2))(x),
    "stack sliced": lambda p, x: x @ p["v"][2],
}
ONCE = [n for n in PROGRAMS if n != "while"]


def compressed(encoder):
    stacked = jom.Axes(stack=1)
    rules = [jom.Rule("w|k", encoder), jom.Rule("v", encoder, stacked)]
    return jom.compress(PARAMS, rules)


SMALL = {repr(e): compressed(e) for e in ENCODERS}


def close(a, b):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-5, atol=2e-5
        ),
        a,
        b,
    )
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def products(names, encoders):
    """Each program on one encoder in turn; on every encoder with --full."""
    for i, name in enumerate(names):
        for j, encoder in enumerate(encoders):
            marks = () if i % len(encoders) == j else pytest.mark.full
            yield pytest.param(name, encoder, marks=marks)


@pytest.mark.parametrize(("name", "encoder"), list(products(PROGRAMS, SMALL)))
def test_values(name, encoder):
    fn, small = PROGRAMS[name], SMALL[encoder]
    close(accelerate(fn)(small, X), fn(jom.materialize(small), X))


def total(fn):
    return lambda *a: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(*a)))


TWO = [repr(ENCODERS[0]), repr(ENCODERS[4])]


@pytest.mark.parametrize(("name", "encoder"), list(products(ONCE, TWO)))
def test_gradients_by_input_and_by_float_parts(name, encoder):
    fn, small = PROGRAMS[name], SMALL[encoder]
    part, rest = jom.partition(small)

    def loss(run, read):
        return jax.jit(
            jax.grad(lambda t, x: total(run)(read(jom.combine(t, rest)), x), argnums=(0, 1))
        )(part, X)

    close(loss(accelerate(fn), lambda t: t), loss(fn, jom.materialize))


def test_a_custom_rule_keeps_its_rule():
    grad = jax.grad(lambda x: accelerate(PROGRAMS["custom_vjp"])(SMALL[repr(ENCODERS[0])], x).sum())
    np.testing.assert_array_equal(grad(X), np.full(X.shape, 0.1, np.float32))


def test_loops_stay_loops_and_slices_stay_packed():
    small = SMALL[repr(quant.Int(bits=8))]
    jaxpr = jax.make_jaxpr(accelerate(layers))(small, X)
    [kept] = jaxpr.eqns
    [scan] = [e for e in kept.params["jaxpr"].eqns if e.primitive.name == "scan"]
    assert jnp.int8 in [v.aval.dtype for v in scan.invars]
    assert "f32[4,8,8]" not in str(jaxpr)


def test_remat_is_wrapped_again():
    small = SMALL[repr(quant.Int(bits=8))]
    assert "remat" in str(jax.make_jaxpr(accelerate(PROGRAMS["remat"]))(small, X))


def test_untouched_leaves_come_back_as_leaves():
    small = SMALL[repr(quant.Int(bits=8))]
    out, y = accelerate(lambda p, x: (p, x @ p["w"]))(small, X)
    assert is_encoded(out["w"])
    close(out["w"].codes, small["w"].codes)
    close(y, X @ small["w"].materialize())


def test_dense_parameters_are_the_very_same_program():
    for name in PROGRAMS:
        fn = PROGRAMS[name]
        assert str(jax.make_jaxpr(accelerate(fn))(PARAMS, X)) == str(jax.make_jaxpr(fn)(PARAMS, X))


def test_what_is_no_array_stays_static_and_names_are_kept():
    def scaled(params, x, *, mode, factor=2):
        assert mode == "double"
        return x @ params["w"] * factor

    small = SMALL[repr(quant.Int(bits=8))]
    run = accelerate(scaled)
    close(run(small, X, mode="double"), scaled(jom.materialize(small), X, mode="double"))
    assert run.__name__ == "scaled"
    text = jax.jit(lambda p, x: accelerate(named)(p, x)).lower(small, X).as_text(debug_info=True)
    assert "here" in text


def named(p, x):
    with jax.named_scope("here"):
        return x @ p["w"]


def unrolled(p, x):
    for i in range(8):
        x = jnp.tanh(x @ p[f"w{i}"])
    return x


def test_a_batch_of_inputs_rebuilds_each_weight_once():
    small = SMALL[repr(quant.Int(bits=8))]
    fn = jax.vmap(accelerate(PROGRAMS["twice"]), in_axes=(None, 0))
    x = normal(5, 3, 8)
    close(
        fn(small, x), PROGRAMS["twice"](jom.materialize(small), x.reshape(15, 8)).reshape(x.shape)
    )
    assert "[5,8,8]" not in str(jax.make_jaxpr(fn)(small, x))


def test_a_stack_of_models_under_vmap():
    small = SMALL[repr(quant.Int(bits=8))]
    got = jax.vmap(lambda v: accelerate(lambda p, x: x @ p["w"])({"w": v}, X))(small["v"])
    close(got, jnp.einsum("bi,lij->lbj", X, small["v"].materialize()))


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20


def test_an_unrolled_model_holds_one_dense_layer_at_a_time():
    n = 256
    w = {f"w{i}": normal(n, n) / 16 for i in range(8)}
    small, x = jom.compress(w, [jom.Rule("w.", quant.Int(bits=8))]), jnp.ones((2, n))
    layer = 4 * n * n / 2**20
    assert temporaries(accelerate(unrolled), small, x) < 1.2 * layer
    assert temporaries(lambda s, x: unrolled(jom.materialize(s), x), small, x) > 7 * layer


@pytest.mark.parametrize("fn", [layers, remat_layers])
def test_a_scanned_model_holds_one_dense_layer_in_both_directions(fn):
    n = 256
    small = jom.compress(
        {"v": normal(8, n, n) / 16}, [jom.Rule("v", quant.Int(bits=8), jom.Axes(stack=1))]
    )
    x, layer = jnp.ones((2, n)), 4 * n * n / 2**20
    run = accelerate(fn)
    assert temporaries(run, small, x) < 1.2 * layer
    assert temporaries(jax.grad(lambda x, s: run(s, x).sum()), x, small) < 1.7 * layer
