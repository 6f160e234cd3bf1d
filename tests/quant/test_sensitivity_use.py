"""What goes into a search by sensitivities, what comes out of it, and what is refused."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from sensitivity_models import FORMATS, RNG, X, plain, weights

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, prune, quant


def test_masks_stay_and_stacks_count():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 8, 8)), jnp.float32), "b": jnp.ones((3, 8))}
    pruned = jom.compress(params, [Rule("w", prune.Magnitude(sparsity=0.5), Axes(stack=1))])

    def fn(params, x):
        return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"][None]), None), x, params)[0]

    encoder = quant.Int(bits=4)
    found = quant.sensitivity(fn, pruned, [(X,)], [encoder], axes=Axes(stack=1))
    assert [c.path for c in found] == ["w"]
    small = jom.compress(pruned, [Rule("w", encoder, Axes(stack=1))])
    assert found["w"].candidates[0].bits == small["w"].storage_bits()
    assert quant.allocate_bits(found, budget_bits=9) == [Rule("w", encoder, Axes(stack=1))]


def test_solvers_and_keys_are_those_of_compress():
    params = weights()
    encoders = [quant.GPTQ(quant.Int(bits=3)), jom.codebook.KMeans(bits=2, start="random")]
    stats = jom.calibrate(plain, params, [(X,)], [Rule(".*/kernel", encoders[0])])
    found = quant.sensitivity(
        plain, params, [(X,)], encoders, only="out/.*", stats=stats, key=jax.random.key(3)
    )
    for k in found["out/kernel"].candidates:
        recipe = [Rule("out/kernel", k.encoder)]
        small = jom.compress(params, recipe, stats=stats, key=jax.random.key(3))
        a, b = plain(params, X), plain(jom.materialize(small), X)
        assert k.score == pytest.approx(float(jnp.sum((a - b) ** 2) / jnp.sum(a**2)), rel=1e-3)


def test_candidates_by_path_arguments_that_are_no_arrays_and_what_overflows():
    params = {**weights(), "name": "text"}

    def fn(params, x, mode):
        y = plain(params, x)
        assert mode == "square"
        return jnp.exp(1e3 * jnp.abs(jnp.sum(params["out"]["kernel"]) - SUM)) * y

    SUM = jnp.sum(params["out"]["kernel"])
    rules = {"hid.*": [quant.Int(bits=8)], ".*": [quant.Int(bits=2), None]}
    found = quant.sensitivity(fn, params, [(X, "square")], rules)
    assert [[k.encoder for k in c.candidates] for c in found] == list(rules.values())
    assert found["out/kernel"].candidates[0].score == np.inf
    assert [r.path for r in quant.allocate_bits(found, budget_bits=99)] == ["hidden/kernel"]


def test_it_prints_and_plots():
    found = quant.sensitivity(plain, weights(), [(X,)], FORMATS)
    assert len(found.table()) == len(found) * 4
    assert "out/kernel" in repr(found) and "sensitivity: mse" in repr(found)
    assert "<table>" in found._repr_html_()
    plt.switch_backend("agg")
    ax = found.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["hidden/kernel", "out/kernel"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(map(repr, FORMATS))
    plt.close("all")
    with pytest.raises(KeyError, match="no parameter 'out' takes part; paths are: hidden/kernel"):
        found["out"]


def rough(params, x):
    return jnp.sum(jnp.sqrt(jnp.abs(0 * params["out"]["kernel"])))


INT, KEY = [quant.Int(bits=4)], jax.random.key(0)
WRONG = [
    ({"metric": "psnr"}, ValueError, "metric='psnr' is none of loss, mse"),
    ({"only": "out"}, ValueError, "only='out' with these candidates: no parameter"),
    ({"candidates": {".*": INT, "out/.*": INT}}, ValueError, r"candidates for \['out/\.\*'\]"),
    ({"candidates": []}, ValueError, "give at least one"),
    ({"candidates": INT * 2}, ValueError, "none twice"),
    ({"candidates": quant.Int(bits=4)}, TypeError, "give a list of encoders"),
    ({"candidates": [4]}, TypeError, "candidate 4 is no encoder"),
    (
        {"candidates": [quant.Int(bits=4, group=5)]},
        ValueError,
        r"sensitivity: Int\(bits=4, group=5\): hidden/kernel: group",
    ),
    (
        {"candidates": [jom.chain(*INT, quant.Input(bits=8))]},
        TypeError,
        r"rounds inputs, too.* by guard, whose evaluate runs simulate\(fn\)",
    ),
    ({"candidates": [quant.GPTQ(INT[0])]}, ValueError, "hidden/kernel: .* needs the statistics"),
    ({"batches": [X]}, TypeError, "a batch is ArrayImpl"),
    ({"batches": (X,)}, TypeError, "batches is tuple"),
    ({"batches": []}, ValueError, "there is no batch"),
    ({"metric": "loss"}, ValueError, r"shapes \[\(16, 4\)\], not the one floating number"),
    ({"metric": "kl", "fn": lambda p, x: (x, x)}, ValueError, "one array of logits"),
    ({"metric": "gram"}, ValueError, "needs the statistic gram of hidden/kernel, out/kernel"),
    ({"metric": "hessian"}, ValueError, "draws random vectors; pass key="),
    ({"metric": "hessian", "key": KEY, "loss": rough}, ValueError, "second derivatives of rough"),
    ({"fn": lambda p, x: x.astype(int)}, ValueError, "no floating array"),
    ({"fn": lambda p, x: x / 0}, ValueError, "NaN or Inf before anything is compressed"),
    ({"fn": lambda p, x: 0 * x}, ValueError, "gives zeros only"),
    ({"fn": 3}, TypeError, "fn is int"),
    ({"axes": Axes(stack=3)}, ValueError, "no parameter of two or more axes"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG)
def test_what_is_wrong_is_named(change, error, words):
    given = {"fn": plain, "params": weights(), "batches": [(X,)], "candidates": INT, **change}
    args = [given.pop(k) for k in ("fn", "params", "batches", "candidates")]
    with pytest.raises(error, match=words):
        quant.sensitivity(*args, **given)


def test_inputs_rounded_before_and_broken_weights():
    small = jom.compress(weights(), [Rule("out/kernel", quant.Input(bits=8))])
    with pytest.raises(TypeError, match="params round inputs"):
        quant.sensitivity(plain, small, [(X,)], INT)
    broken = weights()
    broken["out"]["kernel"] = broken["out"]["kernel"] * jnp.nan
    with pytest.raises(ValueError, match="sensitivity: out/kernel: 48 of 48 entries"):
        quant.sensitivity(plain, broken, [(X,)], INT)
