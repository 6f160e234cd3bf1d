import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, prune, quant

RNG = np.random.default_rng(0)
RECIPE = [
    Rule("a", prune.Magnitude(sparsity=0.7)),
    Rule("stack", prune.Magnitude(sparsity=0.5), Axes(stack=1)),
    Rule(
        "b", jom.chain(prune.Magnitude(sparsity=0.25, structure=prune.Block(4)), quant.Int(bits=8))
    ),
]


def params_of(dtype=jnp.float32):
    shapes = {"a": (13, 7), "b": (8, 6), "stack": (3, 8, 4), "bias": (7,)}
    return {k: jnp.asarray(RNG.normal(size=s), dtype) for k, s in shapes.items()}


def train(tx, params, steps, seed=0):
    """Trains on noisy gradients; returns parameters, state and the sparsity at each step."""

    @jax.jit
    def run(params, state):
        def step(carry, key):
            params, state = carry
            keys = jax.random.split(key, len(params))
            grads = {
                n: p * 0.1 + jax.random.normal(k, p.shape, p.dtype)
                for k, (n, p) in zip(keys, sorted(params.items()), strict=True)
            }
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            masks = state[-1].masks
            off = [jnp.any((params[n] != 0) & ~m) for n, m in masks.items() if m is not None]
            return (params, state), jnp.stack(off).any()

        (params, state), wrong = jax.lax.scan(
            step, (params, state), jax.random.split(jax.random.key(seed), steps)
        )
        return params, state, wrong

    params, state, wrong = run(params, tx.init(params))
    assert not bool(wrong.any()), "a pruned weight was not zero"
    return params, state[-1]


def zeros(x):
    return int(jnp.sum(x == 0))


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("leaf", jnp.float32), ("global", jnp.bfloat16), ("recipe", jnp.float32)],
)
def test_a_thousand_steps_of_adamw(way, dtype):
    params = params_of(dtype)
    options = {"recipe": RECIPE} if way == "recipe" else {"scope": way}
    final = 1.0 if way == "recipe" else 0.8
    schedule = prune.cubic_schedule(final, begin=0, end=600)
    tx = optax.chain(
        optax.adamw(1e-2, weight_decay=0.1), prune.gradual(schedule, every=50, **options)
    )
    trained, state = train(tx, params, 1000)
    assert int(state.step) == 1000
    assert {p.dtype for p in trained.values()} == {jnp.dtype(dtype)}
    assert zeros(trained["bias"]) == 0
    pruned = {k: v for k, v in trained.items() if k != "bias"}
    if way == "leaf":
        for x in pruned.values():
            assert zeros(x) == int(0.8 * x.size + 0.5)
    elif way == "global":
        size = sum(x.size for x in pruned.values())
        assert sum(map(zeros, pruned.values())) == int(0.8 * size + 0.5)
    else:
        small = jom.compress(trained, RECIPE)
        assert zeros(trained["a"]) == int(0.7 * 91 + 0.5)
        assert [zeros(x) for x in trained["stack"]] == [16] * 3
        assert zeros(trained["b"]) == 12
        for name in ("a", "b", "stack"):
            np.testing.assert_array_equal(state.masks[name], small[name].keep())
            if name != "b":
                np.testing.assert_array_equal(trained[name], small[name].materialize())


def test_the_mask_is_that_of_compress_at_every_share():
    params = params_of()
    for share in (0.0, 0.5, 1.0):
        tx = prune.gradual(lambda step, share=share: share, recipe=RECIPE[:1], every=1)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zero, tx.init(params), params)
        drop = int(int(0.7 * 91 + 0.5) * share + 0.5)
        want = prune.Magnitude(sparsity=drop / 91)(params["a"])
        np.testing.assert_array_equal(state.masks["a"], want.keep())
        assert state.masks["b"] is None
        np.testing.assert_array_equal(params["a"] + updates["a"], want.materialize())
        np.testing.assert_array_equal(updates["b"], zero["b"])


