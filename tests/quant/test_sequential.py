"""Layers compressed one after another, each on what the compressed ones before it give."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import quant
from jaxopt_models.quant._solver import corrected
from jaxopt_models.testing import leaf_bits

CODES = quant.GPTQ(quant.Int(bits=2))
RECIPE = [jom.Rule("(.*/)?[abw]", CODES)]


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return np.float32(x / np.sqrt(shape[-2]))


def mlp(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"]) @ params["w"]


@functools.cache
def case():
    """A small network, batches of two sizes that vary in few directions, and others."""
    params = {
        "a": normal(24, 24, seed=1),
        "b": normal(24, 24, seed=2),
        "bias": normal(1, 24, seed=3),
        "w": normal(24, 24, seed=4),
    }
    x = 3 * normal(400, 6, seed=5) @ normal(6, 24, seed=6)
    return params, [(x[:128],), (x[128:256],), (x[256:300],)], x[300:]


def error(fn, params, small, x):
    miss = fn(jom.materialize(small), x) - fn(params, x)
    return float(jnp.mean(jnp.square(miss)))


@functools.cache
def found(correct):
    params, batches, _ = case()
    return quant.sequential(mlp, params, RECIPE, batches, correct=correct)


def test_each_layer_is_calibrated_on_compressed_layers_before_it():
    params, batches, _ = case()
    now = dict(params)
    for path in ("a", "b", "w"):
        stats = jom.calibrate(mlp, jom.materialize(now), batches, ["gram"])[path]
        now[path] = CODES(params[path], stats=stats)
    small = found(False)
    assert small["bias"] is params["bias"]
    for path in ("a", "b", "w"):
        same = small[path].integers() == now[path].integers()
        assert np.mean(same) >= 0.98, path


def test_weights_are_corrected_for_what_the_float_model_does():
    params, batches, _ = case()
    x = jnp.concatenate([x for (x,) in batches])
    small = found(True)
    first = CODES(params["a"], stats=jom.calibrate(mlp, params, batches, ["gram"])["a"])
    assert leaf_bits(small["a"]) == leaf_bits(first)
    # The second layer, by least squares in float64.
    exact, seen = (
        np.tanh(np.asarray(x, np.float64) @ np.asarray(a, np.float64))
        for a in (params["a"], small["a"].materialize())
    )
    w, h = np.asarray(params["b"], np.float64), seen.T @ seen
    damp = np.sqrt(0.01 * np.mean(np.diag(h))) * np.eye(24)
    want = np.linalg.lstsq(np.r_[seen, damp], np.r_[exact @ w, damp @ w], rcond=None)[0]
    got = corrected(params["b"], jnp.asarray(h), jnp.asarray(seen.T @ (exact - seen)), 0.01)
    np.testing.assert_allclose(got, want, atol=1e-4)
    stats = jom.calibrate(mlp, {**params, "a": small["a"].materialize()}, batches, ["gram"])["b"]
    again = CODES(jnp.asarray(want, jnp.float32), stats=stats)
    assert np.mean(small["b"].integers() == again.integers()) >= 0.98


def test_the_output_is_nearer():
    params, batches, fresh = case()
    once = jom.compress(params, RECIPE, stats=jom.calibrate(mlp, params, batches, RECIPE))
    errors = [error(mlp, params, s, fresh) for s in (once, found(False), found(True))]
    assert errors[2] < 0.9 * errors[1] < 0.9 * 1.1 * errors[0]


def test_weights_that_are_rotated_are_corrected_alike():
    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": normal(16, 16, seed=1), "b": normal(16, 16, seed=2)}
    x = 3 * normal(400, 4, seed=5) @ normal(4, 16, seed=6)
    turned, key = quant.Hadamard(CODES), jax.random.key(0)
    plain, small = (
        quant.sequential(fn, params, [jom.Rule("[ab]", turned)], [(x[:300],)], correct=c, key=key)
        for c in (False, True)
    )
    assert error(fn, params, small, x[300:]) < 0.7 * error(fn, params, plain, x[300:])
    # Correcting what is rotated is correcting first and rotating then: a turn changes no length.
    exact, seen = (np.tanh(x @ np.asarray(w["a"])) for w in (params, jom.materialize(small)))
    stats = jom.calibrate(lambda p, x: x @ p["b"], params, [(seen,)], ["gram"])["b"]
    drift = seen.T @ (exact - seen)
    both = dataclasses.replace(stats, states={**stats.states, "drift": drift})
    first = jax.jit(corrected)(params["b"], stats.gram, drift, 0.01)
    got, want = (turned(w, stats=s, key=key) for w, s in ((params["b"], both), (first, stats)))
    assert np.mean(got.values.integers() == want.values.integers()) >= 0.98
    np.testing.assert_allclose(got.values.scale, want.values.scale, rtol=1e-4)


def block(x, layer):
    h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
    return x + (jnp.tanh(h @ layer["a"]) * (h @ layer["b"])) @ layer["w"] + layer["bias"], None


def stacked(params, x):
    return jax.lax.scan(jax.checkpoint(block), x, params)[0]


def listed(params, x):
    for layer in params:
        x, _ = block(x, layer)
    return x


def test_a_loop_over_stacked_layers_is_taken_layer_by_layer():
    layers = [{**case()[0], "w": normal(24, 24, seed=i)} for i in range(3)]
    params = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    recipe = [jom.Rule("(.*/)?[abw]", CODES), jom.Rule("(.*/)?bias", quant.Int(bits=8))]
    batches = case()[1][:1]
    small = quant.sequential(jax.jit(stacked), params, recipe, batches)
    each = quant.sequential(listed, layers, recipe, batches)
    assert small["a"].shape == (3, 24, 24)
    assert small["a"].stack == (3,)
    assert not small["a"].check()
    for path in ("a", "b", "w"):
        want = jnp.stack([layer[path].integers() for layer in each])
        assert np.mean(small[path].integers() == want) >= 0.98, path
    stats = jom.calibrate(stacked, params, batches, recipe)
    once = jom.compress(params, recipe, stats=stats)
    x = batches[0][0]
    assert error(stacked, params, small, x) < 0.8 * error(stacked, params, once, x)


def test_parameters_of_one_group_are_calibrated_at_once():
    params, batches, _ = case()
    stats = jom.calibrate(mlp, params, batches, ["gram"])
    once = jom.compress(params, RECIPE, stats=stats)
    small = quant.sequential(mlp, params, RECIPE, batches, correct=False, group="")
    for path in ("a", "b", "w"):
        assert np.mean(small[path].integers() == once[path].integers()) >= 0.98, path


class Interrupted(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Stopping(quant.GPTQ):
    """GPTQ that is stopped, and goes on later."""

    def run(self, w, *args):
        if not Stopping.left:
            raise Interrupted
        Stopping.left -= 1
        return CODES.run(w, *args)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    params, batches, _ = case()
    rule = jom.Rule("[abw]", Stopping(quant.Int(bits=2)))
    Stopping.left = 2
    with pytest.raises(Interrupted):
        quant.sequential(mlp, params, [rule], batches, resume=tmp_path)
    files = sorted(tmp_path.glob("*.jom"))
    assert len(files) == 2
    before = [f.stat().st_mtime_ns for f in files]
    Stopping.left = 1
    small = quant.sequential(mlp, params, [rule], batches, resume=tmp_path)
    assert [f.stat().st_mtime_ns for f in files] == before
    assert jax.tree.structure(small) == jax.tree.structure(found(True))
    assert leaf_bits(small) == leaf_bits(found(True))
    with pytest.raises(ValueError, match=r"resume=.* is of another run:\n  correct: True there"):
        quant.sequential(mlp, params, [rule], batches, resume=tmp_path, correct=False)


RESUMED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxopt_models import Rule, quant
params, x = {"a": np.eye(4, dtype="f"), "b": np.ones((4, 4), "f")}, np.eye(4, dtype="f")
def run(folder, kind=jax.nn.relu, shift=np.eye(4, dtype="f")):
    fn = lambda p, x: jax.nn.gelu(kind(x @ p["a"] + shift) @ p["b"])
    recipe = [Rule("[ab]", quant.GPTQ(quant.Int(2)))]
    quant.sequential(fn, params, recipe, [(x,)], resume=folder)
"""


