"""What is laid out for kernels: the same values, or a reason why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant
from jaxopt_models._pack import why_not

W = np.random.default_rng(0).standard_normal((64, 70), np.float32)
W8A8 = jom.chain(quant.Int(bits=8), quant.Input(bits=8))
PACKED = [
    *(quant.Int(bits=b) for b in range(2, 9)),
    quant.Int(bits=4, group=32, scale="bfloat16"),
    quant.Int(bits=4, group=32, symmetric=False),
    quant.Int(bits=8, per="tensor"),
    quant.Int(bits=4, group=32, block=2),
    quant.Int(bits=4, scale="power_of_two"),
    quant.Binary(),
    quant.Ternary(),
    quant.HQQ(bits=4, group=32),
    quant.NF4(group=64),
    quant.Float("e2m1"),
    quant.MX("e2m1"),
    quant.Normal(bits=3),
    codebook.KMeans(bits=4),
    codebook.KMeans(bits=2),
    jom.chain(quant.NF4(group=None), quant.Input(bits=8)),
    jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4)),
    W8A8,
    jom.chain(quant.Int(bits=8), quant.Input(bits=8, symmetric=False)),
]


@pytest.mark.every(2)  # each encoder with one of both, as their number is odd
@pytest.mark.parametrize("encoder", PACKED, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_come_back(encoder, dtype):
    small = jom.compress({"w": jnp.asarray(W, dtype)}, [jom.Rule("w", encoder)])
    packed = jom.pack(small, target="cpu")
    assert "Packed" in packed["w"].kind()
    jom.verify(packed)
    np.testing.assert_array_equal(packed["w"].materialize(), small["w"].materialize())
    assert packed["w"].dtype == small["w"].dtype and packed["w"].shape == small["w"].shape
    again = jom.pack(packed, target="cpu")
    assert jax.tree.structure(again) == jax.tree.structure(packed)


@pytest.mark.parametrize(
    ("core", "axes"),
    [
        ((3, 3, 4, 8), None),
        ((16, 4, 6), jom.Axes(out=(1, 2))),
        ((4, 6, 16), jom.Axes(out=(2,))),
        ((40, 32), jom.Axes.torch()),
        ((3, 32, 40), jom.Axes(stack=1)),
        ((2, 3, 32, 40), jom.Axes(stack=2)),
        ((7,), None),
    ],
)
def test_any_axes_and_stacks(core, axes):
    w = jnp.asarray(np.random.default_rng(1).standard_normal(core, np.float32))
    small = quant.Int(bits=4)(w, axes=axes)
    packed = jom.pack(small, target="cpu")
    assert packed.kind() == "Packed" and packed.stack == small.stack
    np.testing.assert_array_equal(packed.materialize(), small.materialize())


@pytest.mark.parametrize(
    ("encoder", "why"),
    [
        (quant.Float("e4m3"), "tables of more than 16 values"),
        (codebook.KMeans(bits=5), "tables of more than 16 values"),
        (codebook.KMeans(bits=4, per="channel"), "codebooks of their own"),
        (jom.chain(quant.NF4(group=64), quant.Input(bits=8, symmetric=False)), "zero point"),
        (quant.Int(bits=4, group=16), "groups of 16 are no multiple of 32"),
        (prune.Magnitude(sparsity=0.5), "kept or dropped together"),
        (jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4, symmetric=False)), "a mask"),
    ],
    ids=str,
)
def test_what_has_no_layout_stays_and_says_why(encoder, why):
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", encoder)])
    packed = jom.pack(small, target="cpu")
    assert packed["w"] is small["w"] and why in why_not(small["w"])
    note = jom.accelerate(lambda p, x: x @ p["w"]).explain(packed, jnp.ones((1, 64)))[0]["note"]
    assert why in note


def test_an_unpacked_parameter_says_what_to_call():
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", quant.Int(bits=8))])
    row = jom.accelerate(lambda p, x: x @ p["w"]).explain(small, jnp.ones((1, 64)))[0]
    assert row["runs"] == "scales after the product on cuda"
    assert "jaxopt_models.pack" in row["note"]


def test_a_file_keeps_what_was_compressed(tmp_path):
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", W8A8)])
    with pytest.raises(ValueError, match=r"save: w: it is laid out .* before jaxopt_models\.pack"):
        jom.save(tmp_path / "m.jom", jom.pack(small, target="cpu"))
    assert not (tmp_path / "m.jom").exists()


def test_targets():
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", quant.Int(bits=8))])
    assert jom.pack(small, target="tpu")["w"] is small["w"]
    assert jom.pack(small)["w"].kind() == "Packed"  # the backend of the tests is a CPU
    with pytest.raises(ValueError, match="target='arm'"):
        jom.pack(small, target="arm")


def test_a_broken_leaf_is_found():
    leaf = jom.pack(quant.Int(bits=8)(jnp.asarray(W)), target="cpu")
    for change in (
        {"codes": leaf.codes[:1]},
        {"scale": leaf.scale * jnp.nan},
        {"scale": leaf.scale[..., :32]},
        {"bits": 5},
    ):
        with pytest.raises(jom.VerifyError):
            jom.verify({"w": dataclasses.replace(leaf, **change)})
