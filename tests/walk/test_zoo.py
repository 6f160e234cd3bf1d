"""Every model of the zoo: value, gradient, statistics and table, on leaves of every kind."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant
from jaxopt_models._paths import flatten

HALF = prune.Magnitude(sparsity=0.5)
KINDS = {
    "int8": quant.Int(bits=8),
    "int4 in groups": quant.Int(bits=4, group=2),
    "masked": HALF,
    "clustered": codebook.KMeans(bits=3),
    "nested": jom.chain(HALF, quant.Int(bits=4, symmetric=False)),
}
ALL = ("absmax", "minmax", "l2", "mean", "histogram", "gram")


def compressed(case, kind):
    """Every weight that has a use, encoded with the axes that the walk found."""
    stats = jom.calibrate(case.fn, case.params, [case.args])
    rules = [jom.Rule(re.escape(p), KINDS[kind], stats[p].axes) for p in case.uses]
    return jom.compress(case.params, rules)


def close(got, want, tol=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * max(1, np.abs(b).max(initial=0)))


def value_and_gradient(case, kind):
    small = compressed(case, kind)
    weights = [p.value for p in flatten(small)[0] if p.path in case.uses]
    assert all(isinstance(w, jom.Encoded) for w in weights) and len(weights) == len(case.uses)
    part, rest = jom.partition(small)
    floating = [i for i, a in enumerate(case.args) if jnp.issubdtype(a.dtype, jnp.floating)]

    def of(run, read):
        def loss(part, *args):
            out = run(read(jom.combine(part, rest)), *args)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out)), out

        argnums = (0, *(i + 1 for i in floating))
        forward = case.name == "dict while loop"  # JAX has no reverse mode for it
        grad = jax.jit(loss if forward else jax.value_and_grad(loss, argnums, has_aux=True))
        return grad(part, *case.args)

    close(of(jom.accelerate(case.fn), lambda t: t), of(case.fn, jom.materialize))


NAMES = zoo.names()
# Here each model in one framework, and on one kind of leaf; every product with --full.
BY = {kind: [n for n in NAMES if n.startswith(kind)] for kind in ("linen", "nnx", "dict")}
TURNS = [*BY["linen"][::2], *BY["nnx"][1::2], *BY["dict"]]
# The gradients of these are in test_walk.
WALKED = {"matmul", "transposed", "merged axes", "used twice", "one of a stack", "cond", "take"}
DIFFERENT = [n for n in TURNS if n.removeprefix("dict ") not in WALKED]
SOME = [(n, list(KINDS)[i % len(KINDS)]) for i, n in enumerate(DIFFERENT)]


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_value_and_gradient(name, kind):
    value_and_gradient(zoo.case(name), kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_of_every_product(name, kind):
    value_and_gradient(zoo.case(name), kind)


def layers(inputs, stack):
    """Inputs of each layer of a stack, as a flat list; one if there is none."""
    if not stack:
        return [inputs]
    if isinstance(inputs, list):
        return inputs
    return list(inputs.reshape(-1, *inputs.shape[stack:]))


@jax.jit
def every(stats):
    return {name: getattr(stats, name) for name in stats.names}


def check_statistics(stats, use):
    assert stats.axes == jom.Axes(tuple(a + use.stack for a in use.out), use.stack)
    assert [n for _, n in stats.groups] == ([use.groups] if use.groups > 1 else [])
    found = every(stats)
    flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[use.stack :]), found)
    for i, x in enumerate(layers(use.inputs, use.stack)):
        got = jax.tree.map(lambda a, i=i: a[i], flat)
        top = np.abs(x).max(initial=1)
        np.testing.assert_allclose(
            got["absmax"], np.abs(x).max(-2, initial=0), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(got["minmax"].min, x.min(-2, initial=np.inf), atol=1e-5 * top)
        np.testing.assert_allclose(got["minmax"].max, x.max(-2, initial=-np.inf), atol=1e-5 * top)
        np.testing.assert_allclose(got["l2"], np.sqrt((x**2).sum(-2)), rtol=1e-5, atol=1e-5)
        mean = x.sum(-2) / max(1, x.shape[-2])
        np.testing.assert_allclose(got["mean"], mean, rtol=1e-5, atol=1e-5 * top)
        gram = np.swapaxes(x, -1, -2) @ x
        np.testing.assert_allclose(got["gram"], gram, rtol=1e-5, atol=1e-5 * (1 + abs(gram).max()))
        flat_groups = x if x.ndim > 2 else x[None]
        bins = got["histogram"]
        exponents, counts = np.ravel(bins.exponent), bins.counts.reshape(len(flat_groups), -1)
        for e, seen, one in zip(exponents, counts, flat_groups, strict=True):
            exact = np.histogram(one, bins=4096, range=(-(2.0**e), 2.0**e))[0]
            assert np.abs(seen - exact).sum() <= 4 and seen.sum() == one.size
    count = np.asarray(stats.count).reshape(-1)
    assert count.sum() == sum(
        x.shape[-2] * max(1, use.groups) for x in layers(use.inputs, use.stack)
    )


@pytest.mark.parametrize(
    "name", [n if n in TURNS else pytest.param(n, marks=pytest.mark.full) for n in NAMES]
)
def test_statistics_and_table(name):
    case = zoo.case(name)
    stats = jom.calibrate(case.fn, case.params, [case.args], ALL)
    assert set(stats) == set(case.uses)
    for path, use in case.uses.items():
        check_statistics(stats[path], use)
    table = jom.accelerate(case.fn).explain(case.params, *case.args)
    costs = {}
    for row in table:
        costs[row["path"]] = costs.get(row["path"], 0) + row["multiply-adds"]
    want = {path: use.macs for path, use in case.uses.items()}
    if name == "dict cond":  # the table lists both branches
        want["off"] = want["on"]
    if name == "dict while loop":  # and one iteration
        want = {path: macs // 3 for path, macs in want.items()}
    assert {path: costs[path] for path in case.uses} == want
    reached = {row["path"] for row in table if row["note"] != "never reaches the program"}
    every = {p.path for p in flatten(case.params)[0] if not p.reason}
    assert {row["path"] for row in table} - {""} == every
    assert set(case.uses) <= reached