def test_a_run_goes_on_in_another_process_and_with_the_same_function_only(tmp_path):
    names = {}
    exec(RESUMED, names)
    names["run"](tmp_path)
    times = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert len(times) == 3
    subprocess.run([sys.executable, "-c", f"{RESUMED}\nrun({str(tmp_path)!r})"], check=True)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == times
    for other in ({"kind": jnp.tanh}, {"shift": np.ones((4, 4), "f")}):
        with pytest.raises(ValueError, match="is of another run:\n  function: "):
            names["run"](tmp_path, **other)


def test_tied_masked_and_rounded_inputs():
    table, w = normal(16, 12, seed=1), normal(12, 12, seed=2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (40, 3)))

    def fn(params, tokens):
        return jnp.tanh(params["table"][tokens] @ params["w"]) @ params["table"].T

    params = {"table": table, "w": w}
    pruned = jom.chain(jom.prune.Magnitude(sparsity=0.5), quant.GPTQ(quant.Int(bits=4)))
    recipe = [
        jom.Rule("w", jom.chain(pruned, quant.Input(bits=8, per="static"))),
        jom.Rule("table", quant.GPTQ(quant.Int(bits=4))),
    ]
    small = quant.sequential(fn, params, recipe, [(tokens,)])
    assert small["w"].kind() == "WithInput(Masked(Quantized))"
    assert small["table"].out == (0,)  # the product with most operations decides
    got = jom.simulate(fn)(small, tokens)
    assert np.mean((got - fn(params, tokens)) ** 2) < 0.3 * np.mean(fn(params, tokens) ** 2)


