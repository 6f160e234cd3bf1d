"""Allocation of formats against all assignments, a mixed-integer solver, and what trees store."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import jaxopt_models as jom
from jaxopt_models import Rule, quant
from jaxopt_models.quant import Candidate, Choices, Sensitivity

WIDTHS = (2, 3, 4, 5, 6, 8)


def measured(scores, bits, others=0):
    """What a search would have measured: scores and bits of each candidate of each parameter."""
    choices = []
    for i, (row, stored) in enumerate(zip(scores, bits, strict=True)):
        encoders = [quant.Int(bits=WIDTHS[k]) for k in range(len(row))]
        candidates = tuple(map(Candidate, encoders, stored, row))
        choices.append(Choices(f"w{i}", (10, 10), 3200, None, candidates))
    return Sensitivity("loss", tuple(choices), others)


def picks(found, recipe):
    by_path = {rule.path: rule.encoder for rule in recipe}
    return [
        next(j for j, k in enumerate(c.candidates) if k.encoder == by_path.get(c.path))
        for c in found
    ]


def total(rows, chosen):
    return sum(row[j] for row, j in zip(rows, chosen, strict=True))


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def rows(values):
        return [draw(st.lists(values, min_size=n, max_size=n)) for n in sizes]

    scores = rows(st.one_of(st.integers(-3, 3), st.floats(-1, 1, allow_subnormal=False)))
    return scores, rows(st.integers(1, 20)), rows(st.integers(0, 6)), draw(st.floats(0, 1.1))


# Here 29 bits of 400 entries are 0.0725 for each, and 0.0725 * 400 is less than 29.
ROUNDED = [[0, 0]] * 4, [[1, 1], [1, 1], [7, 9], [20, 20]], [[0, 0]] * 4, 0.25


@settings(max_examples=150, deadline=None)
@example(problem=ROUNDED, both=False, spare=0.0)
@given(problem=problems(), both=st.booleans(), spare=st.floats(0, 1.1))
def test_no_assignment_within_the_budgets_is_better(problem, both, spare):
    scores, bits, times, share = problem
    found = measured(scores, bits)

    def budget(rows, share):
        low, high = sum(map(min, rows)), sum(map(max, rows))
        return math.floor(low - 1 + (high - low + 2) * share)

    limits = {"budget_bits": budget(bits, share) / (100 * len(found))}
    if both:
        limits["budget_seconds"] = budget(times, spare)
        limits["latency"] = {
            c.path: {k.encoder: t for k, t in zip(c.candidates, row, strict=True)}
            for c, row in zip(found, times, strict=True)
        }
    feasible = [
        chosen
        for chosen in itertools.product(*(range(len(row)) for row in scores))
        if total(bits, chosen) <= budget(bits, share)
        and (not both or total(times, chosen) <= budget(times, spare))
    ]
    if not feasible:
        with pytest.raises(ValueError, match="cannot be met"):
            quant.allocate_bits(found, **limits)
        return
    chosen = picks(found, quant.allocate_bits(found, **limits))
    assert tuple(chosen) in feasible
    best = min(total(scores, c) for c in feasible)
    assert total(scores, chosen) == pytest.approx(best, abs=1e-9)


def realistic(n, seed, timed=False):
    """Layers of different sizes, of which some matter more; errors fall by four with each bit."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10_000, 1_000_000, size=n)
    weights = np.exp(1.5 * rng.normal(size=(n, 1)) + 0.2 * rng.normal(size=(n, len(WIDTHS))))
    scores = weights * 4.0 ** -np.array(WIDTHS)
    bits = sizes[:, None] * np.array(WIDTHS) + 1000
    times = sizes[:, None] * 1e-9 * rng.uniform(0.5, 1.5, size=bits.shape)
    return scores, bits, times


