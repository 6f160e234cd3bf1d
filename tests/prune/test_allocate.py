import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models import Axes, prune


def params_of(seed, scales=(1.0, 0.5, 2.0)):
    rng = np.random.default_rng(seed)
    shapes = [(7, 5), (4, 3, 2), (12, 6)]
    arrays = [rng.normal(size=s) * a for s, a in zip(shapes, scales, strict=True)]
    params = {f"layer_{i}": {"kernel": jnp.asarray(a, jnp.float32)} for i, a in enumerate(arrays)}
    params["layer_0"]["bias"] = jnp.full(5, 1e-9)
    return params


def kernels(tree):
    return [np.asarray(tree[k]["kernel"]) for k in sorted(tree)]


def largest(params, sparsity):
    """Marks what a sort of all magnitudes keeps, layer by layer."""
    flat = np.abs(np.concatenate([k.ravel() for k in kernels(params)]))
    count = flat.size - int(sparsity * flat.size + 0.5)
    marks = np.zeros(flat.size, bool)
    marks[np.lexsort((np.arange(flat.size), -flat.astype(np.float64)))[:count]] = True
    return np.split(marks, np.cumsum([k.size for k in kernels(params)])[:-1])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), sparsity=st.floats(0, 0.95))
def test_the_plan_counts_the_largest_of_all(seed, sparsity):
    params = params_of(seed)
    counts = [int(m.sum()) for m in largest(params, sparsity)]
    if min(counts) == 0:
        with pytest.raises(ValueError, match="would lose all of its"):
            prune.allocate_global(params, sparsity=sparsity)
        return
    recipe = prune.allocate_global(params, sparsity=sparsity)
    kept = [
        w.size - int(rule.encoder.sparsity * w.size + 0.5)
        for rule, w in zip(recipe, kernels(params), strict=True)
    ]
    assert kept == counts


@pytest.mark.parametrize("sparsity", [0.0, 0.45])
def test_compress_keeps_the_largest_of_all(sparsity):
    params = params_of(3)
    small = jom.compress(params, prune.allocate_global(params, sparsity=sparsity))
    for layer, want in zip(sorted(small), largest(params, sparsity), strict=True):
        np.testing.assert_array_equal(np.asarray(small[layer]["kernel"].keep()).ravel(), want)
    assert small["layer_0"]["bias"] is params["layer_0"]["bias"]


def test_rules_are_exact_per_path_and_are_data():
    params = params_of(0, scales=(1.0, 1.0, 1.0))
    recipe = prune.allocate_global(params, sparsity=0.8)
    assert [r.path for r in recipe] == [f"layer_{i}/kernel" for i in range(3)]
    assert jom.recipe_from_json(jom.recipe_to_json(recipe)) == recipe
    dropped = sum(r.encoder.sparsity * params[r.path.split("/")[0]]["kernel"].size for r in recipe)
    assert dropped == pytest.approx(int(0.8 * (35 + 24 + 72) + 0.5))


def test_paths_are_escaped():
    params = {"a.b": jnp.ones((2, 2)), "a+b": jnp.ones((2, 2)), "a(b": jnp.ones((2, 2))}
    small = jom.compress(params, prune.allocate_global(params, sparsity=0.0))
    assert all(isinstance(x, jom.Masked) for x in small.values())


def test_only_selects():
    params = params_of(1)
    recipe = prune.allocate_global(params, sparsity=0.5, only="layer_[01]/.*")
    assert [r.path for r in recipe] == ["layer_0/kernel", "layer_1/kernel"]
    with pytest.raises(ValueError, match="only='bias' selects no parameter"):
        prune.allocate_global(params, sparsity=0.5, only="bias")


def test_stacked_layers_share_the_threshold():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 5)), jnp.float32)
    w = w * jnp.array([1.0, 5.0, 0.2, 2.0])[:, None, None]
    params = {"scanned": w, "norm": jnp.ones((4, 6))}
    recipe = prune.allocate_global(params, sparsity=0.5, only="scanned", axes=Axes(stack=1))
    assert recipe[0].encoder.across_stack
    small = jom.compress(params, recipe)["scanned"]
    assert int(small.keep().sum()) == 60
    assert small.stack == (4,)
    flat = np.sort(np.abs(np.asarray(w)).ravel())
    np.testing.assert_array_equal(small.keep(), np.abs(np.asarray(w)) >= flat[60])


def test_vectors_of_a_stack_stay_dense():
    params = {"w": jnp.ones((4, 6, 5)), "norm": jnp.full((4, 6), 0.1)}
    recipe = prune.allocate_global(params, sparsity=0.5, axes=Axes(stack=1))
    assert [r.path for r in recipe] == ["w"]


def test_a_layer_that_would_vanish_raises():
    params = params_of(0, scales=(1.0, 1e-6, 1.0))
    with pytest.raises(ValueError, match=r"layer_1/kernel would lose all of its 24 entries"):
        prune.allocate_global(params, sparsity=0.9)


@pytest.mark.parametrize("sparsity", [1.0, -0.1])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="not in"):
        prune.allocate_global(params_of(0), sparsity=sparsity)


def test_nan_raises_with_the_path():
    params = params_of(0)
    params["layer_1"]["kernel"] = params["layer_1"]["kernel"] * jnp.nan
    with pytest.raises(ValueError, match="allocate_global: layer_1/kernel: 24 of 24"):
        prune.allocate_global(params, sparsity=0.5)


def test_mixed_types_are_ranked_together():
    params = {"a": jnp.full((2, 2), 2.0, jnp.bfloat16), "b": jnp.array([[1.0, 3.0], [1.0, 3.0]])}
    small = jom.compress(params, prune.allocate_global(params, sparsity=0.25))
    assert int(small["a"].keep().sum()) == 4
    np.testing.assert_array_equal(small["b"].keep(), [[False, True], [False, True]])
