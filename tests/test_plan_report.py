import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, VerifyError, chain, codebook, prune, quant

HALF = prune.Magnitude(sparsity=0.5)
RNG = np.random.default_rng(0)
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=(3, 12, 10)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(13, 11)), jnp.bfloat16),
    "bias": jnp.zeros(5),
    "step": jnp.zeros((), jnp.int32),
    "name": "text",
}
ENCODERS = [
    quant.Int(bits=3),
    quant.Int(bits=4, symmetric=False, per="tensor"),
    codebook.KMeans(bits=2, per="channel", start="random"),
    chain(HALF, codebook.KMeans(bits=4)),
]


def abstract(tree):
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x

    return jax.tree.map(shape, tree)


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_plan_counts_what_compress_stores(encoder):
    recipe = [Rule("a", encoder, Axes(stack=1)), Rule("b", quant.Int(bits=6))]
    key = jax.random.key(0)
    planned = jom.plan(abstract(PARAMS), recipe, key=key)
    assert str(planned) == str(jom.plan(PARAMS, recipe, key=key))
    small = jom.compress(PARAMS, recipe, key=key)
    rows = {row["path"]: row for row in planned}
    for path in ("a", "b"):
        assert rows[path]["bits"] == small[path].storage_bits() / small[path].size
    reported = {row["path"]: row for row in jom.report(PARAMS, small)}
    for path in ("a", "b", "bias", "step"):
        assert reported[path]["bits"] == rows[path]["bits"]
    assert planned.notes == jom.report(PARAMS, small).notes[:1]


def test_plan_says_why_and_how():
    recipe = [Rule("bias", None), Rule("a", HALF, Axes(out=(1,), stack=1))]
    rows = {row["path"]: row for row in jom.plan(PARAMS, recipe)}
    assert rows["a"]["axes"] == "stack out in"
    assert rows["a"]["encoder"] == "Magnitude(sparsity=0.5)"
    assert rows["a"]["shape"] == [3, 12, 10]
    assert rows["bias"]["note"] == "kept dense by the recipe"
    assert rows["b"]["note"] == "no rule matches"
    assert rows["step"]["note"] == "not a parameter: int32"
    assert rows["name"]["note"] == "not a parameter: str"
    json.loads(jom.plan(PARAMS, recipe).to_json())


def test_plan_of_an_nnx_model_without_weights():
    model = nnx.eval_shape(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    rows = {row["path"]: row for row in jom.plan(model, [Rule("kernel", quant.Int(bits=8))])}
    assert rows["kernel"]["bits"] == 8 + 4 * 32 / 32


def test_plan_of_a_compressed_tree():
    small = jom.compress(PARAMS, [Rule("b", HALF)])
    recipe = [Rule("b", quant.Int(bits=8))]
    after = jom.compress(small, recipe)
    rows = {row["path"]: row for row in jom.plan(small, recipe)}
    assert rows["b"]["bits"] == after["b"].storage_bits() / after["b"].size


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Rule("b", quant.Int(bits=4, group=5)), "plan: b: group=5 does not divide"),
        (Rule("c", HALF), "plan: rule 0 .* matches no parameter"),
        (Rule("b", HALF, Axes(stack=3)), "plan: b: axes: stack=3"),
    ],
)
def test_plan_raises_what_compress_raises(rule, why):
    with pytest.raises(ValueError, match=why):
        jom.plan(abstract(PARAMS), [rule])
    with pytest.raises(ValueError, match=why.replace("plan", "compress")):
        jom.compress(PARAMS, [rule])


def test_plan_of_nothing():
    with pytest.raises(ValueError, match="the tree has no leaves"):
        jom.plan({}, [])
    assert "0 -> 0 bytes" in str(jom.plan({"name": "text"}, []))
    assert len(jom.report(None, {"name": "text"})) == 0


def test_report_gives_the_relative_error():
    small = jom.compress(PARAMS, [Rule("a", quant.Int(bits=4)), Rule("b", HALF)])
    rows = {row["path"]: row for row in jom.report(PARAMS, small)}
    for path in ("a", "b"):
        w = np.asarray(PARAMS[path], np.float64)
        q = np.asarray(small[path].materialize(), np.float64)
        want = np.linalg.norm(w - q) / np.linalg.norm(w)
        assert rows[path]["error"] == pytest.approx(want, rel=1e-4)
    assert rows["bias"]["error"] == 0
    assert rows["b"]["kind"] == "Masked"
    assert rows["b"]["parts"] == f"mask {13 * 2}, values {13 * 11 * 2}"
    assert jom.report(None, small)[0]["error"] is None


