"""The guard: the drop is met, the best tree is kept whatever happens, every try is written down."""

import contextlib
import itertools
import re
import signal
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import Rule, quant
from jaxopt_models.quant._guard_search import Limit

RNG = np.random.default_rng(0)
FORMATS = [quant.Int(bits=b) for b in (2, 3, 4, 6, 8)]
PARAMS = {
    name: {"kernel": jnp.asarray(RNG.normal(size=(16, 16)) / 4, jnp.float32), "bias": jnp.zeros(16)}
    for name in "abc"
}
X = jnp.asarray(RNG.normal(size=(400, 16)), jnp.float32)


def fn(params, x):
    for name in "abc":
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


LABELS = jnp.argmax(fn(PARAMS, X), axis=-1)


def agreement(small):
    """The share of samples with the label of the dense model, in percent."""
    return 100 * float(jnp.mean(jnp.argmax(fn(jom.materialize(small), X), axis=-1) == LABELS))


def bits(recipe):
    return 8 * sum(
        float(row["bits"]) * np.prod(row["shape"]) / 8 for row in jom.plan(PARAMS, recipe)
    )


@pytest.fixture(scope="module")
def found():
    return quant.sensitivity(fn, PARAMS, [(X[:100],)], FORMATS)


def test_the_smallest_tree_that_meets_the_drop(found):
    result = quant.guard(PARAMS, found, evaluate=agreement, drop=5.0)
    assert result.dense == 100 and not result.interrupted
    assert result.score == agreement(result.small) >= 95
    good = [row for row in result.history if row["good"]]
    assert min(row["bytes"] for row in good) == bits(result.recipe) / 8
    for row in result.history:
        assert row["good"] == (row["below"] <= 5.0) == (row["score"] >= 95)
    eight = bits([Rule(".*/kernel", quant.Int(bits=8))])
    assert bits(result.recipe) < 0.9 * eight
    assert result.history.columns == ("tried", "bytes", "score", "below", "good")
    assert 5 <= len(result.history) <= 20
    assert "best: " in repr(result)
    jom.verify(result.small, PARAMS)


def test_the_drop_is_held_with_confidence(found):
    def right(small):
        predicted = jnp.argmax(fn(jom.materialize(small), X), axis=-1)
        return 100.0 * np.asarray(predicted == LABELS)

    for confidence in (0.5, 0.95):
        result = quant.guard(PARAMS, found, evaluate=right, drop=5.0, confidence=confidence)
        assert result.dense == 100 and result.score == pytest.approx(right(result.small).mean())
        lost = 100 - right(result.small)
        tries = int(re.search(r"all of at most (\d+) trees", repr(result))[1])
        assert len(result.history) - 1 <= tries <= 12
        z = statistics.NormalDist().inv_cdf(1 - (1 - confidence) / tries)
        lost = np.append(lost, 100)
        assert lost.mean() + z * lost.std(ddof=1) / np.sqrt(401) <= 5
        for row in result.history[1:]:
            p = (400 * row["below"] / 100 + 1) / 401
            bound = 100 * (p + z * np.sqrt(p * (1 - p) / 400))
            assert row["good"] == (bound <= 5)
    with pytest.raises(ValueError, match="scores of shape"):
        shorter = iter(range(400, 0, -1))
        quant.guard(PARAMS, found, evaluate=lambda p: right(p)[: next(shorter)], drop=5.0)


def test_a_layer_that_scores_hide_is_mended():
    """Scores say nothing of layer b, which must not be touched."""
    candidates = [quant.Int(bits=2), quant.Int(bits=4)]
    choices = quant.sensitivity(fn, PARAMS, [(X[:100],)], candidates)

    def evaluate(small):
        return float(isinstance(small["b"]["kernel"], jom.Encoded)) * -1.0

    result = quant.guard(PARAMS, choices, evaluate=evaluate, drop=0.5)
    assert [r.path for r in result.recipe] in (["a/kernel", "c/kernel"], ["a/kernel"], ["c/kernel"])
    assert {row["tried"] for row in result.history} == {"dense", "budget", "mended"}


def test_where_nothing_is_good_the_dense_tree_is_returned(found, tmp_path):
    def exact(small):
        return -float(any(isinstance(v["kernel"], jom.Encoded) for v in small.values()))

    file = tmp_path / "best.jom"
    result = quant.guard(PARAMS, found, evaluate=exact, drop=0.0, save=file)
    assert result.recipe == [] and result.small is PARAMS and result.score == 0
    np.testing.assert_array_equal(jom.load(file)["a"]["kernel"], PARAMS["a"]["kernel"])


def test_everything_is_good_where_nothing_matters(found):
    result = quant.guard(PARAMS, found, evaluate=lambda small: 1.0, drop=0.0)
    assert {rule.encoder for rule in result.recipe} == {quant.Int(bits=2)}


@pytest.mark.parametrize("after", [3, 5])
def test_ctrl_c_keeps_the_best(found, tmp_path, after):
    calls = itertools.count(1)

    def evaluate(small):
        if next(calls) == after:
            raise KeyboardInterrupt
        return agreement(small)

    file = tmp_path / "best.jom"
    result = quant.guard(PARAMS, found, evaluate=evaluate, drop=20.0, save=file)
    assert result.interrupted and "interrupted" in repr(result)
    assert len(result.history) == after - 1 and result.recipe
    assert agreement(result.small) == result.score >= 80
    assert agreement(jom.load(file)) == result.score
    assert [p.name for p in tmp_path.iterdir()] == ["best.jom"]


