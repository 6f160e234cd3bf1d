import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, chain, codebook, prune, quant
from jaxopt_models._paths import flatten
from jaxopt_models.testing import bits, compilations, leaf_bits

INT8 = quant.Int(bits=8)
HALF = prune.Magnitude(sparsity=0.5)
W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---------------------------------------------------------------- one recipe for all frameworks

RECIPE = [
    Rule(".*ip2/.*", None),
    Rule(".*/kernel", chain(HALF, codebook.KMeans(bits=3))),
    Rule(".*/bias", quant.Int(bits=4)),
]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="ip2")(nn.Dense(8, name="ip1", bias_init=nn.initializers.ones)(x))


class Nnx(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.ip1 = nnx.Linear(16, 8, rngs=rngs)
        self.ip2 = nnx.Linear(8, 4, rngs=rngs)
        for name, layer in (("ip1", self.ip1), ("ip2", self.ip2)):
            layer.kernel[...] = params[name]["kernel"]
            layer.bias[...] = params[name]["bias"]


def test_linen_nnx_and_plain_trees_get_the_same_bits():
    variables = Linen().init(jax.random.key(0), jnp.ones((1, 16)))
    plain = variables["params"]
    model = Nnx(plain)
    trees = [plain, variables, nnx.state(model), model, {"batch_stats": {}, **variables}]
    key = jax.random.key(5)
    want = None
    for tree in trees:
        small = jom.compress(tree, RECIPE, key=key)
        got = {
            p.path.removeprefix("params/"): leaf_bits(p.value)
            for p in flatten(small)[0]
            if not p.reason
        }
        want = want or got
        assert got == want


# ---------------------------------------------------------------- leaves of all kinds


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoder", [INT8, HALF, codebook.KMeans(bits=2), chain(HALF, INT8)])
def test_nan_and_inf_raise_with_the_path(bad, encoder):
    params = {"ip1": {"kernel": W.at[3, 2].set(bad)}}
    with pytest.raises(ValueError, match="compress: ip1/kernel: 1 of 128 entries are NaN or Inf"):
        jom.compress(params, [Rule(".*", encoder)])


def test_complex_parameters_raise_with_the_path():
    with pytest.raises(TypeError, match="compress: a/b: expected a real floating tensor"):
        jom.compress({"a": {"b": W.astype(jnp.complex64)}}, [Rule(".*", INT8)])


def test_empty_parameters_raise_with_the_path():
    with pytest.raises(ValueError, match=r"compress: w: the tensor is empty, shape \(0, 3\)"):
        jom.compress({"w": jnp.zeros((0, 3))}, [Rule(".*", INT8)])


def test_integers_pass_through_and_cannot_be_named():
    params = {"step": jnp.arange(3), "w": W, "key": jax.random.key(0), "name": "text"}
    small = jom.compress(params, [Rule(".*", INT8)])
    assert small["step"] is params["step"]
    assert small["key"] is params["key"]
    assert small["name"] == "text"
    with pytest.raises(ValueError, match=r"matches no parameter \(step is int32; rules see float"):
        jom.compress(params, [Rule("step", INT8)])


@pytest.mark.parametrize(
    "encoder",
    [
        quant.Int(bits=3),
        quant.Int(bits=8, symmetric=False),
        prune.Magnitude(sparsity=0.0),
        codebook.KMeans(bits=1),
        chain(HALF, INT8),
    ],
)
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_single_number(encoder, shape):
    w = jnp.full(shape, -0.7)
    small = jom.compress({"w": w}, [Rule("w", encoder)])["w"]
    assert small.shape == w.shape
    jom.verify({"w": small})
    kept = 0 if isinstance(small, jom.Masked) and not small.keep().any() else -0.7
    np.testing.assert_allclose(small.materialize(), np.full(shape, kept), rtol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32])