def test_report_and_verify_compare_trees():
    small = jom.compress(PARAMS, [Rule("a", HALF)])
    less = {k: v for k, v in PARAMS.items() if k != "b"}
    with pytest.raises(ValueError, match=r"report: the trees differ: .*only compressed \['b'\]"):
        jom.report(less, small)
    with pytest.raises(VerifyError, match=r"only compressed \['b'\]"):
        jom.verify(small, less)
    with pytest.raises(ValueError, match=r"report: a is .* compressed"):
        jom.report({**PARAMS, "a": PARAMS["a"][:2]}, small)
    with pytest.raises(VerifyError, match="a: float32, dense bfloat16"):
        jom.verify(small, {**PARAMS, "a": PARAMS["a"].astype(jnp.bfloat16)})
    jom.verify(small, PARAMS)


def nan(x):
    return x.at[(0,) * x.ndim].set(jnp.nan)


W = PARAMS["b"].astype(jnp.float32)
ROUGH = quant.Int(bits=4, symmetric=False)
CORRUPT = [
    (HALF, lambda x: {"mask": x.mask.at[3, -1].set(0xFF)}, "bits set beyond"),
    (HALF, lambda x: {"mask": x.mask[:, :1]}, "mask is uint8"),
    (HALF, lambda x: {"mask": x.mask.astype(jnp.int32)}, "mask is int32"),
    (HALF, lambda x: {"values": x.values[:5]}, "values have shape"),
    (HALF, lambda x: {"values": x.values * jnp.nan}, "not zero where the mask drops"),
    (HALF, lambda x: {"values": jnp.where(x.keep(), jnp.nan, 0)}, "NaN or Inf"),
    (HALF, lambda x: {"core": (13, 12)}, "values have shape"),
    (quant.Int(bits=4), lambda x: {"scale": nan(x.scale)}, "scale holds NaN"),
    (quant.Int(bits=4), lambda x: {"scale": x.scale.at[0].set(jnp.inf)}, "scale holds NaN or Inf"),
    (quant.Int(bits=4), lambda x: {"codes": x.codes[:5]}, "codes"),
    (quant.Int(bits=4), lambda x: {"codes": x.codes[0]}, r"codes are int\d\[11\]"),
    (quant.Int(bits=4), lambda x: {"scale": x.scale[:3]}, "scale"),
    (quant.Int(bits=3), lambda x: {"codes": x.codes[:, :2]}, "codes"),
    (quant.Int(bits=3), lambda x: {"codes": x.codes[..., :1]}, "codes"),
    (quant.Int(bits=4), lambda x: {"codes": x.codes.astype(jnp.int32)}, "codes"),
    (ROUGH, lambda x: {"zero_point": x.zero_point[:3]}, "zero points"),
    (ROUGH, lambda x: {"zero_point": x.zero_point.astype(jnp.int32)}, "zero points are not uint8"),
    (ROUGH, lambda x: {"zero_point": x.zero_point + 16}, "zero point is beyond 4 bits"),
    (ROUGH, lambda x: {"scale": x.scale[:, :0], "zero_point": x.zero_point[:, :0]}, "0 groups"),
    (ROUGH, lambda x: {"scale": x.scale[0, 0]}, ""),
    (quant.Int(bits=4), lambda x: {"codes": [1]}, "parts do not fit together"),
    (codebook.KMeans(bits=2), lambda x: {"codebook": x.codebook[:3]}, "beyond the 3 centroids"),
    (codebook.KMeans(bits=2), lambda x: {"codebook": nan(x.codebook)}, "codebook holds NaN"),
    (codebook.KMeans(bits=2), lambda x: {"codes": x.codes[0]}, r"codes are int\d\[11\]"),
    (codebook.KMeans(bits=2), lambda x: {"codes": x.codes[:5]}, "codes"),
    (codebook.KMeans(bits=2, per="channel"), lambda x: {"codebook": x.codebook[:5]}, "codebook"),
    (
        chain(HALF, quant.Int(bits=4)),
        lambda x: {"values": dataclasses.replace(x.values, scale=nan(x.values.scale))},
        "scale holds NaN",
    ),
]


@pytest.mark.parametrize(("encoder", "change", "why"), CORRUPT)
def test_verify_finds_what_is_corrupt(encoder, change, why):
    sound = encoder(W)
    jom.verify({"deep": [sound]}, {"deep": [W]})
    broken = dataclasses.replace(sound, **change(sound))
    with pytest.raises(VerifyError, match=f"deep/0: .*{why}"):
        jom.verify({"deep": [broken]})


def test_verify_lists_every_problem():
    bad = dataclasses.replace(quant.Int(bits=4)(W), scale=jnp.full((11, 1), jnp.nan))
    with pytest.raises(VerifyError, match="2 problems") as caught:
        jom.verify({"x": bad, "y": bad, "z": HALF(W)})
    assert "x: scale" in str(caught.value)
    assert "y: scale" in str(caught.value)
    assert "z" not in str(caught.value).replace("zero", "")


def test_random_keys_are_counted_by_their_data():
    params = {"w": jnp.ones((4, 2)), "key": jax.random.key(0)}
    rows = {r["path"]: r for r in jom.plan(params, [jom.Rule("w", jom.quant.Int(bits=8))])}
    assert rows["key"]["bits"] == 64
    assert rows["key"]["note"].startswith("not a parameter")