def test_masks_stay_between_updates():
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    tx = prune.gradual(lambda step: 0.5, every=3)
    state, masks = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update({"w": -params["w"] * 3}, state, params)
        params = optax.apply_updates(params, updates)
        masks.append(np.asarray(state.masks["w"]))
        params = {"w": params["w"] + jnp.where(masks[-1], 0, 100.0)}  # what must not matter
    for i in (1, 2):
        np.testing.assert_array_equal(masks[i], masks[0])
    assert all(m.sum() == 4 for m in masks)


def test_one_compilation_and_traced_schedules():
    params = params_of()
    schedule = optax.linear_schedule(0.0, 0.9, 100)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune.gradual(schedule, scope="global", every=7))
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    state = tx.init(params)
    for _ in range(20):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == 1


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="ip2")(nn.relu(nn.Dense(16, name="ip1")(x)))


class Nnx(nnx.Module):
    def __init__(self):
        self.ip1 = nnx.Linear(6, 16, rngs=nnx.Rngs(0))
        self.ip2 = nnx.Linear(16, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.ip2(nnx.relu(self.ip1(x)))


@pytest.mark.parametrize("frame", ["linen", "nnx"])
def test_training_a_model(frame):
    x = jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32)
    y = jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)
    if frame == "linen":
        params = Linen().init(jax.random.key(0), x)["params"]
        apply = lambda params, x: Linen().apply({"params": params}, x)  # noqa: E731
    else:
        graph, params, other = nnx.split(Nnx(), nnx.Param, ...)
        apply = lambda params, x: nnx.merge(graph, params, other)(x)  # noqa: E731
    schedule = prune.cubic_schedule(0.75, begin=10, end=60)
    tx = optax.chain(optax.adam(1e-2), prune.gradual(schedule, only=".*kernel", every=10))

    def loss(params):
        return jnp.mean((apply(params, x) - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    first = loss(params)
    for _ in range(80):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert loss(params) < first
    counts = sorted(zeros(p) for p in jax.tree.leaves(params))
    assert counts == [0, 0, 48, 72]
    small = jom.compress(params, [Rule(".*kernel", prune.Magnitude(sparsity=0.75))])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), jom.materialize(small), params)
    assert all(jax.tree.leaves(same))


def test_the_schedule_of_zhu_and_gupta():
    schedule = prune.cubic_schedule(0.9, begin=10, end=110, initial=0.1)
    got = [float(schedule(t)) for t in (0, 10, 60, 110, 500)]
    want = [0.1, 0.1, 0.9 - 0.8 * 0.5**3, 0.9, 0.9]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for bad in ({"sparsity": 1.1}, {"begin": 5, "end": 5}, {"initial": 0.95}):
        with pytest.raises(ValueError, match="cubic_schedule: "):
            prune.cubic_schedule(**{"sparsity": 0.9, "begin": 0, "end": 10, **bad})


def test_wrong_use_raises():
    constant = lambda step: 0.5  # noqa: E731
    params = params_of()
    with pytest.raises(ValueError, match="neither 'leaf' nor 'global'"):
        prune.gradual(constant, scope="layer")
    with pytest.raises(ValueError, match="recipe= says"):
        prune.gradual(constant, recipe=RECIPE, only="a")
    with pytest.raises(ValueError, match="recipe= says"):
        prune.gradual(constant, recipe=RECIPE, scope="global")
    with pytest.raises(ValueError, match="every=0"):
        prune.gradual(constant, every=0)
    with pytest.raises(ValueError, match=r"nothing is pruned; paths are: a, b"):
        prune.gradual(constant, only="c").init(params)
    with pytest.raises(ValueError, match="nothing is pruned"):
        prune.gradual(constant, recipe=[Rule("a", quant.Int(bits=8))]).init(params)
    with pytest.raises(ValueError, match="matches no parameter"):
        prune.gradual(constant, recipe=[Rule("c", prune.Magnitude(sparsity=0.5))]).init(params)
    tx = prune.gradual(constant)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="gradual: step is int32"):
        tx.init({**params, "step": jnp.zeros((), jnp.int32)})
