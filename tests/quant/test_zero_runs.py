"""A run of zeros stays zero where a scale is kept, and leaves the scales of others alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_models as jom
from jaxopt_models import quant

SCALES = ["float32", "bfloat16", "float16", "power_of_two", quant.Int(8, per="tensor")]
FORMATS = [
    lambda **k: quant.Int(4, group=16, **k),
    lambda **k: quant.Int(4, symmetric=False, group=16, **k),
    lambda **k: quant.HQQ(4, group=16, **k),
    lambda **k: quant.Float("e2m1", group=16, **k),
    lambda **k: quant.NF4(group=16, **k),
    lambda **k: quant.Normal(4, group=16, **k),
    lambda **k: quant.Table((0.5, 1.0), group=16, **k),
    lambda **k: quant.Ternary(group=16, **k),
    lambda **k: quant.Binary(group=16, **k),
]
NAMES = ["Int", "asymmetric", "HQQ", "Float", "NF4", "Normal", "Table", "Ternary", "Binary"]


@pytest.mark.every(2)
@pytest.mark.parametrize("scale", SCALES, ids=repr)
@pytest.mark.parametrize("make", FORMATS, ids=NAMES)
def test_zeros_stay_zeros(make, scale):
    w = jnp.zeros((64, 3)).at[:16].set(jax.random.normal(jax.random.key(0), (16, 3)))
    small = make(scale=scale)(w)
    found = small.materialize()
    assert small.check() == []
    assert np.abs(found[16:]).max() < 1e-37 and np.abs(found[:16]).max() > 0.3
    nothing = make(scale=scale)(jnp.zeros((64, 3)))
    assert nothing.check() == [] and np.abs(nothing.materialize()).max() < 1e-37


@pytest.mark.parametrize("fmt", [quant.NVFP4(), quant.Int(4, group=16, scale=quant.Int(8))])
def test_zeros_do_not_spoil_the_encoded_scales_of_others(fmt):
    w = 1e-3 * jax.random.normal(jax.random.key(0), (64, 3))
    with_zeros = w.at[48:].set(0)
    full, found = fmt(w.at[48:].set(w[:16])).materialize(), fmt(with_zeros).materialize()
    np.testing.assert_array_equal(found[:48], full[:48])
    np.testing.assert_array_equal(found[48:], 0)


def test_scales_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"NF4.*encodes the scales \[3, 4\]: group=64"):
        quant.Int(4, group=16, scale=quant.NF4())(jnp.ones((64, 3)))


def test_scales_without_a_zero_are_refused():
    with pytest.raises(ValueError, match=r"scale=Normal\(bits=4\) has no zero"):
        quant.Binary(scale=quant.Normal(4))


@pytest.mark.parametrize("scale", ["float32", quant.Int(8), quant.Float("e4m3", per="tensor")])
def test_zeros_learn(scale, descend):
    x = jax.random.normal(jax.random.key(1), (200, 64, 32))
    want = jax.random.normal(jax.random.key(0), (32, 4))
    recipe = [jom.Rule("w", quant.LSQ(4, group=16, scale=scale))]
    latents = jom.prepare({"w": want.at[16:].set(0)}, recipe)

    def loss(p, x):
        return jnp.mean((x @ jom.materialize(p)["w"] - x @ want) ** 2)

    _, values = descend(loss, optax.adam(3e-2), latents, x)
    assert values[-1] < 0.15 * values[0]