def test_dtypes_are_kept(dtype):
    for encoder in (INT8, HALF, codebook.KMeans(bits=2)):
        small = encoder(W.astype(dtype))
        assert small.dtype == small.materialize().dtype == dtype


def test_numpy_arrays_are_parameters():
    small = jom.compress({"w": np.asarray(W)}, [Rule("w", chain(HALF, INT8))])
    assert leaf_bits(small) == leaf_bits(jom.compress({"w": W}, [Rule("w", chain(HALF, INT8))]))


def test_a_group_that_does_not_divide_lists_those_that_do():
    params = {"ip1": {"kernel": normal(12, 4)}}
    message = r"compress: ip1/kernel: group=8 does not divide the 12 inputs .* \[2, 3, 4, 6, 12\]"
    with pytest.raises(ValueError, match=message):
        jom.compress(params, [Rule(".*", quant.Int(bits=4, group=8))])


# ---------------------------------------------------------------- twice, donated, stacked, tied


@pytest.mark.parametrize("second", [INT8, codebook.KMeans(bits=2), quant.Int(bits=4, group=4)])
def test_compressing_twice_is_a_chain(second):
    once = jom.compress({"w": W, "b": W}, [Rule("w", HALF)])
    twice = jom.compress(once, [Rule("w", second)])
    chained = jom.compress({"w": W, "b": W}, [Rule("w", chain(HALF, second))])
    assert jax.tree.structure(twice) == jax.tree.structure(chained)
    assert leaf_bits(twice) == leaf_bits(chained)


def test_a_mask_survives_all_later_steps():
    mask = HALF(W)
    for e in (prune.Magnitude(sparsity=0.75), INT8, codebook.KMeans(bits=2), quant.Int(bits=4)):
        later = e(mask)
        assert not bool(jnp.any(later.keep() & ~mask.keep()))
        assert not bool(jnp.any(jnp.where(mask.keep(), 0, later.materialize())))


@pytest.mark.parametrize("first", [INT8, chain(HALF, INT8)])
def test_pruning_codes_raises(first):
    with pytest.raises(ValueError, match=r"compress: w: .* prune first"):
        jom.compress(jom.compress({"w": W}, [Rule("w", first)]), [Rule("w", HALF)])


def test_keep_gives_a_mask_whatever_the_encoder():
    keep = W > 0
    for encoder in (INT8, codebook.KMeans(bits=2), HALF, chain(INT8, codebook.KMeans(bits=2))):
        small = encoder(W, keep=keep)
        assert isinstance(small, jom.Masked)
        assert not bool(jnp.any(jnp.where(keep, 0, small.materialize())))
    np.testing.assert_array_equal(INT8(W, keep=keep).keep(), keep)
    with pytest.raises(ValueError, match="keep has shape"):
        INT8(W, keep=keep[0])


def test_keep_on_a_leaf_narrows_its_mask():
    small = chain(HALF, INT8)(W)
    keep = W > 0
    np.testing.assert_array_equal(INT8(small, keep=keep).keep(), small.keep() & keep)
    np.testing.assert_array_equal(INT8(INT8(W), keep=keep).keep(), keep)


@pytest.mark.parametrize(
    "encoder",
    [
        HALF,
        quant.Int(bits=4, group=4),
        quant.Int(bits=3, symmetric=False),
        prune.Magnitude(structure=prune.NofM(2, 4)),
        prune.Magnitude(sparsity=0.5, structure=prune.Block(4)),
        codebook.KMeans(bits=2, per="channel"),
        chain(HALF, codebook.KMeans(bits=3)),
    ],
)
def test_a_stack_is_encoded_layer_by_layer(encoder):
    w = normal(2, 3, 16, 8)
    small = jom.compress({"w": w}, [Rule("w", encoder, Axes(stack=2))])["w"]
    assert small.stack == (2, 3)
    for i in range(2):
        for j in range(3):
            one = jax.tree.map(lambda x, i=i, j=j: x[i, j], small)
            assert leaf_bits(one) == leaf_bits(encoder(w[i, j])), (i, j)