def test_ctrl_c_before_anything_is_known(found):
    def evaluate(small):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quant.guard(PARAMS, found, evaluate=evaluate, drop=1.0)


def test_what_fails_leaves_the_best_in_its_file(found, tmp_path):
    calls = itertools.count(1)

    def evaluate(small):
        if next(calls) == 4:
            raise RuntimeError("the disk is gone")
        return agreement(small)

    with pytest.raises(RuntimeError, match="the disk is gone"):
        quant.guard(PARAMS, found, evaluate=evaluate, drop=20.0, save=tmp_path / "best.jom")
    assert agreement(jom.load(tmp_path / "best.jom")) >= 80


def test_a_score_that_is_not_a_number_is_not_good(found):
    def evaluate(small):
        broken = any(isinstance(v["kernel"], jom.Encoded) for v in small.values())
        return float("nan") if broken else 1.0

    assert quant.guard(PARAMS, found, evaluate=evaluate, drop=1.0).recipe == []


def test_recipes_and_another_compress():
    solvers = [[Rule("b/kernel", quant.GPTQ(quant.Int(bits=b)))] for b in (2, 4, 8)]
    stats = jom.calibrate(fn, PARAMS, [(X[:100],)], solvers[0])

    def compress(params, recipe):
        return jom.compress(params, recipe, stats=stats)

    result = quant.guard(PARAMS, solvers, evaluate=agreement, drop=6.0, compress=compress)
    scores = [agreement(compress(PARAMS, recipe)) for recipe in solvers]
    assert scores[0] < 94 <= scores[1]
    assert result.recipe == solvers[1]
    assert {row["tried"] for row in result.history} == {"dense", "budget"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"drop": -1}, ValueError, "drop=-1.0 is how far"),
        ({"drop": "1"}, TypeError, "drop='1' is no number"),
        ({"evaluate": 3}, TypeError, "evaluate is int"),
        ({"compress": 3}, TypeError, "compress is int"),
        ({"evaluate": lambda small: float("inf")}, ValueError, "evaluate gives inf for the dense"),
        ({"evaluate": lambda small: None}, TypeError, "evaluate gives NoneType"),
        ({"evaluate": lambda small: "good"}, TypeError, "evaluate gives str"),
        ({"save": 3}, TypeError, "save is int; give the path"),
        ({"candidates": []}, ValueError, "there is no recipe"),
        ({"candidates": [Rule("a", None)]}, TypeError, "a recipe is a list of rules"),
        ({"candidates": Rule("a", None)}, TypeError, "give what sensitivity"),
        ({"save": "/nowhere/at/all.jom"}, FileNotFoundError, "there is no such folder"),
    ],
)
def test_what_is_wrong_is_named(found, change, error, words):
    given = {"candidates": found, "evaluate": agreement, "drop": 1.0, **change}
    with pytest.raises(error, match=words):
        quant.guard(PARAMS, given.pop("candidates"), **given)


def test_recipes_in_the_wrong_order_are_refused():
    recipes = [[Rule(".*/kernel", quant.Int(bits=b))] for b in (8, 6, 4, 3, 2)]
    with pytest.raises(ValueError, match=r"candidates\[\d\] gives [\d,]+ bytes and candidates"):
        quant.guard(PARAMS, recipes, evaluate=agreement, drop=5.0)


@pytest.mark.parametrize("n", [2, 50, 400, 1000, 5000])
def test_a_bad_tree_passes_no_more_often_than_promised(n):
    limit, wrong = Limit(0.5, 0.95, 12), RNG.random((4000, n)) < 0.0055
    passed = [limit.allows(np.full(n, 100.0), 100.0 * ~row) for row in wrong]
    assert np.mean(passed) <= 0.05 / 12 + 3 * np.sqrt(0.05 / 12 / 4000)


@pytest.mark.parametrize("lost", [True, False])
def test_a_signal_keeps_the_best(lost):
    tried = []

    def evaluate(small):
        tried.append(small)
        if len(tried) == 3:
            with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
                signal.raise_signal(signal.SIGINT)
        return 0.0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        recipes = [[Rule(".*/kernel", quant.Int(bits=b))] for b in (2, 3, 4, 6, 8)]
        result = quant.guard(PARAMS, recipes, evaluate=evaluate, drop=1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    good = [row["bytes"] for row in result.history if row["good"]]
    assert result.interrupted and len(tried) == 3 and len(result.history) == 2 + lost
    assert bits(result.recipe) / 8 == min(good)


def test_few_samples_prove_nothing_but_the_dense_tree_is_good():
    recipes = [[Rule(".*/kernel", quant.Int(bits=b))] for b in (4, 8)]
    result = quant.guard(PARAMS, recipes, evaluate=lambda small: np.full(20, 100.0), drop=0.5)
    assert [row["good"] for row in result.history] == [True, False, False]
    assert result.recipe == []
