"""From a model object to a function and its parameters: forms, paths, refusals."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional_models import Nnx, X, linen_case

from jaxopt_models import models
from jaxopt_models._encoded import Encoded, leaf, materialize, static
from jaxopt_models._functional import functional

# ---------------------------------------------------------------- plain layers, all forms


def test_params_of_a_linen_model_are_the_inside_of_params():
    module = nn.Dense(5)
    variables = module.init(jax.random.key(0), X)
    want = module.apply(variables, X)
    for model in (
        (module, variables),
        module.bind(variables),
        (module, flax.core.freeze(variables)),
    ):
        fn, params = functional(model)
        assert sorted(params) == ["bias", "kernel"]
        np.testing.assert_array_equal(fn(params, X), want)
        np.testing.assert_array_equal(jax.jit(fn)(params, X), want)


def test_params_of_a_linen_model_with_state_are_all_collections():
    model, _, variables = linen_case()
    _, params = functional(model)
    assert sorted(params) == ["batch_stats", "params"]
    assert jax.tree.structure(params) == jax.tree.structure(variables)


def test_params_of_an_nnx_model_are_its_state():
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    fn, params = functional(model)
    assert isinstance(params, nnx.State) and isinstance(params["kernel"], nnx.Param)
    np.testing.assert_array_equal(fn(params, X), model(X))
    np.testing.assert_array_equal(jax.jit(fn)(params, X), jax.jit(lambda x: model(x))(X))


@pytest.mark.parametrize("make", [lambda: linen_case()[0], lambda: Nnx(rngs=nnx.Rngs(0))])
def test_gradient_and_vmap(make):
    fn, params = functional(make(), method="embed")

    def kernel(tree):
        return (
            tree["params"]["dense"]["kernel"]
            if isinstance(tree, dict)
            else tree["dense"]["kernel"].get_value()
        )

    def loss(params, x):
        return fn(params, x).sum()

    grads = jax.jit(jax.grad(loss, allow_int=True))(params, X)
    np.testing.assert_allclose(kernel(grads), np.tile(np.asarray(X.sum(0))[:, None], 5), rtol=1e-6)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    both = jax.vmap(fn, in_axes=(0, None))(stack, X)
    np.testing.assert_allclose(both[1], fn(params, X), rtol=1e-6, atol=1e-6)


def test_a_tied_nnx_parameter_is_there_once_and_its_gradients_add_up():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(1))
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    fn, params = functional(Tied())
    (w,) = jax.tree.leaves(params)
    (grad,) = jax.tree.leaves(jax.grad(lambda p: fn(p, X).sum())(params))
    np.testing.assert_allclose(grad, jax.grad(lambda w: (X @ w @ w).sum())(w), rtol=1e-5)


def test_the_reference_models_go_through():
    images = np.zeros((2, 28, 28), np.uint8)
    linen = models.LeNet300()
    fn, params = functional((linen, linen.init(jax.random.key(0), images)))
    twin_fn, twin = functional(models.nnx.LeNet300(rngs=nnx.Rngs(0)))
    assert fn(params, images).shape == twin_fn(twin, images).shape == (2, 10)
    assert sorted(params) == sorted(twin) == ["ip1", "ip2", "ip3"]


# ---------------------------------------------------------------- refusals and names


@pytest.mark.parametrize(
    ("model", "came"),
    [
        ({"w": X}, "of type dict"),
        (lambda params, x: x, "of type function"),
        (nn.Dense(3), "an unbound linen Dense"),
        (nn.Dense, "the class "),
        ((nn.Dense(3),), r"a tuple of \(Dense\)"),
        ((nn.Dense(3), X), r"a tuple of \(Dense, "),
    ],
)
def test_other_models_are_refused(model, came):
    with pytest.raises(TypeError, match=came) as caught:
        functional(model)
    for form in ("nnx.Module", "module.bind(variables)", "(linen module, variables)"):
        assert form in str(caught.value)


def test_other_arguments_are_refused():
    module = nn.Dense(5)
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"no \"params\" but \['bias', 'kernel'\]"):
        functional((module, variables["params"]))
    with pytest.raises(ValueError, match="Dense has no method 'forward'"):
        functional((module, variables), method="forward")
    with pytest.raises(ValueError, match="Linear has no method 'forward'"):
        functional(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), method="forward")
    with pytest.raises(ValueError, match=r"bound with rngs \['dropout'\]"):
        functional(module.bind(variables, rngs={"dropout": jax.random.key(0)}))


@leaf
class Halved(Encoded):
    """Twice what it stores."""

    core: tuple[int, ...] = static()
    half: jax.Array

    @property
    def dtype(self):
        return self.half.dtype

    @property
    def stack(self):
        return self.half.shape[: self.half.ndim - len(self.core)]

    def rebuild(self):
        return self.half * 2


def test_compressed_parameters_are_refused_until_materialized():
    module = nn.Dense(5)
    fn, params = functional((module, module.init(jax.random.key(0), X)))
    small = {**params, "kernel": Halved(core=(3, 5), half=params["kernel"] / 2)}
    with pytest.raises(TypeError, match=r"Dense: parameter kernel is compressed.*materialize"):
        fn(small, X)
    np.testing.assert_array_equal(fn(materialize(small), X), fn(params, X))

    fn, params = functional(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    small = jax.tree.map(lambda a: Halved(core=a.shape, half=a / 2), params)
    with pytest.raises(TypeError, match=r"Linear: parameter bias.* is compressed.*materialize"):
        fn(small, X)


def test_fn_is_named_after_the_model_and_method():
    model, _, _ = linen_case()
    assert functional(model)[0].__name__ == "Linen"
    fn, _ = functional(model, method="embed", mutable=True)
    assert fn.__name__ == "Linen_embed" and "(out, new_params)" in fn.__doc__
    assert functional(Nnx(rngs=nnx.Rngs(0)))[0].__name__ == "Nnx"