def test_axes_of_a_leaf_must_agree_with_its_stack():
    small = HALF(normal(3, 8, 4), axes=Axes(stack=1))
    assert INT8(small).values.scale.shape == (3, 4, 1)
    with pytest.raises(ValueError, match="stack=0, the leaf has stack axes"):
        INT8(small, axes=Axes())


def test_wrong_axes_raise():
    for axes, why in [
        (Axes(out=(2,)), "names axis 2"),
        (Axes(out=(0, -2)), "twice"),
        (Axes(out=(0,), stack=1), "names a stack axis"),
        (Axes(stack=3), "stack=3"),
    ]:
        with pytest.raises(ValueError, match=f"compress: w: axes: .*{why}"):
            jom.compress({"w": W}, [Rule("w", INT8, axes)])
    with pytest.raises(TypeError, match=r"write out=\(0,\)"):
        Axes(out=0)
    assert Axes(out=[0, 1]) == Axes(out=(0, 1))


# ---------------------------------------------------------------- keys and compilation

RANDOM = codebook.KMeans(bits=3, start="random", iterations=1)
CODE = """
import jax, numpy as np, jax.numpy as jnp, jaxopt_models as jom
w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
e = jom.codebook.KMeans(bits=3, start="random", iterations=1)
small = jom.compress({"a": w, "b": w}, [jom.Rule(".*", e)], key=jax.random.key(1))
print(np.asarray(small["a"].codebook).tobytes().hex())
"""


def test_keys_differ_by_path_and_are_the_same_in_every_process():
    small = jom.compress({"a": W, "b": W}, [Rule(".*", RANDOM)], key=jax.random.key(1))
    assert leaf_bits(small["a"]) != leaf_bits(small["b"])
    alone = jom.compress({"a": W}, [Rule(".*", RANDOM)], key=jax.random.key(1))
    assert leaf_bits(alone["a"]) == leaf_bits(small["a"])
    other = jom.compress({"a": W}, [Rule(".*", RANDOM)], key=jax.random.key(2))
    assert leaf_bits(other["a"]) != leaf_bits(small["a"])
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == bits(small["a"].codebook).hex(), run.stderr


@pytest.mark.parametrize("call", [jom.compress, jom.prepare])
def test_what_is_no_key_is_refused(call):
    for key in (0, jnp.zeros(2), jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(TypeError, match=r"key=.* is no random key; give jax.random.key\(0\)"):
            call({"w": W}, [Rule("w", INT8)], key=key)
    call({"w": W}, [Rule("w", INT8)], key=jax.random.PRNGKey(0))


def test_a_random_start_needs_a_key():
    with pytest.raises(ValueError, match=r"compress: w: .*give key="):
        jom.compress({"w": W}, [Rule("w", RANDOM)])


def test_compress_under_jit_gives_the_same_bits():
    recipe = [Rule("a", chain(HALF, codebook.KMeans(bits=3))), Rule("b", quant.Int(bits=3))]
    params = {"a": W, "b": W, "c": W}
    want = jom.compress(params, recipe)
    run = jax.jit(lambda params: jom.compress(params, recipe))
    got = run(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert leaf_bits(got) == leaf_bits(want)


def test_layers_of_one_shape_are_compiled_once():
    recipe = [Rule(".*", chain(HALF, quant.Int(bits=5)))]
    jom.compress({"w": W}, recipe)
    before = compilations()
    jom.compress({f"layer_{i}": W + i for i in range(20)}, recipe)
    assert compilations() <= before + 1  # the sum itself


def test_chain_flattens_and_checks():
    assert chain(INT8) is INT8
    assert chain(chain(HALF, INT8), INT8) == chain(HALF, INT8, INT8)
    for bad in ((), (INT8, 3), (quant.Int,)):
        with pytest.raises(TypeError, match="chain"):
            chain(*bad)
