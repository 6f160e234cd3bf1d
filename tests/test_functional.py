import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_models import models
from jaxopt_models._encoded import Encoded, leaf, materialize, static
from jaxopt_models._functional import functional

X = jnp.arange(12.0).reshape(4, 3) / 7 - 0.5


class Linen(nn.Module):
    """Dense, BatchNorm and Dropout, with a second method."""

    rate: float = 0.0

    def setup(self):
        self.dense = nn.Dense(5)
        self.norm = nn.BatchNorm(momentum=0.5)
        self.drop = nn.Dropout(self.rate)

    def __call__(self, x, train=False):
        h = self.norm(self.dense(x), use_running_average=not train)
        return self.drop(h, deterministic=not train)

    def embed(self, x):
        return self.dense(x)


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, *, rngs, rate=0.0):
        self.dense = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, train=False):
        h = self.norm(self.dense(x), use_running_average=not train)
        return self.drop(h, deterministic=not train)

    def embed(self, x):
        return self.dense(x)


def copied(tree):
    return jax.tree.map(
        lambda a: np.array(
            jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        ),
        tree,
    )


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def linen_case(rate=0.0):
    module = Linen(rate)
    variables = module.init(jax.random.key(0), X)
    return (module, variables), lambda x, **k: module.apply(variables, x, **k), variables


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
    np.testing.assert_allclose(both[1], fn(params, X), rtol=1e-6)


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


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("jit", [False, True])
def test_linen_batch_statistics(jit):
    model, apply, variables = linen_case()
    before = copied(variables)
    fn, params = functional(model)
    np.testing.assert_array_equal(fn(params, X), apply(X))
    wrapped = jax.jit(fn, static_argnames="train") if jit else fn
    with pytest.raises(ValueError, match=r"Linen: the call changed state.*mutable=True"):
        wrapped(params, X, train=True)

    fn, params = functional(model, mutable=True)
    wrapped = jax.jit(fn, static_argnames="train") if jit else fn
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
    wrapped = jax.jit(fn, static_argnames="train") if jit else fn
    with pytest.raises(ValueError, match=r"Nnx: the call changed state.*norm/mean.*mutable=True"):
        wrapped(params, X, train=True)

    fn, params = functional(model, mutable=True)
    wrapped = jax.jit(fn, static_argnames="train") if jit else fn
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
