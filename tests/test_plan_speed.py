"""The speed that a plan expects: counts by hand, kernels and reasons, and what is measured."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, kernels, models, prune, quant
from jaxopt_models._device import Limits
from jaxopt_models._speed import speed_of
from jaxopt_models.kernels import _build, _load

HAVE = bool(kernels.status().path)
BOTH = jom.chain(quant.Int(bits=8), quant.Input(bits=8))
PARAMS = {"w": jnp.ones((64, 128)), "b": jnp.ones(128)}
X = jnp.ones((3, 64))
#: `w` packed: two panels of two chunks of 2,048 bytes, and 64 scales for each panel.
PACKED = 2 * 2 * 2048 + 2 * 64 * 4


def affine(p, x):
    return x @ p["w"] + p["b"][None]


def planned(params, recipe, fn, *args, **options):
    table = jom.plan(params, recipe, fn=fn, args=args, **options)
    json.loads(table.to_json())
    return table, {row["path"]: row for row in table}


def bytes_of(row):
    return row["bytes before"], row["bytes after"]


def test_a_product_by_hand():
    table, rows = planned(PARAMS, [Rule("w", BOTH)], affine, X)
    w, b, limits = rows["w"], rows["b"], table.data["limits"]
    assert (w["uses"], w["rows"], w["multiply-adds"]) == (1, 3, 3 * 64 * 128)
    moved = 4 * (3 * 64 + 3 * 128)
    stored = PACKED if HAVE else PACKED + 2 * 4 * 64 * 128
    assert bytes_of(w) == (4 * 64 * 128 + moved, stored + moved)
    rates = limits["flops"], limits["integer_ops"] if HAVE else limits["flops"]
    for when, rate in zip(("before", "after"), rates, strict=True):
        both = w[f"bytes {when}"] / limits["bandwidth"], 2 * w["multiply-adds"] / rate
        assert w[f"us {when}"] == pytest.approx(1e6 * max(both))
        assert ("memory", "arithmetic")[both[1] > both[0]] in w["bound"]
    assert w["gain"] == pytest.approx(w["us before"] / w["us after"])
    assert w["kernel"] == ("packed matmul" if HAVE else "rebuilt")
    # An addition is fused with others: only the parameter counts, and nothing becomes of it.
    assert (b["kernel"], b["rows"], b["gain"], bytes_of(b)) == ("dense", 0, 1, (512, 512))
    sums = [1e-6 * (w[k] + b[k]) for k in ("us before", "us after")]
    assert table.data["expected"] == pytest.approx(sums)
    assert table.data["measured"] is None
    notes = "\n".join(table.notes)
    assert "limits of cpu" in notes and "expected: " in notes and "not counted" in notes


def test_shapes_are_enough_and_nothing_is_compressed():
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    recipe = [Rule("w", BOTH)]
    want, _ = planned(PARAMS, recipe, affine, X)
    got, _ = planned(shapes[0], recipe, affine, shapes[1])
    assert str(got) == str(want)
    columns = jom.plan(PARAMS, recipe).columns
    assert [c for c in got.columns if c in columns] == list(columns)


@pytest.mark.parametrize(
    "encoder", [quant.Int(bits=4, group=32), quant.NF4(group=32), quant.Int(8)]
)
def test_wide_inputs_and_tables_cost_several_products_of_bytes(encoder):
    x = jnp.ones((4096, 64))  # many rows, so that arithmetic bounds it
    table, rows = planned(PARAMS, [Rule("w", encoder)], affine, x)
    with kernels.forced("off"):
        _, off = planned(PARAMS, [Rule("w", encoder)], affine, x)
    assert off["w"]["kernel"] == "rebuilt"
    if HAVE:
        products = 3 if isinstance(encoder, quant.NF4) else 2
        seconds = products * 2 * rows["w"]["multiply-adds"] / table.data["limits"]["integer_ops"]
        memory = rows["w"]["bytes after"] / table.data["limits"]["bandwidth"]
        assert rows["w"]["us after"] == pytest.approx(1e6 * max(seconds, memory))


def test_signs_have_a_limit_of_their_own():
    x = jnp.ones((4096, 64))
    table, rows = planned(PARAMS, [Rule("w", quant.XNOR())], affine, x)
    assert rows["w"]["kernel"] == ("binary matmul" if HAVE else "rebuilt")
    if HAVE:
        limits = table.data["limits"]
        seconds = 2 * rows["w"]["multiply-adds"] / limits["sign_ops"]
        memory = rows["w"]["bytes after"] / limits["bandwidth"]
        assert rows["w"]["us after"] == pytest.approx(1e6 * max(seconds, memory))


def test_without_kernels():
    with kernels.forced("off"):
        table, rows = planned(PARAMS, [Rule("w", BOTH)], affine, X)
    assert table.data["limits"]["integer_ops"] == 0
    assert rows["w"]["kernel"] == "rebuilt"
    assert "there are no compiled kernels: kernels are turned off" in rows["w"]["note"]
    moved, dense = 4 * (3 * 64 + 3 * 128), 4 * 64 * 128
    # Read as it is stored, written dense, and read again.
    assert rows["w"]["bytes after"] == PACKED + 2 * dense + moved


def test_linen_nnx_and_a_dict_are_told_alike():
    x, recipe = jnp.ones((2, 28, 28)), [Rule(".*/kernel", BOTH)]
    model = models.LeNet300()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    _, linen = planned(shapes, recipe, model.apply, x)
    linen = {path.removeprefix("params/"): row for path, row in linen.items()}
    twin = nnx.eval_shape(lambda: models.nnx.LeNet300(rngs=nnx.Rngs(0)))
    graph, state = nnx.split(twin)
    _, flat = planned(state, recipe, lambda p, x: nnx.merge(graph, p)(x), x)
    _, plain = planned(shapes["params"], recipe, lambda p, x: model.apply({"params": p}, x), x)
    assert linen.keys() == flat.keys() == plain.keys()
    for path, row in linen.items():
        for name in ("uses", "rows", "kernel", "multiply-adds", "bytes before", "bytes after"):
            assert row[name] == flat[path][name] == plain[path][name], (path, name)
    assert linen["ip1/kernel"]["multiply-adds"] == 2 * 784 * 300


def test_a_scanned_stack_counts_its_runs():
    params = {"v": jnp.ones((5, 64, 64))}

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["v"])[0]

    _, rows = planned(params, [Rule("v", quant.Int(bits=8), Axes(stack=1))], fn, X)
    v = rows["v"]
    assert (v["uses"], v["rows"], v["multiply-adds"]) == (5, 3, 5 * 3 * 64 * 64)
    moved, stored = 2 * 4 * 3 * 64, 2 * 2048 + 64 * 4
    if not HAVE:
        stored += 2 * 4 * 64 * 64
    assert bytes_of(v) == (5 * (4 * 64 * 64 + moved), 5 * (stored + moved))


def test_a_tied_weight_is_looked_up_and_multiplied_with():
    params = {"table": jnp.ones((64, 32)), "unused": jnp.ones(3)}

    def fn(p, i):
        return p["table"][i] @ p["table"].T

    i = jnp.zeros((2, 5), jnp.int32)
    _, rows = planned(params, [Rule("table", quant.Int(bits=8), Axes(out=(0,)))], fn, i)
    row = rows["table"]
    assert (row["uses"], row["rows"], row["multiply-adds"]) == (2, 10, 10 * 32 * 64)
    lookup = 4 * 10 * 32 + 4 * 10 * 32 + 4 * 10  # rows, the same again as result, indices
    assert row["bytes before"] == lookup + 4 * (64 * 32 + 10 * 32 + 10 * 64)
    assert "rebuilt" in row["kernel"] and "rows alone: rows are outputs" in row["note"]
    assert rows["unused"]["uses"] == 0 and rows["unused"]["us before"] == 0
    assert rows["unused"]["note"] == "no rule matches; never reaches the program"


def test_a_convolution_meets_positions():
    params = {"k": jnp.ones((3, 3, 4, 64))}

    def fn(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=dims)

    _, rows = planned(params, [Rule("k", BOTH)], fn, jnp.ones((2, 8, 8, 4)))
    k = rows["k"]
    assert (k["rows"], k["multiply-adds"]) == (2 * 4 * 4, 2 * 4 * 4 * 9 * 4 * 64)
    assert k["bytes before"] == 4 * (9 * 4 * 64 + 2 * 8 * 8 * 4 + 2 * 4 * 4 * 64)
    assert k["kernel"] == ("packed conv" if HAVE else "rebuilt")


def test_joined_and_hidden_uses():
    params = {
        "a": jnp.ones((64, 64)),
        "b": jnp.ones((64, 32)),
        "c": jnp.ones(64),
        "d": jnp.ones(32),
    }

    def fn(p, x):
        h = x @ jnp.concatenate([p["a"], p["b"]], axis=1)
        h = h + jnp.concatenate([p["c"], p["d"]])[None]
        h = lax.while_loop(lambda h: h.sum() < 0, lambda h: h @ p["a"], h[:, :64])
        return h @ h.T

    table, rows = planned(params, [Rule("b", quant.Int(bits=8))], fn, X)
    assert (rows["b"]["multiply-adds"], rows["b"]["rows"]) == (3 * 64 * 32, 3)
    assert rows["b"]["bytes before"] == 4 * 64 * 32 + 4 * (3 * 64 + 3 * 96) // 3
    assert "the parameter goes through concatenate" in rows["b"]["note"]
    assert rows["a"]["uses"] == 2 and "one iteration of a while loop" in rows["a"]["note"]
    assert "both with 576 multiply-adds between values that are no parameters" in str(table)
    seconds = 1e-6 * sum(row["us before"] for row in table)
    assert table.data["expected"][0] > seconds


def test_what_is_no_parameter_and_what_is_compressed_already():
    params = jom.compress(PARAMS, [Rule("w", prune.Magnitude(sparsity=0.5))])
    params["step"] = jnp.zeros((), jnp.int32)
    table, rows = planned(params, [Rule("w", quant.Int(bits=8))], affine, X)
    assert rows["step"]["uses"] is None and rows["step"]["gain"] is None
    assert rows["w"]["bytes before"] == 4 * 64 * 128 + 4 * (3 * 64 + 3 * 128)
    assert table.data["expected"][1] > 0


def test_a_tree_that_is_one_array():
    def fn(w, x):
        return x @ w, x @ x.T

    table, rows = planned(PARAMS["w"], [Rule("", BOTH)], fn, X)
    assert rows[""]["multiply-adds"] == 3 * 64 * 128 and rows[""]["bytes before"] > 4 * 64 * 128
    assert "both with 576 multiply-adds" in str(table)


def test_kernels_of_another_platform_do_not_run():
    small = jom.pack(jom.compress(PARAMS, [Rule("w", BOTH)]), target="cpu")
    speed = speed_of(affine, small, (X,), Limits("gpu", "a GPU", 1e12, 1e13))
    assert speed.cells("w")[2] == "rebuilt" and speed.cells("b")[2] == "dense"
    assert speed.costs["w"][1].seconds > 0


def test_what_is_measured():
    recipe = [Rule("w", prune.Magnitude(sparsity=0.75, structure=prune.Block(16, 1)))]
    params = {**PARAMS, "w": jax.random.normal(jax.random.key(0), (64, 128))}
    _, rows = planned(params, recipe, affine, X)
    assert rows["w"]["kernel"] == "rebuilt"
    assert rows["w"]["note"].endswith("depends on what the mask keeps: measure=True looks")
    table, rows = planned(params, recipe, affine, np.ones((3, 64), np.float32), measure=True)
    assert rows["w"]["kernel"] == ("sparse matmul" if HAVE else "rebuilt")
    assert "measure=True" not in rows["w"]["note"]
    before, after = table.data["measured"]
    assert before > 0 and after > 0
    assert "measured: " in table.notes[-1] and "times faster; medians" in table.notes[-1]


def test_what_does_not_go_together_is_told():
    recipe, shapes = [Rule("w", BOTH)], jax.eval_shape(lambda: (PARAMS, X))
    with pytest.raises(ValueError, match="plan: args says nothing without a function; give fn="):
        jom.plan(PARAMS, recipe, args=(X,))
    with pytest.raises(ValueError, match="plan: measure says nothing without a function"):
        jom.plan(PARAMS, recipe, measure=True)
    with pytest.raises(TypeError, match="plan: fn is str"):
        jom.plan(PARAMS, recipe, fn="affine", args=(X,))
    with pytest.raises(TypeError, match="plan: args is ArrayImpl; give the tuple"):
        jom.plan(PARAMS, recipe, fn=affine, args=X)
    for params, x, what in ((shapes[0], X, "'b' in params"), (PARAMS, shapes[1], "'0' in args")):
        with pytest.raises(ValueError, match=f"plan: measure=True runs fn, and {what} is ShapeDt"):
            jom.plan(params, recipe, fn=affine, args=(x,), measure=True)
    with pytest.raises(ValueError, match="plan: no parameter reached the program"):
        jom.plan(PARAMS, recipe, fn=lambda p, x: affine(PARAMS, x), args=(X,))


# ------------------------------------------------------------------ report


def test_report_names_the_kernel_of_each_leaf():
    w = jax.random.normal(jax.random.key(0), (3, 3, 32, 64))
    tree = dict.fromkeys(("codes", "pruned", "blocks", "signs", "wide", "dense"), w)
    blocks = prune.Magnitude(sparsity=0.75, structure=prune.Block(16, 1))
    recipe = [
        Rule("codes", BOTH),
        Rule("pruned", prune.Magnitude(sparsity=0.5)),
        Rule("blocks", blocks),
        Rule("signs", quant.XNOR()),
        Rule("wide", quant.Float("e4m3")),
    ]
    small = jom.compress(tree, recipe)
    before = {r["path"]: r["kernel"] for r in jom.report(None, small)}
    assert before["codes"] == before["blocks"] == before["signs"] == "pack it"
    assert before["dense"] == ""
    assert before["pruned"] == "none: runs of inputs are not kept or dropped together"
    assert before["wide"] == "none: there is no layout for tables of more than 16 values"
    after = {r["path"]: r["kernel"] for r in jom.report(tree, jom.pack(small, target="cpu"))}
    assert after["codes"] == "packed matmul, packed conv"
    assert (after["blocks"], after["signs"]) == ("sparse matmul", "binary matmul, binary conv")
    assert (after["pruned"], after["wide"]) == (before["pruned"], before["wide"])


@pytest.fixture
def nothing_loaded(monkeypatch, tmp_path):
    """As in a process that has not looked for kernels yet, with nothing compiled before."""
    monkeypatch.setattr(_load, "_LOADED", {})
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXOPT_MODELS_KERNELS", raising=False)
    _build._key.cache_clear()
    yield tmp_path
    _build._key.cache_clear()


def test_report_says_that_kernels_are_missing_and_compiles_none(nothing_loaded, monkeypatch):
    small = jom.compress(PARAMS, [Rule("w", quant.Int(bits=8))])
    if HAVE:
        assert len(jom.report(PARAMS, small).notes) == 1
        assert os.listdir(nothing_loaded / "cache") == [] and _load._LOADED == {}
    monkeypatch.setenv("PATH", str(nothing_loaded))
    monkeypatch.delenv("CXX", raising=False)
    assert "everything runs on XLA: no C++ compiler" in jom.report(PARAMS, small).notes[1]
    assert "install one" in jom.report(PARAMS, jom.pack(small, target="cpu")).notes[1]
    assert len(jom.report(None, PARAMS).notes) == 1
    with kernels.forced("off"):
        assert "kernels are turned off" in jom.report(PARAMS, small).notes[1]
