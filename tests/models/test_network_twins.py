"""Residual network, transformer and LSTM: their twins, and each against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxopt_models import models

RESNET = {"stages": (1, 1), "classes": 5, "width": 4}
ENCODER = {"vocab": 11, "width": 8, "heads": 2, "layers": 2, "length": 7}
IMAGES = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
TOKENS = np.random.default_rng(2).integers(0, 11, (3, 5), np.int32)
SEQUENCE = np.random.default_rng(3).normal(size=(3, 6, 4)).astype(np.float32)
CASES = {
    "basic": ("ResNet", RESNET, IMAGES),
    "bottleneck": ("ResNet", RESNET | {"block": "bottleneck"}, IMAGES),
    "encoder": ("Transformer", ENCODER, TOKENS),
    "tied": ("Transformer", ENCODER | {"tied": True, "hidden": 12}, TOKENS),
    "scanned": ("Transformer", ENCODER | {"tied": True, "scan": True}, TOKENS),
    "lstm": ("LSTM", {"features": 4, "width": 6, "classes": 5}, SEQUENCE),
}


def drawn(module, x):
    """Variables of a module without a value that is zero or one at the start."""
    shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x))
    rng = np.random.default_rng(4)
    values = {
        path: np.float32(
            rng.uniform(0.5, 2, s.shape) if path[-1] == "var" else rng.normal(0, 0.3, s.shape)
        )
        for path, s in shapes.items()
    }
    return unflatten_dict(values)


def by_path(collections):
    """Values of all collections by path, as nnx has them in one tree."""
    merged = [flatten_dict(tree, sep="/") for tree in collections.values()]
    return {path: value for tree in merged for path, value in tree.items()}


def paired(name):
    """A linen module with its variables, its twin with the same, and their input."""
    cls, options, x = CASES[name]
    linen = getattr(models, cls)(**options)
    variables = drawn(linen, x)
    values = by_path(variables)
    twin = nnx.eval_shape(lambda: getattr(models.nnx, cls)(**options, rngs=nnx.Rngs(0)))
    flat = {"/".join(map(str, path)): box for path, box in nnx.to_flat_state(nnx.state(twin))}
    assert {p: box.get_value().shape for p, box in flat.items()} == {
        p: value.shape for p, value in values.items()
    }
    for path, box in flat.items():
        assert isinstance(box, nnx.BatchStat) == (path.split("/")[-1] in ("mean", "var"))
        box.set_value(jnp.asarray(values[path]))
    return linen, variables, twin, x


@pytest.mark.parametrize("name", CASES)
def test_twins_have_the_same_parameters_and_outputs(name):
    linen, variables, twin, x = paired(name)
    out = jax.jit(linen.apply)(variables, x)
    assert out.dtype == jnp.float32 and out.shape[0] == 3
    assert float(jnp.std(out)) > 0.05
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(twin, x), out, atol=1e-5, rtol=1e-5)
    # The rows of a batch do not see each other.
    np.testing.assert_allclose(jax.jit(linen.apply)(variables, x[:1]), out[:1], atol=1e-5)


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_twins_train_alike(name):
    linen, variables, twin, x = paired(name)
    run = jax.jit(lambda v, x: linen.apply(v, x, train=True, mutable="batch_stats"))
    out, new = run(variables, x)
    found = nnx.jit(lambda m, x: m(x, train=True))(twin, x)
    np.testing.assert_allclose(found, out, atol=1e-5, rtol=1e-5)
    state = nnx.to_flat_state(nnx.state(twin, nnx.BatchStat))
    stats = by_path(new)
    assert len(state) == len(stats)
    for path, box in state:
        value = stats["/".join(path)]
        np.testing.assert_allclose(box.get_value(), value, atol=1e-5, rtol=1e-5)
        assert not np.array_equal(value, by_path(variables)["/".join(path)])


def convolve(x, w, stride):
    half = w.shape[0] // 2
    pads = [(half, half), (half, half)]
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=numbers)


@pytest.mark.parametrize(("name", "strides"), [("basic", (2, 1)), ("bottleneck", (1, 2, 1))])
def test_resnet_computes_its_formula(name, strides):
    linen, variables, _, x = paired(name)
    params, stats = variables["params"], variables["batch_stats"]

    def layer(x, where, what, stride):
        p, s = (tree if where is None else tree[where] for tree in (params, stats))
        bn, seen = p[f"bn{what}"], s[f"bn{what}"]
        y = convolve(x, p[f"conv{what}"]["kernel"], stride)
        scale, shift, mean, var = (
            v[None, None, None] for v in (bn["scale"], bn["bias"], seen["mean"], seen["var"])
        )
        return (y - mean) / jnp.sqrt(var + 1e-5) * scale + shift

    @jax.jit
    def forward(x):
        x = jnp.maximum(layer(x, None, "1", 2), 0)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        x = jnp.stack([x[:, i : i + 16 : 2, j : j + 16 : 2] for i in range(3) for j in range(3)])
        x = jnp.max(x, axis=0)
        for where in ("stage1_block1", "stage2_block1"):
            y, first = x, where.startswith("stage1")
            for i, stride in enumerate(strides, 1):
                y = jnp.maximum(y, 0) if i > 1 else y
                y = layer(y, where, str(i), 1 if first else stride)
            if "conv_shortcut" in params[where]:
                x = layer(x, where, "_shortcut", 1 if first else 2)
            x = jnp.maximum(x + y, 0)
        return jnp.mean(x, axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]

    assert ("conv_shortcut" in params["stage1_block1"]) == (name == "bottleneck")
    out = jax.jit(linen.apply)(variables, x)
    np.testing.assert_allclose(out, forward(x), atol=1e-5, rtol=1e-4)


def test_transformer_computes_its_formula():
    linen, variables, _, tokens = paired("tied")
    p = jax.tree.map(np.float64, variables["params"])

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def attention(x, p):
        q, k, v = (
            np.einsum("btw,whd->bhtd", x, p[part]["kernel"]) + p[part]["bias"][:, None]
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(4))
        x = scores / scores.sum(-1, keepdims=True) @ v
        return np.einsum("bhtd,hdw->btw", x, p["out"]["kernel"]) + p["out"]["bias"]

    x = p["tokens"]["embedding"][tokens] + p["positions"]["embedding"][:5]
    for layer in (p["layer1"], p["layer2"]):
        x = x + attention(norm(x, layer["norm1"]), layer["attention"])
        y = dense(norm(x, layer["norm2"]), layer["up"])
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(y, layer["down"])
    logits = norm(x, p["norm"]) @ p["tokens"]["embedding"].T
    np.testing.assert_allclose(jax.jit(linen.apply)(variables, tokens), logits, atol=1e-5)


def test_scanned_layers_are_the_unscanned_ones_stacked():
    options = ENCODER | {"tied": True}
    linen = models.Transformer(**options)
    params = drawn(linen, TOKENS)["params"]
    layers = [params[f"layer{i}"] for i in (1, 2)]
    stacked = {path: params[path] for path in ("tokens", "positions", "norm")}
    stacked["layers"] = jax.tree.map(lambda *w: np.stack(w), *layers)
    scanned = models.Transformer(**options, scan=True)
    np.testing.assert_allclose(
        jax.jit(scanned.apply)({"params": stacked}, TOKENS),
        jax.jit(linen.apply)({"params": params}, TOKENS),
        atol=1e-5,
    )


def test_scanned_layers_start_differently():
    linen = models.Transformer(**ENCODER, scan=True)

    # Compiled, all that is not returned is left out.
    def of_linen():
        return linen.init(jax.random.key(0), TOKENS)["params"]["layers"]["up"]["kernel"]

    def of_nnx():
        return models.nnx.Transformer(**ENCODER, scan=True, rngs=nnx.Rngs(0)).layers.up.kernel[...]

    for start in (of_linen, of_nnx):
        kernel = jax.jit(start)()
        assert kernel.shape == (2, 8, 32)
        assert not np.array_equal(kernel[0], kernel[1])


def test_lstm_computes_its_formula():
    linen, variables, _, x = paired("lstm")
    p = jax.tree.map(np.float64, variables["params"])
    cell = p["rnn"]["cell"]

    def gate(x, h, name):
        y = x @ cell[f"i{name}"]["kernel"] + h @ cell[f"h{name}"]["kernel"]
        y = y + cell[f"h{name}"]["bias"]
        return np.tanh(y) if name == "g" else 1 / (1 + np.exp(-y))

    c = h = np.zeros((3, 6))
    for step in range(6):
        i, f, g, o = (gate(x[:, step], h, name) for name in "ifgo")
        c = f * c + i * g
        h = o * np.tanh(c)
    logits = h @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(jax.jit(linen.apply)(variables, x), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "x", "error", "match"),
    [
        ("basic", IMAGES[0], ValueError, r"shape \(32, 32, 3\); give \[B, H, W, 3\]"),
        ("basic", IMAGES[..., :1], ValueError, r"give \[B, H, W, 3\]"),
        ("basic", IMAGES.astype(np.uint8), TypeError, "dtype uint8; give normalized floats"),
        ("encoder", TOKENS[0], ValueError, r"shape \(5,\); give \[B, T\] with T up to 7"),
        ("encoder", np.zeros((1, 8), np.int32), ValueError, r"shape \(1, 8\); give \[B, T\]"),
        ("encoder", np.zeros((1, 5), np.float32), TypeError, "dtype float32; give integers"),
        ("lstm", SEQUENCE[..., :3], ValueError, r"shape \(3, 6, 3\); give \[B, T, 4\]"),
        ("lstm", SEQUENCE[:, :0], ValueError, r"give \[B, T, 4\], T not 0"),
        ("lstm", SEQUENCE[0], ValueError, r"shape \(6, 4\); give \[B, T, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, x, error, match):
    cls, options, _ = CASES[name]
    with pytest.raises(error, match=match):
        getattr(models, cls)(**options).init(jax.random.key(0), x)
    with pytest.raises(error, match=match):
        nnx.eval_shape(lambda: getattr(models.nnx, cls)(**options, rngs=nnx.Rngs(0))(x))


def test_blocks_of_no_network_are_refused():
    with pytest.raises(ValueError, match="block is 'wide'; give 'basic' or 'bottleneck'"):
        nnx.eval_shape(lambda: models.nnx.ResNet(block="wide", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="block is 'wide'"):
        jax.eval_shape(models.ResNet(block="wide").init, jax.random.key(0), IMAGES)
