import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_models as jom
from jaxopt_models import Rule, chain, codebook, prune, quant
from jaxopt_models.testing import leaf_bits

HALF = prune.Magnitude(sparsity=0.5)
W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
ENCODERS = [
    quant.Int(bits=4),
    quant.Int(bits=3, symmetric=False),
    HALF,
    codebook.KMeans(bits=2),
    chain(HALF, quant.Int(bits=8)),
    chain(HALF, codebook.KMeans(bits=3, per="channel")),
]


def small_of(encoder, **more):
    return jom.compress({"w": W, **more}, [Rule("w", encoder)])


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_halves_make_the_whole_again(encoder):
    small = small_of(encoder, b=jnp.ones(3), step=jnp.arange(2), none=None, key=jax.random.key(0))
    trainable, rest = jom.partition(small)
    whole = jom.combine(trainable, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(small)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True))
    back = jom.combine(rest, trainable)
    assert jax.tree.structure(back) == jax.tree.structure(small)
    kinds = {x.dtype for x in jax.tree.leaves(trainable)}
    assert all(jnp.issubdtype(d, jnp.floating) for d in kinds)


@pytest.mark.parametrize(
    ("encoder", "fields"),
    [
        (ENCODERS[0], {"scale"}),
        (ENCODERS[1], {"scale"}),
        (HALF, {"values"}),
        (ENCODERS[3], {"codebook"}),
    ],
)
def test_what_is_trained_of_a_leaf(encoder, fields):
    trainable, rest = jom.partition(small_of(encoder))
    assert set(trainable["w"].parts()) == fields
    assert not fields & set(rest["w"].parts())
    assert set(rest["w"].parts()) | fields == set(small_of(encoder)["w"].parts())


def test_roles_decide_not_types():
    fp8 = small_of(HALF)["w"]
    fp8 = dataclasses.replace(fp8, values=fp8.values.astype(jnp.float8_e4m3fn))
    trainable, _ = jom.partition({"w": fp8})
    assert trainable["w"].values.dtype == jnp.float8_e4m3fn  # its role is to be trained
    assert trainable["w"].mask is None


@pytest.mark.parametrize("per", ["leaf", "channel"])
def test_the_gradient_of_centroids_is_the_segment_sum(per):
    encoder = codebook.KMeans(bits=2, per=per)
    small = small_of(encoder)
    trainable, rest = jom.partition(small)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=W.shape), jnp.float32)

    def loss(t):
        return jnp.sum(weight * jom.materialize(jom.combine(t, rest))["w"])

    got = np.asarray(jax.grad(loss)(trainable)["w"].codebook)
    codes, weight = np.asarray(small["w"].integers()), np.asarray(weight, np.float64)
    if per == "leaf":
        want = np.array([weight[codes == i].sum() for i in range(4)])
    else:
        want = np.array(
            [[weight[:, j][codes[:, j] == i].sum() for i in range(4)] for j in range(6)]
        )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_dropped_entries_of_a_masked_leaf_get_no_gradient():
    small = small_of(HALF)
    trainable, rest = jom.partition(small)
    grad = jax.grad(lambda t: jnp.sum(jom.materialize(jom.combine(t, rest))["w"] ** 2))(trainable)
    want = jnp.where(small["w"].keep(), 2 * W, 0)
    np.testing.assert_array_equal(grad["w"].values, want)


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_adam_on_the_trainable_half(encoder):
    small = small_of(encoder, b=jnp.zeros(6), step=jnp.arange(2))
    trainable, rest = jom.partition(small)
    target = W + 0.05
    tx = optax.adamw(1e-2, weight_decay=1e-3)

    def loss(t):
        dense = jom.materialize(jom.combine(t, rest))
        return jnp.mean((dense["w"] + dense["b"][None] - target) ** 2)

    @jax.jit
    def step(t, state):
        grads = jax.grad(loss)(t)
        updates, state = tx.update(grads, state, t)
        return optax.apply_updates(t, updates), state

    state, first = tx.init(trainable), loss(trainable)
    for _ in range(30):
        trainable, state = step(trainable, state)
    assert step._cache_size() == 1
    assert loss(trainable) < first
    tuned = jom.combine(trainable, rest)
    jom.verify(tuned)
    assert jax.tree.structure(tuned) == jax.tree.structure(small)
    if isinstance(small["w"], jom.Masked):
        dropped = jnp.where(small["w"].keep(), 0, jom.materialize(tuned)["w"])
        assert not bool(jnp.any(dropped))
    np.testing.assert_array_equal(tuned["step"], jnp.arange(2))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
        x = nn.Dense(4, kernel_init=init, name="ip1")(x)
        return nn.BatchNorm(use_running_average=True)(x)


