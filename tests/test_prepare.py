"""Parameters in training: what is shown is what is shipped, whatever holds them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import lax

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, chain, prune, quant
from jaxopt_models.testing import bits, leaf_bits

RNG = np.random.default_rng(5)
HALF = prune.Magnitude(sparsity=0.5)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape) * 0.3, dtype)


def prepared(encoder, w, axes=None, **given):
    return jom.prepare({"w": w}, [Rule("w", encoder, axes)], **given)["w"]


def shipped(encoder, latent, axes=None):
    return jom.compress({"w": latent}, [Rule("w", encoder, axes)])["w"]


def moved(latents):
    """Changes what is trained, as an optimizer would."""
    trainable, rest = jom.partition(latents)
    rng = np.random.default_rng(0)

    def step(x):
        return (np.asarray(x) * (1 + 0.2 * rng.uniform(-1, 1, x.shape))).astype(x.dtype)

    return jom.combine(jax.tree.map(step, trainable), rest)


# Kernel, convolution, grouped, depthwise, a stack, an attention projection.
SHAPES = {
    "kernel": ((24, 16), None),
    "conv": ((3, 3, 8, 16), None),
    "depthwise": ((4, 4, 1, 8), None),
    "stack": ((3, 24, 16), Axes(stack=1)),
    "attention": ((16, 4, 8), Axes(out=(1, 2))),
}
CASES = {
    "lsq2": (quant.LSQ(bits=2), "conv", "Quantized"),
    "lsq2d": (quant.LSQ(bits=2), "depthwise", "Quantized"),
    "groups": (quant.LSQ(bits=3, group=8), "stack", "Quantized"),
    "tensor": (quant.LSQ(bits=4, per="tensor"), "attention", "Quantized"),
    "offset": (quant.LSQ(bits=4, symmetric=False), "stack", "Quantized"),
    "offset2": (quant.LSQ(bits=2, symmetric=False, group=8), "attention", "Quantized"),
    "blocks": (quant.LSQ(bits=4, block=2, scale="bfloat16"), "kernel", "Quantized"),
    "powers": (quant.LSQ(bits=4, scale="power_of_two"), "kernel", "Quantized"),
    "dorefa": (quant.DoReFa(bits=3), "stack", "Quantized"),
    "dorefa1": (quant.DoReFa(bits=1), "conv", "Tabulated"),
    "bwn": (quant.BWN(), "depthwise", "Tabulated"),
    "xnor": (quant.XNOR(), "stack", "WithSign(Tabulated)"),
    "pruned": (chain(HALF, quant.LSQ(bits=4)), "stack", "Masked(Quantized)"),
    "pruned2": (chain(HALF, quant.LSQ(bits=2, symmetric=False)), "conv", "Masked(Quantized)"),
    "pact": (
        chain(quant.LSQ(bits=4), quant.PACT(bits=4, start=1.0)),
        "conv",
        "WithLearnedInput(Quantized)",
    ),
}


def test_what_is_shown_is_what_is_shipped():
    params = {name: normal(*SHAPES[shape][0]) for name, (_, shape, _) in CASES.items()}
    recipe = [Rule(n, encoder, SHAPES[shape][1]) for n, (encoder, shape, _) in CASES.items()]
    latents = moved(jax.jit(lambda p: jom.prepare(p, recipe))(params))
    small = jax.jit(lambda p: jom.compress(p, recipe))(latents)
    trainable, rest = jom.partition(latents)

    def loss(t):
        values = jom.materialize(jom.combine(t, rest))
        return sum(jnp.sum(jnp.sin(v)) for v in values.values()), values

    # The program of a training step shows the same as one that does nothing else.
    (_, shown), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    alone, rebuilt = jax.jit(lambda *trees: tuple(map(jom.materialize, trees)))(latents, small)
    for name, (_, _, kind) in CASES.items():
        assert small[name].kind() == kind
        assert bits(shown[name]) == bits(alone[name]) == bits(rebuilt[name]), name
    for name in ("offset2", "blocks", "powers"):
        assert not small[name].check() and not latents[name].check(), name
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_no_rule_learns_nothing_and_shows_what_straight_through_shows():
    w = normal(24, 16)
    for encoder in (quant.Int(bits=3), chain(HALF, quant.Int(bits=2))):
        latent = prepared(encoder, w)
        assert jax.tree.leaves(latent.learned) == []
        want = jom.straight_through([Rule("w", encoder)])({"w": w})["w"]
        assert bits(latent.materialize()) == bits(want)
        grad = jax.grad(lambda w, x=latent: jnp.sum(dataclasses.replace(x, w=w).materialize()))(w)
        assert np.all(np.asarray(grad) == 1)


def test_stats_and_keys_are_held_by_those_that_read_them_each_time():
    w, x = normal(8, 4), normal(64, 8)
    weighted = quant.Int(bits=3, observer=quant.MSE(weighted=True))
    stats = jom.calibrate(lambda p, x: x @ p["w"], {"w": w}, [(x,)], [Rule("w", weighted)])
    latent = prepared(weighted, w, stats=stats)
    want = jom.compress({"w": w}, [Rule("w", weighted)], stats=stats)["w"]
    assert bits(latent.materialize()) == bits(want.materialize())
    assert leaf_bits(shipped(weighted, latent)) == leaf_bits(want)
    with pytest.raises(ValueError, match=r"prepare: w: Int.* needs the statistics \['l2'\]"):
        prepared(weighted, w)
    drawing = quant.BinaryConnect(stochastic=True)
    one, two = (prepared(drawing, w, key=jax.random.key(i)) for i in (0, 1))
    assert bits(one.materialize()) == bits(one.materialize()) != bits(two.materialize())
    assert bits(shipped(drawing, one).materialize()) == bits(one.materialize())


def test_a_mask_stays():
    w = normal(16, 8)
    pruned = HALF(w)
    latent = moved({"w": prepared(quant.LSQ(bits=4, symmetric=False), pruned)})["w"]
    shown = latent.materialize()
    keep = np.asarray(pruned.keep())
    assert not np.any(np.asarray(shown)[~keep])
    small = shipped(quant.LSQ(bits=4, symmetric=False), latent)
    assert small.kind() == "Masked(Quantized)" and bits(small.mask) == bits(pruned.mask)
    assert bits(small.materialize()) == bits(shown)

    grad = jax.grad(lambda x: jnp.sum(x.materialize()), allow_int=True)(latent)
    assert not np.any(np.asarray(grad.w)[~keep])
    assert np.mean(grad.w) > 0.3  # clipped entries aside, what is kept learns


def test_it_is_a_leaf_like_any_other(tmp_path):
    encoder = chain(HALF, quant.LSQ(bits=3, group=8))
    latent = prepared(encoder, HALF(normal(2, 16, 8), axes=Axes(stack=1)), Axes(stack=1))
    assert latent.shape == (2, 16, 8) and latent.stack == (2,)
    value = latent.materialize()
    flat, treedef = jax.tree.flatten(latent)
    assert bits(treedef.unflatten(flat).materialize()) == bits(value)
    mapped = jax.jit(jax.vmap(lambda x: x.materialize()))(latent)
    _, scanned = jax.jit(lambda x: lax.scan(lambda c, x: (c, x.materialize()), 0, x))(latent)
    assert bits(mapped) == bits(scanned) == bits(value)
    trainable, rest = jom.partition({"w": latent})
    assert trainable["w"].mask is None and rest["w"].w is None
    assert leaf_bits(jom.combine(trainable, rest)) == leaf_bits(latent)
    counted = sum(latent.bits_by_part().values())
    assert counted == latent.storage_bits() == 32 * 256 + 256 + 32 * 2 * 8 * 2
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", {"w": latent})
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"w": latent})
        back = checkpointer.restore(tmp_path / "tree", shapes)["w"]
    assert bits(back.materialize()) == bits(value)
    with pytest.raises(TypeError, match=r"w: it is in training for .*compress\(tree, recipe\)"):
        jom.save(tmp_path / "w.jom", {"w": latent})
    jom.verify({"w": latent})


def test_preparing_again_begins_at_the_float_tensor():
    w = normal(16, 8)
    four = prepared(quant.LSQ(bits=4), w)
    two = prepared(quant.LSQ(bits=2), four)
    assert bits(two.w) == bits(w) and two.encoder == quant.LSQ(bits=2)
    coded = prepared(quant.LSQ(bits=4), quant.Int(bits=8)(w))
    assert bits(coded.w) == bits(quant.Int(bits=8)(w).materialize())
    inside = prepared(quant.LSQ(bits=4), quant.Input(bits=8)(w))
    assert inside.kind() == "WithInput(Latent)"
    assert shipped(chain(quant.LSQ(bits=4), quant.Input(bits=8)), inside).kind() == (
        "WithInput(Quantized)"
    )


def test_errors():
    w = normal(16, 8)
    latent = prepared(quant.LSQ(bits=4), w)
    with pytest.raises(ValueError, match=r"compress: w: it was prepared for LSQ\(bits=4\), not"):
        shipped(quant.LSQ(bits=2), latent)
    with pytest.raises(ValueError, match="prepare: w: group=5 does not divide"):
        prepared(quant.LSQ(bits=4, group=5), w)
    with pytest.raises(ValueError, match="would prune a Quantized leaf and lose its codes"):
        prepared(chain(quant.LSQ(bits=4), HALF), w)
    with pytest.raises(ValueError, match=r"prepare: w: .* ranks the layers of a stack together"):
        across = prune.Magnitude(sparsity=0.5, across_stack=True)
        prepared(across, normal(2, 8, 8), Axes(stack=1))
    with pytest.raises(ValueError, match="matches no parameter"):
        jom.prepare({"w": w}, [Rule("v", HALF)])
    with pytest.raises(TypeError, match="used as an array"):
        latent + 1
    with pytest.raises(ValueError, match="1 of 128 entries are NaN or Inf"):
        prepared(quant.LSQ(bits=4), w.at[0, 0].set(jnp.nan))


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        return nn.Dense(4, name="out")(x.mean((1, 2)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.out = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def scanned(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return lax.scan(layer, x, p["layers"])[0] @ p["out"]


def model(name):
    if name == "linen":
        conv, images = Conv(), normal(8, 6, 6, 2)
        return *jom.functional((conv, jax.jit(conv.init)(jax.random.key(0), images))), images
    if name == "nnx":
        return *jom.functional(Net(nnx.Rngs(0))), normal(8, 6)
    return scanned, {"layers": normal(3, 6, 6), "out": normal(6, 4)}, normal(8, 6)


@pytest.mark.parametrize("name", ["linen", "nnx", "scan"])
def test_training_with_learned_weights_and_inputs(name, descend):
    fn, params, x = model(name)
    encoder = chain(quant.LSQ(bits=4), quant.LearnedInput(bits=4, start=0.2))
    scan = name == "scan"
    recipe = [Rule("layers" if scan else ".*/kernel", encoder, Axes(stack=1) if scan else None)]
    target = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    trainable, rest = jom.partition(jax.jit(lambda p: jom.prepare(p, recipe))(params))
    run, tx = jom.simulate(fn), optax.adam(2e-2)

    def loss(trainable, _):
        return jnp.mean((run(jom.combine(trainable, rest), x) - target) ** 2)

    trainable, values = descend(loss, tx, trainable, jnp.arange(60))
    assert float(values[-1]) < 0.6 * float(values[0])
    latents = jom.combine(trainable, rest)
    small = jax.jit(lambda p: jom.compress(p, recipe))(latents)
    shown, rebuilt = (jax.tree.leaves(jax.jit(jom.materialize)(t)) for t in (latents, small))
    for a, b in zip(shown, rebuilt, strict=True):
        assert bits(a) == bits(b)
    np.testing.assert_allclose(run(small, x), run(latents, x), rtol=1e-5, atol=1e-6)
