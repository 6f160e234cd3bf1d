"""Batch statistics, random state and intermediates of models turned into functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional_models import Nnx, X, assert_trees_equal, copied, linen_case

from jaxopt_models._functional import functional


def jitted_if(jit, fn):
    return jax.jit(fn, static_argnames="train") if jit else fn


@pytest.mark.parametrize("jit", [False, True])
def test_linen_batch_statistics(jit):
    model, apply, variables = linen_case()
    before = copied(variables)
    fn, params = functional(model)
    np.testing.assert_array_equal(fn(params, X), apply(X))
    wrapped = jitted_if(jit, fn)
    with pytest.raises(ValueError, match=r"Linen: the call changed state.*mutable=True"):
        wrapped(params, X, train=True)

    fn, params = functional(model, mutable=True)
    wrapped = jitted_if(jit, fn)
    out, new = wrapped(params, X, train=True)
    want, state = apply(X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, want, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        new["batch_stats"],
        state["batch_stats"],
    )
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert_trees_equal(new["params"], params["params"])
    assert (new["batch_stats"]["norm"]["mean"] != params["batch_stats"]["norm"]["mean"]).any()
    assert_trees_equal(copied(variables), before)


@pytest.mark.parametrize("jit", [False, True])
def test_nnx_batch_statistics(jit):
    model = Nnx(rngs=nnx.Rngs(0))
    before = copied(nnx.state(model))
    fn, params = functional(model)
    held = copied(params)
    np.testing.assert_array_equal(fn(params, X), model(X))
    wrapped = jitted_if(jit, fn)
    with pytest.raises(ValueError, match=r"Nnx: the call changed state.*norm/mean.*mutable=True"):
        wrapped(params, X, train=True)

    fn, params = functional(model, mutable=True)
    wrapped = jitted_if(jit, fn)
    out, new = wrapped(params, X, train=True)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert_trees_equal(copied(nnx.state(model)), before)
    assert_trees_equal(copied(params), held)
    again, _ = wrapped(new, X, train=False)
    want = model(X, train=True)  # Only now does the user's own model move.
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(
        new["norm"]["mean"].get_value(), model.norm.mean.get_value(), atol=1e-6
    )
    np.testing.assert_allclose(again, model(X), atol=1e-5)


def test_later_changes_of_an_nnx_model_do_not_reach_params():
    model = Nnx(rngs=nnx.Rngs(0))
    fn, params = functional(model)
    want = fn(params, X)
    model.dense.kernel.set_value(jnp.zeros((3, 5)))
    model(X, train=True)
    np.testing.assert_array_equal(fn(params, X), want)


def test_linen_dropout_takes_its_keys_at_the_call():
    model, apply, _ = linen_case(0.5)
    fn, params = functional(model, mutable=True)
    for seed in (0, 1):
        rngs = {"dropout": jax.random.key(seed)}
        out, _ = fn(params, X, train=True, rngs=rngs)
        want, _ = apply(X, train=True, rngs=rngs, mutable=["batch_stats"])
        np.testing.assert_array_equal(out, want)


def test_linen_dropout_alone_changes_no_state():
    module = nn.Sequential([nn.Dense(5), nn.Dropout(0.5, deterministic=False)])
    rngs = {"dropout": jax.random.key(3)}
    variables = module.init({"params": jax.random.key(0), **rngs}, X)
    fn, params = functional((module, variables))
    np.testing.assert_array_equal(fn(params, X, rngs=rngs), module.apply(variables, X, rngs=rngs))
    fn, params = functional((module, variables), mutable=True)
    out, new = fn(params, X, rngs=rngs)
    assert_trees_equal(new, params)
    np.testing.assert_array_equal(out, module.apply(variables, X, rngs=rngs))


def test_nnx_dropout_repeats_its_noise_unless_mutable():
    model = nnx.Sequential(nnx.Linear(3, 64, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    fn, params = functional(model)
    np.testing.assert_array_equal(fn(params, X), fn(params, X))
    fn, params = functional(model, mutable=True)
    first, new = fn(params, X)
    second, _ = fn(new, X)
    assert (first != second).any()
    np.testing.assert_array_equal(first, model(X))
    np.testing.assert_array_equal(second, model(X))


def test_nnx_gradient_by_parameters_beside_random_state():
    model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    fn, params = functional(model)
    weights, rest = nnx.split_state(params, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda w: fn(nnx.merge_state(w, rest), X).sum()))(weights)
    assert all((g != 0).any() for g in jax.tree.leaves(grads))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("mutable", [False, True])
def test_sown_intermediates_are_dropped(mutable):
    class SowsLinen(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "h", x)
            return nn.Dense(2)(x)

    class SowsNnx(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.sow(nnx.Intermediate, "h", x)
            return self.dense(x)

    module = SowsLinen()
    variables = {"params": module.init(jax.random.key(0), X)["params"]}
    for model in ((module, variables), SowsNnx()):
        fn, params = functional(model, mutable=mutable)
        out = jax.jit(fn)(params, X)
        if mutable:
            out, new = out
            assert jax.tree.structure(new) == jax.tree.structure(params)
        assert out.shape == (4, 2)


def test_state_that_appears_in_the_call_is_refused():
    class Counts(nnx.Module):
        def __call__(self, x):
            self.seen = nnx.BatchStat(jnp.sum(x))
            return x

    fn, params = functional(Counts())
    with pytest.raises(ValueError, match=r"changed state.*seen"):
        fn(params, X)
    fn, params = functional(Counts(), mutable=True)
    with pytest.raises(ValueError, match=r"changed the structure of params at .*seen"):
        fn(params, X)