@pytest.mark.parametrize("timed", [False, True])
def test_as_good_as_a_mixed_integer_solver(timed):
    scores, bits, times = realistic(25, 0)
    found = measured(scores.tolist(), bits.tolist())
    budget = int(bits.min(1).sum() + 0.3 * (bits.max(1).sum() - bits.min(1).sum()))
    limits = {"budget_bits": budget / (100 * len(found))}
    rows = [LinearConstraint(bits.reshape(1, -1) / budget, ub=1)]
    if timed:
        seconds = 0.6 * times.min(1).sum() + 0.4 * times.max(1).sum()
        limits["budget_seconds"] = seconds
        limits["latency"] = {
            c.path: {k.encoder: t for k, t in zip(c.candidates, row, strict=True)}
            for c, row in zip(found, times, strict=True)
        }
        rows.append(LinearConstraint(times.reshape(1, -1) / seconds, ub=1))
    each = np.kron(np.eye(len(scores)), np.ones(len(WIDTHS)))
    answer = milp(
        scores.ravel() / scores.max(),
        constraints=[*rows, LinearConstraint(each, lb=1, ub=1)],
        integrality=np.ones(scores.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    chosen = picks(found, quant.allocate_bits(found, **limits))
    assert total(bits, chosen) <= budget
    assert total(scores, chosen) == pytest.approx(answer.fun * scores.max(), rel=1e-6)
    loose = picks(found, quant.allocate_bits(found, gap=0.1, **limits))
    assert total(scores, loose) <= 1.1 * total(scores, chosen)


def test_mixed_is_never_above_uniform_of_the_same_bytes():
    for seed in range(5):
        scores, bits, _ = realistic(40, seed)
        found = measured(scores.tolist(), bits.tolist(), others=1111)
        for k in range(len(WIDTHS)):
            size = (int(bits[:, k].sum()) + 1111) / 8
            chosen = picks(found, quant.allocate_bits(found, budget_bytes=size))
            assert total(bits, chosen) <= bits[:, k].sum()
            assert total(scores, chosen) <= scores[:, k].sum() * (1 + 1e-12)


def test_a_thousand_layers():
    scores, bits, _ = realistic(1000, 0)
    found = measured(scores.tolist(), bits.tolist())
    budget = float(bits[:, 2].sum()) / (100 * len(found))
    chosen = picks(found, quant.allocate_bits(found, budget_bits=budget))
    assert total(scores, chosen) < 0.7 * scores[:, 2].sum()


def test_where_all_is_as_good_as_all_else_a_gap_helps():
    rng = np.random.default_rng(0)
    bits = rng.integers(10**6, 10**7, size=(40, 1)) * np.array(WIDTHS)
    found = measured((-bits / 1e6).tolist(), bits.tolist())
    budget = float(bits[:, 2].sum() + 1) / (100 * len(found))
    with pytest.raises(ValueError, match=r"partial choices are as good as each other.*gap=1e-3"):
        quant.allocate_bits(found, budget_bits=budget)
    chosen = picks(found, quant.allocate_bits(found, budget_bits=budget, gap=1e-3))
    assert 0.999 < total(bits, chosen) / (bits[:, 2].sum() + 1) <= 1


def tree(x):
    return {
        "a.b": {"kernel": x.normal((8, 16)), "bias": jnp.zeros(16)},
        "a+b": {"kernel": x.normal((16, 4)), "norm": jnp.ones(4)},
    }


class Draws:
    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def normal(self, shape):
        return jnp.asarray(self.rng.normal(size=shape), jnp.float32)


def fn(params, x):
    h = jnp.tanh(x @ params["a.b"]["kernel"] + params["a.b"]["bias"][None])
    return h @ params["a+b"]["kernel"] * params["a+b"]["norm"][None]


@pytest.fixture(scope="module")
def real():
    draws = Draws()
    params = tree(draws)
    formats = [*(quant.Int(bits=b) for b in (2, 4, 8)), quant.Int(bits=3, group=4), None]
    return params, quant.sensitivity(fn, params, [(draws.normal((32, 8)),)], formats)


def stored(params, recipe):
    leaves = jax.tree.leaves(
        jom.compress(params, recipe), is_leaf=lambda x: isinstance(x, jom.Encoded)
    )
    return sum(x.storage_bits() if isinstance(x, jom.Encoded) else 32 * x.size for x in leaves)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_budgets_hold_for_what_is_stored(real, share):
    params, found = real
    least = sum(min(k.bits for k in c.candidates) for c in found)
    bits = math.ceil(least + share * (3200 - least))
    recipe = quant.allocate_bits(found, budget_bytes=(bits + found.others) / 8)
    assert stored(params, recipe) <= bits + found.others
    assert jom.recipe_from_json(jom.recipe_to_json(recipe)) == recipe
    assert recipe == quant.allocate_bits(found, budget_bits=bits / sum(c.size for c in found))


def test_what_stays_dense_has_no_rule_and_paths_are_escaped(real):
    params, found = real
    assert quant.allocate_bits(found, budget_bits=32) == []
    recipe = quant.allocate_bits(found, budget_bits=6)
    assert {rule.path for rule in recipe} <= {r"a\.b/kernel", r"a\+b/kernel"}
    jom.compress(params, recipe)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "give budget_bits, budget_bytes or budget_seconds"),
        ({"budget_bits": 4, "budget_bytes": 9}, "say the same; give one"),
        ({"budget_bits": 2}, r"budget_bits=2 cannot be met: the least possible is 5\.33333 bits"),
        ({"budget_bytes": 100}, "budget_bytes=100 cannot be met: the least possible is 208 bytes"),
        ({"budget_seconds": 1}, "latency and budget_seconds go together"),
        ({"budget_seconds": 1, "latency": {}}, r"no seconds for 'a\+b/kernel' as Int\(bits=2\)"),
        ({"budget_bits": math.nan}, "budget_bits=nan is not finite"),
        ({"budget_bits": 4, "gap": 1.5}, "gap=1.5 is not in"),
    ],
)
def test_what_is_wrong_is_named(real, limits, words):
    with pytest.raises(ValueError, match=words):
        quant.allocate_bits(real[1], **limits)