def test_what_is_compressed_without_data_is_compressed_first():
    params, batches, _ = case()
    recipe = [jom.Rule("w", quant.Int(bits=4)), jom.Rule("[ab]", CODES)]
    small = quant.sequential(mlp, params, recipe, batches, correct=False)
    assert leaf_bits(small["w"]) == leaf_bits(quant.Int(bits=4)(params["w"]))
    assert leaf_bits(small["b"]) == leaf_bits(found(False)["b"])
    alone = quant.sequential(mlp, params, recipe[:1], batches)
    assert leaf_bits(alone) == leaf_bits(jom.compress(params, recipe[:1]))


def test_what_cannot_be_done_is_said():
    params, batches, _ = case()
    with pytest.raises(TypeError, match="a batch is ndarray"):
        quant.sequential(mlp, params, RECIPE, [batches[0][0]])
    with pytest.raises(ValueError, match="there is no batch"):
        quant.sequential(mlp, params, RECIPE, [])
    with pytest.raises(TypeError, match="correct=1"):
        quant.sequential(mlp, params, RECIPE, batches, correct=1)
    with pytest.raises(TypeError, match="sequential: key=0 is no random key; give jax"):
        quant.sequential(mlp, params, RECIPE, batches, key=0)
    with pytest.raises(TypeError, match="sequential runs on data: call it outside of jit"):
        jax.jit(lambda p: quant.sequential(mlp, p, RECIPE, batches))(params)
    with pytest.raises(ValueError, match="sequential: group"):
        quant.sequential(mlp, params, RECIPE, batches, group="(")
    with pytest.raises(ValueError, match="sequential: rule 0"):
        quant.sequential(mlp, params, [jom.Rule("c", CODES)], batches)
    with pytest.raises(ValueError, match="b, w meet no data in <lambda>"):
        quant.sequential(lambda p, x: x @ p["a"], params, RECIPE[:1], batches[:1])
    with pytest.raises(ValueError, match="input of a in mlp holds NaN"):
        quant.sequential(mlp, params, RECIPE, [(batches[0][0] * jnp.nan,)])
    with pytest.raises(ValueError, match=r"a needs the statistics \['gram'\]: gram of 24 rows"):
        quant.sequential(mlp, params, RECIPE, batches[:1], gram_rows=10)

    def loop(params, x):
        return jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ params["a"]), (0, x)
        )[1]

    with pytest.raises(ValueError, match=r"a: its inputs cannot be paired .* inside while"):
        quant.sequential(loop, {"a": params["a"]}, RECIPE, batches[:1])
    small = quant.sequential(loop, {"a": params["a"]}, RECIPE, batches[:1], correct=False)
    assert small["a"].kind() == "Quantized"
