import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import Rule, models, prune, quant

RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def promoting():
    """Functions of users may promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


def positive(*shape):
    return np.abs(normal(*shape))


@functools.partial(jax.jit, static_argnums=0)
def run(fn, params, *batch):
    """What a model gives, compressed or not."""
    with jax.numpy_rank_promotion("allow"):
        return fn(jom.materialize(params), *batch)


def found(table):
    return {row["kernel"]: row["bias"] or row["note"] for row in table}


def corrected(fn, params, batches, **options):
    """Returns the small model before and after."""
    recipe = [Rule(".*(w[0-9]*|kernel)", quant.Int(bits=3))]
    small = jom.compress(params, recipe)
    return small, quant.correct_bias(fn, params, small, batches, **options)


def mean(fn, params, batches):
    outs = [np.asarray(run(fn, params, *b), np.float64) for b in batches]
    return np.concatenate([y.reshape(-1, y.shape[-1]) for y in outs]).mean(0)


def test_the_shift_is_the_error_of_the_weights_times_the_mean_of_the_inputs():
    params = {"w": normal(6, 4), "bias": normal(4)}
    batches = [(positive(5, 6),), (positive(3, 6),)]
    small, new = corrected(lambda p, x: x @ p["w"] + p["bias"], params, batches)
    x = np.concatenate([np.asarray(b[0], np.float64) for b in batches])
    miss = np.asarray(params["w"], np.float64) - np.asarray(small["w"].materialize(), np.float64)
    want = np.asarray(params["bias"], np.float64) + x.mean(0) @ miss
    np.testing.assert_allclose(new["bias"], want, rtol=1e-6)
    assert new["w"] is small["w"] and isinstance(new["bias"], jax.Array)


def grouped(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, p["w"], (2, 1), "SAME", dimension_numbers=dims, feature_group_count=2
    )
    return p["bias"] - y


def heads(p, x):
    y = jnp.einsum("tbi,ihd->btdh", x, p["w"]) + p["bias"].T
    return y.reshape(*y.shape[:2], -1)


def unrolled(p, x):
    for i in range(2):
        x = x @ p["w"][i] + p["bias"][i]
    return x


def scanned(p, x):
    return jax.lax.scan(lambda x, q: (x @ q["w"] - q["bias"], None), x, p)[0]


def shared(p, x):
    return jnp.concatenate([x, x + 1]) @ p["w"] + p["bias"] + (x[:1] @ p["w"] + p["bias"]) * 0


def fused(p, x):
    w = jnp.concatenate([p["w1"], p["w2"]], axis=1)
    a, b = jnp.split(x @ w, 2, axis=1)
    return jnp.concatenate([b + p["b2"], a + p["b1"]], axis=1)


def summed(p, x):
    a, b = jnp.split(jnp.flip(x, 1) @ p["w1"] + p["b1"], 2, axis=-1)
    return b - (x @ p["w2"]) + a * 0


CASES = {
    "grouped": (grouped, {"w": (3, 3, 4, 6), "bias": (6,)}, (2, 5, 5, 8)),
    "heads": (heads, {"w": (6, 2, 3), "bias": (2, 3)}, (4, 5, 6)),
    "unrolled": (unrolled, {"w": (2, 6, 6), "bias": (2, 6)}, (7, 6)),
    "scanned": (scanned, {"w": (3, 6, 6), "bias": (3, 6)}, (7, 6)),
    "fused": (fused, {"w1": (6, 3), "w2": (6, 3), "b1": (3,), "b2": (3,)}, (7, 6)),
    "summed": (summed, {"w1": (6, 8), "w2": (6, 4), "b1": (8,)}, (7, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_the_output_is_what_it_was(case):
    # Without anything between layers that is not linear it is exactly that.
    fn, shapes, x = CASES[case]
    params = {name: normal(*shape) for name, shape in shapes.items()}
    batches = [(positive(*x),), (positive(*x),)]
    small, new = corrected(fn, params, batches)
    before, after, want = (mean(fn, p, batches) for p in (small, new, params))
    scale = np.abs(want).max()
    np.testing.assert_allclose(after, want, atol=2e-5 * scale)
    assert np.abs(before - want).max() > 1e-2 * scale


def test_a_kernel_used_twice_is_corrected_for_all_its_inputs_once():
    params = {"w": normal(6, 4), "bias": normal(4)}
    x = positive(5, 6)
    small, new = corrected(shared, params, [(x,)])
    seen = np.concatenate([x, x + 1, x[:1]])
    miss = np.asarray(params["w"] - small["w"].materialize(), np.float64)
    np.testing.assert_allclose(new["bias"] - params["bias"], seen.mean(0) @ miss, rtol=1e-4)


def test_stacked_kernels_of_different_inputs_have_shifts_of_their_own():
    params = {"w": normal(3, 6, 6), "bias": normal(3, 6)}

    def fn(p, x):
        step = lambda x, q: (jax.nn.relu(x @ q["w"] + q["bias"]), x)  # noqa: E731
        return jax.lax.scan(step, x, p)

    x = positive(9, 6)
    small, new = corrected(fn, params, [(x,)])
    _, inputs = fn(params, x)
    miss = np.asarray(params["w"] - small["w"].materialize(), np.float64)
    want = np.einsum("lbi,lio->lo", np.asarray(inputs, np.float64), miss) / 9
    np.testing.assert_allclose(new["bias"] - params["bias"], want, atol=1e-5)


def test_of_the_compressed_model_the_means_are_those_its_kernels_see():
    params = {"w1": normal(6, 6), "b1": normal(6), "w2": normal(6, 4), "b2": normal(4)}
    fn = lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]  # noqa: E731
    x = positive(9, 6)
    small, new = corrected(fn, params, [(x,)], inputs="compressed")
    hidden = np.maximum(x @ np.asarray(small["w1"].materialize()) + params["b1"], 0)
    miss = np.asarray(params["w2"] - small["w2"].materialize(), np.float64)
    want = np.asarray(hidden, np.float64).mean(0) @ miss
    np.testing.assert_allclose(new["b2"] - params["b2"], want, atol=1e-5)


class Net(nn.Module):
    """A convolution with a norm, a depthwise one, attention, a recurrent and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = nn.MultiHeadDotProductAttention(2)(x, x)
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        return nn.Embed(4, 8).attend(nn.Dense(8)(x))