def test_linen_variables_with_boxes():
    variables = Linen().init(jax.random.key(0), jnp.ones((1, 3)))
    small = jom.compress(variables, [Rule("ip1/kernel", quant.Int(bits=8))])
    trainable, rest = jom.partition(small)
    assert all(
        x is None for x in jax.tree.leaves(trainable["batch_stats"], is_leaf=lambda x: x is None)
    )
    assert trainable["params"]["ip1"]["bias"] is not None
    box = trainable["params"]["ip1"]["kernel"]
    assert isinstance(box, nn.Partitioned)
    assert set(box.value.parts()) == {"scale"}
    whole = jom.combine(trainable, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(small)
    assert leaf_bits(whole) == leaf_bits(small)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.ip1 = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.ip1(x)


def test_nnx_states_with_boxes_train():
    model = Nnx()
    graph, state = nnx.split(model)
    small = jom.compress(state, [Rule("ip1/kernel", codebook.KMeans(bits=2))])
    trainable, rest = jom.partition(small)
    whole = jom.combine(trainable, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(small)

    def loss(t):
        model = nnx.merge(graph, jom.materialize(jom.combine(t, rest)))
        return jnp.sum(model(jnp.ones((2, 3))) ** 2)

    tx = optax.adam(1e-2)
    opt = tx.init(trainable)
    before = loss(trainable)
    for _ in range(5):
        updates, opt = tx.update(jax.grad(loss)(trainable), opt, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert loss(trainable) < before
    jom.verify(jom.combine(trainable, rest))


def test_wrong_halves_raise():
    small = small_of(HALF, b=jnp.ones(3))
    trainable, rest = jom.partition(small)
    with pytest.raises(ValueError, match="both halves hold a value"):
        jom.combine(trainable, trainable)
    with pytest.raises(ValueError, match="both halves hold a value"):
        jom.combine(small, rest)
    with pytest.raises(ValueError, match="differ in structure"):
        jom.combine(trainable, {"w": rest["w"]})
    other = jom.partition(small_of(quant.Int(bits=4), b=jnp.ones(3)))[1]
    with pytest.raises(ValueError, match="differ in structure"):
        jom.combine(trainable, other)


@pytest.mark.parametrize("make", ["gradual", "rigl"])
def test_our_optimizers_refuse_codes(make):
    small = small_of(chain(HALF, codebook.KMeans(bits=2)))
    tx = {
        "gradual": prune.gradual(lambda step: 0.5),
        "rigl": prune.rigl(optax.adam(0.1), sparsity=0.5, key=jax.random.key(0), until=10),
    }[make]
    with pytest.raises(TypeError, match=rf"{make}: w.mask is uint8.*partition"):
        tx.init(small)


def test_paths_that_stay_are_not_trained():
    tree = {"embed": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(2)}}
    trainable, rest = jom.partition(tree, fixed="embed/.*")
    assert trainable["embed"]["kernel"] is None and rest["embed"]["kernel"].shape == (3,)
    assert jax.tree.leaves(jom.combine(trainable, rest))[0].shape == (3,)
    with pytest.raises(ValueError, match=r"fixed='embd/.\*' matches no path; they are embed/"):
        jom.partition(tree, fixed="embd/.*")