def test_times_that_cannot_be_met(real):
    _, found = real
    # The fewer bits, the slower.
    latency = {c.path: {k.encoder: 1000 / k.bits for k in c.candidates} for c in found}
    least = sum(1000 / max(k.bits for k in c.candidates) for c in found)
    with pytest.raises(ValueError, match=f"budget_seconds=0.1 .* least possible is {least:.6g} s"):
        quant.allocate_bits(found, latency=latency, budget_seconds=0.1)
    together = {"latency": latency, "budget_seconds": 1.05 * least}
    with pytest.raises(ValueError, match=r"together: with the second the least .* bits an entry"):
        quant.allocate_bits(found, budget_bits=6, **together)
    assert quant.allocate_bits(found, **together) == []
    slow = {**latency, "a+b/kernel": {**latency["a+b/kernel"], None: -1.0}}
    with pytest.raises(ValueError, match=r"latency of 'a\+b/kernel' as None is -1.0 seconds"):
        quant.allocate_bits(found, latency=slow, budget_seconds=1)
    with pytest.raises(TypeError, match="latency=3; give"):
        quant.allocate_bits(found, latency=3, budget_seconds=1)


def test_scores_that_are_not_finite_are_not_chosen():
    found = measured([[math.inf, 1.0], [2.0, math.inf]], [[1, 2], [1, 2]])
    assert picks(found, quant.allocate_bits(found, budget_bits=1)) == [1, 0]
    broken = measured([[math.inf, math.inf]], [[1, 2]])
    with pytest.raises(ValueError, match="no candidate for 'w0' has a finite score"):
        quant.allocate_bits(broken, budget_bits=1)
    with pytest.raises(TypeError, match="list is not what sensitivity"):
        quant.allocate_bits([Rule("a", None)], budget_bits=1)