def test_every_kernel_of_a_model_is_listed_with_its_bias_or_the_reason():
    x = normal(1, 4, 4, 3)
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), variables)
    table = found(quant.biases(Net().apply, variables, x))
    dense = {k: b for k, b in table.items() if "LSTM" not in k and "Embed" not in k}
    assert dense.pop("Conv_0/kernel") == "batch_stats/BatchNorm_0/mean"
    assert len(dense) == 6
    assert all(b == k.replace("kernel", "bias") for k, b in dense.items())
    cell = "OptimizedLSTMCell_0/"
    for gate in "ifgo":
        assert table[f"{cell}h{gate}/kernel"] == table[f"{cell}i{gate}/kernel"]
        assert table[f"{cell}h{gate}/kernel"] == f"{cell}h{gate}/bias"
    assert table["Embed_0/embedding"] == "it has no bias: its product is returned"


def test_a_running_mean_is_moved_the_other_way():
    def fn(p, x):
        return (x @ p["w"] - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3)

    params = {"w": normal(6, 4), "mean": normal(4), "var": positive(4)}
    x = positive(5, 6)
    _, new = corrected(fn, params, [(x,)])
    np.testing.assert_allclose(mean(fn, new, [(x,)]), mean(fn, params, [(x,)]), atol=1e-4)


