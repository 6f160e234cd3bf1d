import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_models as jom
from jaxopt_models._paths import flatten

INT8 = [jom.Rule(".*kernel", jom.quant.Int(bits=8))]
X = jnp.ones((2, 3))


def paths(tree):
    return {p.path: p.reason for p in flatten(tree)[0]}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4, name="ip1")(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.ip1 = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2)])


@pytest.fixture(scope="module")
def variables():
    return Linen().init(jax.random.key(0), X)


@pytest.fixture(scope="module")
def model():
    return Nnx(nnx.Rngs(0))


def test_linen_variables_and_params_have_the_same_paths(variables):
    inside = paths(variables["params"])
    whole = paths(variables)
    want = {"ip1/kernel", "ip1/bias", "BatchNorm_0/scale", "BatchNorm_0/bias"}
    assert set(inside) == want
    assert {p for p, why in whole.items() if not why} == want
    assert paths({"params": variables["params"]}).keys() == {f"params/{p}" for p in want}


def test_batch_statistics_are_no_parameters(variables):
    whole = paths(variables)
    assert whole["batch_stats/BatchNorm_0/mean"] == "collection 'batch_stats'"
    with pytest.raises(ValueError, match="it matches no parameter"):
        jom.compress(variables, [jom.Rule("batch_stats/.*", jom.quant.Int(bits=8))])


def test_frozen_linen_variables(variables):
    frozen = flax.core.freeze(variables)
    assert paths(frozen) == paths(variables)
    small = jom.compress(frozen, INT8)
    assert isinstance(small, flax.core.FrozenDict)
    assert isinstance(small["params"]["ip1"]["kernel"], jom.Encoded)


def test_nnx_state_and_module_have_the_same_paths(model):
    state = nnx.state(model)
    assert paths(model) == paths(state)
    mine = {p for p, why in paths(state).items() if not why}
    assert mine == {
        "ip1/kernel",
        "ip1/bias",
        "norm/scale",
        "norm/bias",
        "layers/0/kernel",
        "layers/1/kernel",
    }


def test_what_is_no_parameter_of_an_nnx_state_says_why(model):
    why = paths(nnx.state(model))
    assert why["norm/mean"] == "nnx.BatchStat"
    assert why["drop/rngs/key"].startswith("nnx.Rng")
    assert why["drop/rngs/count"].startswith("nnx.Rng")


def test_an_nnx_state_is_compressed_inside_its_boxes(model):
    state = nnx.state(model)
    small = jom.compress(state, INT8)
    assert isinstance(small, nnx.State)
    assert isinstance(small["ip1"]["kernel"], nnx.Param)
    assert isinstance(small["ip1"]["kernel"].get_value(), jom.Encoded)
    dense = jom.materialize(small)
    want = jom.quant.Int(bits=8)(state["ip1"]["kernel"][...]).materialize()
    np.testing.assert_array_equal(dense["ip1"]["kernel"][...], want)
    nnx.update(nnx.clone(model), dense)


def test_an_nnx_module_itself_is_compressed(model):
    small = jom.compress(model, INT8)
    assert isinstance(small, Nnx)
    assert isinstance(small.ip1.kernel.get_value(), jom.Encoded)
    assert not isinstance(model.ip1.kernel[...], jom.Encoded)
    dense = jom.materialize(small)
    assert dense.ip1(X).shape == (2, 4)


def test_a_partitioned_parameter_keeps_its_box():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    params = nn.Dense(4, kernel_init=init).init(jax.random.key(0), X)["params"]
    assert paths(params) == {"bias": "", "kernel": ""}
    small = jom.compress(params, INT8)
    assert isinstance(small["kernel"], nn.Partitioned)
    assert small["kernel"].names == ("in", "out")
    assert isinstance(small["kernel"].value, jom.Encoded)
    dense = jom.materialize(small)
    assert isinstance(dense["kernel"], nn.Partitioned)
    np.testing.assert_allclose(dense["kernel"].value, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("tree", "want"),
    [
        ({"a": {"kernel": X}}, ["a/kernel"]),
        ({"net/~/linear": {"w": X, "b": X}}, ["net/~/linear/b", "net/~/linear/w"]),
        ([X, (X, {"w": X})], ["0", "1/0", "1/1/w"]),
        ({"value": X, "kernel": {"value": X}}, ["kernel/value", "value"]),
        ({"params": {"w": X}}, ["params/w"]),
        ({"params": X, "other": X}, ["other", "params"]),
        ({"params": {"w": X}, "encoder": {"w": X}}, ["encoder/w", "params/w"]),
        (X, [""]),
        ({0: X, 1: X}, ["0", "1"]),
    ],
    ids=str,
)
def test_plain_trees(tree, want):
    assert list(paths(tree)) == want


def test_integers_and_strangers_are_no_parameters():
    why = paths({"w": X, "step": jnp.zeros((), jnp.int32), "name": "x", "key": jax.random.key(0)})
    assert why["w"] == ""
    assert why["step"] == "int32"
    assert why["name"] == "str"
    assert why["key"]


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": X}, "a/b": X},
        {"params": {"batch_stats": {"m": X}}, "batch_stats": {"m": X}},
    ],
    ids=["slash", "collection"],
)
def test_equal_paths_raise(tree):
    with pytest.raises(ValueError, match="two leaves have the path"):
        flatten(tree)


def test_an_encoded_leaf_is_one_leaf(variables):
    small = jom.compress(variables, INT8)
    assert paths(small) == paths(variables)


def test_a_tree_is_put_together_again(model, variables):
    for tree in (variables, nnx.state(model), [X, (X, None)], {"a": X, "n": "text"}):
        leaves, unflatten = flatten(tree)
        again = unflatten([p.value for p in leaves])
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        assert all(
            a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True)
        )
