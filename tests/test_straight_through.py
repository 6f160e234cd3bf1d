import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxopt_models as jom
from jaxopt_models import Rule, chain, codebook, prune, quant
from jaxopt_models.testing import bits

HALF = prune.Magnitude(sparsity=0.5)
ENCODERS = [
    quant.Int(bits=4),
    quant.Int(bits=3, group=4, symmetric=False),
    quant.Int(bits=8, per="tensor"),
    HALF,
    prune.Magnitude(structure=prune.NofM(2, 4)),
    prune.Magnitude(sparsity=0.5, structure=prune.Block(4, 2)),
    codebook.KMeans(bits=2),
    codebook.KMeans(bits=2, per="channel", start="density"),
    chain(HALF, quant.Int(bits=2)),
    chain(HALF, codebook.KMeans(bits=2)),
]
SHAPE = (8, 6)
FLOATS = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])
WEIGHTS = hnp.arrays(np.float32, SHAPE, elements=FLOATS)


def shower(encoder):
    show = jom.straight_through([Rule("w", encoder)])
    return lambda w: show({"w": w})["w"]


EAGER = {e: shower(e) for e in ENCODERS}
JITTED = {e: jax.jit(EAGER[e]) for e in ENCODERS}
PUSHED = {e: jax.jit(lambda w, t, e=e: jax.jvp(EAGER[e], (w,), (t,))) for e in ENCODERS}


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
@settings(max_examples=20, deadline=None)
@given(w=WEIGHTS)
def test_it_shows_the_bits_of_the_compressed_tree(encoder, w):
    w = jnp.asarray(w)
    want = bits(encoder(w).materialize())
    assert bits(EAGER[encoder](w)) == want
    assert bits(JITTED[encoder](w)) == want


@pytest.mark.parametrize("encoder", [ENCODERS[1], HALF, ENCODERS[-1]], ids=repr)
@settings(max_examples=10, deadline=None)
@given(w=WEIGHTS, t=WEIGHTS)
def test_tangents_pass_bit_for_bit(encoder, w, t):
    shown, tangent = PUSHED[encoder](jnp.asarray(w), jnp.asarray(t))
    assert bits(shown) == bits(encoder(jnp.asarray(w)).materialize())
    assert bits(tangent) == bits(t)


@pytest.mark.parametrize(
    ("encoder", "dtype"),
    [
        (ENCODERS[0], jnp.bfloat16),
        (ENCODERS[1], jnp.float16),
        (HALF, jnp.bfloat16),
        (ENCODERS[6], jnp.float16),
    ],
)
def test_other_types(encoder, dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), dtype)
    want = bits(encoder(w).materialize())
    assert bits(EAGER[encoder](w)) == want
    assert bits(JITTED[encoder](w)) == want


@pytest.mark.parametrize("encoder", [ENCODERS[0], HALF, chain(HALF, codebook.KMeans(bits=2))])
def test_gradients_as_if_nothing_had_happened(encoder):
    w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    q = encoder(w).materialize()

    def loss(w):
        return jnp.sum(EAGER[encoder](w) ** 3)

    np.testing.assert_allclose(jax.grad(loss)(w), 3 * q**2, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(w), 3 * q**2, rtol=1e-6)
    _, pushed = jax.jvp(jax.grad(loss), (w,), (jnp.ones_like(w),))
    np.testing.assert_allclose(pushed, 6 * q, rtol=1e-6)  # a Hessian-vector product


def test_hessian_of_a_small_tensor():
    w = jnp.array([[0.3, -2.0], [1.1, 0.4]])
    show = shower(quant.Int(bits=3))
    got = jax.hessian(lambda w: jnp.sum(show(w) ** 3))(w).reshape(4, 4)
    want = np.diag(6 * np.asarray(quant.Int(bits=3)(w).materialize()).ravel())
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("encoder", [ENCODERS[1], codebook.KMeans(bits=2)])
def test_vmap_shows_each_tensor_its_own(encoder):
    ws = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
    shown = jax.vmap(EAGER[encoder])(ws)
    grads = jax.vmap(jax.grad(lambda w: jnp.sum(EAGER[encoder](w))))(ws)
    for i in range(3):
        assert bits(shown[i]) == bits(encoder(ws[i]).materialize())
    assert bool(jnp.all(grads == 1))


def test_keys_reach_encoders_that_draw():
    w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    recipe = [Rule("w", codebook.KMeans(bits=2, start="random", iterations=1))]
    show = jom.straight_through(recipe)
    for seed in range(3):
        key = jax.random.key(seed)
        want = jom.materialize(jom.compress({"w": w}, recipe, key=key))["w"]
        assert bits(show({"w": w}, key)["w"]) == bits(want)
        grad = jax.grad(lambda w, key=key: jnp.sum(show({"w": w}, key)["w"]))(w)
        assert bool(jnp.all(grad == 1))
    with pytest.raises(ValueError, match=r"straight_through: w: .*give key="):
        show({"w": w})


def test_errors_name_the_path():
    show = jom.straight_through([Rule("a/w", quant.Int(bits=4, group=5))])
    with pytest.raises(ValueError, match="straight_through: a/w: group=5"):
        show({"a": {"w": jnp.ones(SHAPE)}})
    small = jom.compress({"w": jnp.ones(SHAPE)}, [Rule("w", quant.Int(bits=4))])
    with pytest.raises(TypeError, match="straight_through: w is Quantized, encoded already"):
        jom.straight_through([Rule("w", HALF)])(small)
    with pytest.raises(ValueError, match="matches no parameter"):
        jom.straight_through([Rule("v", HALF)])({"w": jnp.ones(SHAPE)})


def test_the_tree_keeps_its_structure():
    params = {"w": jnp.ones(SHAPE), "step": jnp.zeros((), jnp.int32), "b": [jnp.ones(3)]}
    shown = jom.straight_through([Rule("w", HALF)])(params)
    assert jax.tree.structure(shown) == jax.tree.structure(params)
    assert shown["step"] is params["step"]
    assert shown["b"][0] is params["b"][0]