def odd(p, x):
    h = jnp.tanh(x @ p["w"] + p["one"])
    y = x @ p["w2"]
    a = x @ (2 * p["w3"]) + p["b3"]
    b = (x @ p["w4"] + p["b4"], x @ p["w5"] + p["b4"])
    c = (x @ p["w6"] + p["b6"], p["b6"] * 2)
    d = x @ p["w7"] + p["b7"] ** 2
    e = (x @ p["w8"] + p["b8"], jnp.sum(x * p["w8"][:, 0]))
    return h, y, y + p["b2"], a, b, c, d, e


def test_what_cannot_be_corrected_says_why():
    names = ["w", *(f"w{i}" for i in range(2, 9))]
    params = {n: normal(6, 4) for n in names} | {"one": normal()}
    params |= {f"b{i}": normal(4) for i in (2, 3, 4, 6, 7, 8)}
    x = normal(3, 6)
    why = found(quant.biases(odd, params, x))
    assert why == {
        "w": "its outputs have no bias each",
        "w2": "its product is used several times before a bias is added",
        "w3": "it is changed before it is multiplied",
        "w4": "b4 is used elsewhere, too",
        "w5": "b4 is used elsewhere, too",
        "w6": "b6 is used elsewhere, too",
        "w7": "what is added to it is computed from ['b7']",
        "w8": "it is used in other ways than in products, too",
    }
    small = jom.compress(params, [Rule("w.*", quant.Int(bits=4))])
    with pytest.raises(ValueError, match="kernels without a bias to correct: w: its outputs"):
        quant.correct_bias(odd, params, small, [(x,)])


def test_errors_say_what_to_do():
    params = {"w": normal(6, 4), "w1": normal(4, 4), "bias": normal(4)}

    def fn(p, x):
        return (x @ p["w"] + p["bias"]) @ p["w1"]

    x = normal(3, 6)
    small = jom.compress(params, [Rule("w.*", quant.Int(bits=4))])
    quant.correct_bias(fn, params, small, [(x,)], only="w")
    with pytest.raises(ValueError, match="w1: it has no bias: its product is returned"):
        quant.correct_bias(fn, params, small, [(x,)], only="w.*")
    with pytest.raises(ValueError, match="only='v' matches none of fn; compressed are"):
        quant.correct_bias(fn, params, small, [(x,)], only="v")
    with pytest.raises(ValueError, match="no kernel is compressed"):
        quant.correct_bias(fn, params, params, [(x,)])
    with pytest.raises(ValueError, match="batches begin with None"):
        quant.correct_bias(fn, params, small, [])
    with pytest.raises(TypeError, match="tuples of the arguments"):
        quant.correct_bias(fn, params, small, [x])
    with pytest.raises(ValueError, match="'dense' nor 'compressed'"):
        quant.correct_bias(fn, params, small, [(x,)], inputs="both")
    with pytest.raises(TypeError, match="w is Quantized"):
        quant.correct_bias(fn, small, small, [(x,)])
    with pytest.raises(ValueError, match="the trees differ"):
        quant.correct_bias(fn, params, {"w": small["w"]}, [(x,)])
    every = jom.compress(params, [Rule(".*", quant.Int(bits=4))])
    with pytest.raises(ValueError, match="its bias bias is compressed"):
        quant.correct_bias(fn, params, every, [(x,)], only="w")


@functools.cache
def lenet():
    """A network that was not trained, images, and the network pruned and rounded."""
    fn, x = models.LeNet300(), positive(64, 28, 28, 1)
    params = jax.jit(fn.init)(jax.random.key(0), x)
    recipe = [Rule(".*/kernel", jom.chain(prune.Magnitude(sparsity=0.6), quant.Int(bits=3)))]
    return fn.apply, x, params, jax.jit(lambda p: jom.compress(p, recipe))(params)


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
def test_a_pruned_network_comes_nearer_to_what_it_was(inputs):
    fn, x, params, small = lenet()
    new = quant.correct_bias(fn, params, small, [(x,)], inputs=inputs)
    want, before, after = (np.asarray(run(fn, p, x)) for p in (params, small, new))
    assert np.mean((after - want) ** 2) < np.mean((before - want) ** 2) / 2
