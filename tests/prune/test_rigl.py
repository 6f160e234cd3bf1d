import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_models import prune

RNG = np.random.default_rng(0)
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=(16, 10)), jnp.float32),
    "b": {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 2, 4)), jnp.float32), "bias": jnp.ones(4)},
}
KERNELS = (lambda t: t["a"], lambda t: t["b"]["kernel"])
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, mu_dtype=jnp.bfloat16)),
}


def rigl(optimizer, **options):
    options = {"sparsity": 0.8, "key": jax.random.key(0), "until": 60, "every": 5, **options}
    return prune.rigl(optimizer, **options)


def grads_at(params, i):
    rng = np.random.default_rng(i)
    return jax.tree.map(lambda p: np.asarray(p + rng.normal(size=p.shape), np.float32), params)


def active(size, sparsity=0.8):
    return size - int(sparsity * size + 0.5)


def moments(inner):
    """Every tree in the state of an optimizer that is shaped like the parameters."""
    like = jax.tree.structure(PARAMS)
    found = jax.tree.leaves(inner, is_leaf=lambda x: jax.tree.structure(x) == like)
    return [x for x in found if jax.tree.structure(x) == like]


def check_moved(before, state, params):
    """What was grown starts at zero, and neither it nor what was dropped has a moment."""
    trees = moments(state.inner)
    assert trees
    for get in KERNELS:
        old, new = get(before.masks), get(state.masks)
        grown, dropped, kept = new & ~old, old & ~new, old & new
        assert grown.any()
        assert grown.sum() == dropped.sum()
        assert not np.any(np.asarray(get(params))[grown])
        for tree in trees:
            moment = np.asarray(get(tree), np.float32)
            assert not np.any(moment[~kept])
            assert np.all(moment[kept])
    assert all(np.all(tree["b"]["bias"] != 0) for tree in trees)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparsity_is_exact_and_moments_are_reset(name):
    tx = rigl(OPTIMIZERS[name])
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    params, state = jax.device_get((PARAMS, tx.init(PARAMS)))
    for i in range(80):
        before = state
        updates, state = jax.device_get(step(grads_at(params, i), state, params))
        params = jax.tree.map(np.add, params, updates)
        for get in KERNELS:
            mask = get(state.masks)
            assert mask.sum() == active(mask.size)
            assert not np.any(np.asarray(get(params))[~mask])
            assert (mask == get(before.masks)).all() or (i % 5 == 0 and 0 < i < 60)
        assert state.masks["b"]["bias"] is None
        if i in (5, 10, 15):
            check_moved(before, state, params)
    assert step._cache_size() == 1


def test_it_drops_the_smallest_and_grows_the_largest_gradients():
    tx = rigl(optax.sgd(0.0), every=1, until=1000, fraction=0.5)
    params = {"w": PARAMS["a"]}
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    params, old = optax.apply_updates(params, updates), np.asarray(state.masks["w"])
    grads = {"w": jnp.asarray(RNG.normal(size=(16, 10)), jnp.float32)}
    _, state = tx.update(grads, state, params)
    new = np.asarray(state.masks["w"])
    change = int(0.5 / 2 * (1 + np.cos(np.pi / 1000)) * 32)
    w, g = np.abs(np.asarray(params["w"])), np.abs(np.asarray(grads["w"]))
    smallest = np.argsort(np.where(old, w, np.inf).ravel())[:change]
    stays = old.copy().ravel()
    stays[smallest] = False
    want = stays.copy()
    want[np.argsort(np.where(stays, -1, g.ravel()))[::-1][:change]] = True
    np.testing.assert_array_equal(new.ravel(), want)


def test_it_finds_the_weights_that_matter():
    # One input of sixteen carries the signal; a random mask holds an eighth of its weights.
    x = jax.random.normal(jax.random.key(1), (256, 16))
    target = jnp.zeros((16, 8)).at[3].set(jnp.arange(1.0, 9.0))
    y = x @ target
    tx = rigl(optax.adam(3e-2), sparsity=1 - 16 / 128, until=400, every=10)
    params = {"w": jax.random.normal(jax.random.key(2), (16, 8)) * 0.1}

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    assert int(state.masks["w"][3].sum()) < 8
    for _ in range(600):
        params, state = step(params, state)
    assert bool(state.masks["w"][3].all())
    np.testing.assert_allclose(params["w"][3], target[3], atol=0.3)


def test_first_masks_follow_the_key_and_the_path():
    params = {"a": PARAMS["a"], "b": PARAMS["a"]}
    one, same = (rigl(optax.sgd(0.1)).init(params).masks for _ in range(2))
    other = rigl(optax.sgd(0.1), key=jax.random.key(1)).init(params).masks
    np.testing.assert_array_equal(one["a"], same["a"])
    assert bool(jnp.any(one["a"] != one["b"]))
    assert bool(jnp.any(one["a"] != other["a"]))


def test_masks_stay_after_the_last_update():
    tx = rigl(optax.sgd(0.1), until=3, every=1, only="a")
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    params, state = PARAMS, tx.init(PARAMS)
    masks = []
    for i in range(8):
        updates, state = step(grads_at(params, i), state, params)
        params = jax.tree.map(np.add, params, updates)
        masks.append(np.asarray(state.masks["a"]))
    assert (masks[1] != masks[0]).any()
    assert all((m == masks[3]).all() for m in masks[3:])


def test_wrong_use_raises():
    for name, value in (
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("fraction", 0.0),
        ("fraction", 1.0),
        ("every", 0),
        ("until", -1),
    ):
        with pytest.raises(ValueError, match=f"rigl: {name}={value}"):
            rigl(optax.sgd(0.1), **{name: value})
    tx = rigl(optax.adam(0.1))
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="rigl: nothing is pruned"):
        rigl(optax.adam(0.1), only="c").init(PARAMS)
    with pytest.raises(TypeError, match="rigl: n is int32"):
        tx.init({**PARAMS, "n": jnp.arange(3)})
