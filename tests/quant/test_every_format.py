"""Every weight of the zoo in every format: it is encoded, or said not to divide, by its path."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import quant
from jaxopt_models._axes import Matrix

sys.path.insert(0, str(Path(__file__).parents[1] / "walk"))
import zoo

FORMATS = [
    *(quant.Int(bits=b) for b in range(2, 9)),
    *(quant.Int(bits=b, symmetric=False) for b in (2, 4, 8)),
    quant.Int(bits=8, per="tensor"),
    quant.Int(bits=4, group=32),
    quant.Int(bits=4, group=2, block=2),
    quant.Int(bits=8, scale="power_of_two"),
    quant.NF4(),
    quant.Normal(bits=4),
    quant.Table((-1.0, -0.25, 0.0, 0.25, 1.0)),
    quant.Float("e4m3"),
    quant.Float("e5m2"),
    quant.MX("e4m3"),
    quant.MX("e3m2"),
    quant.MX("e2m3"),
    quant.MX("e2m1"),
    quant.NVFP4(),
    quant.Ternary(),
    quant.Binary(),
    quant.Binary(unit=True),
]


def divides(fmt, use, shape):
    """Whether runs and blocks fit a weight, by the rule that the README states."""
    core = shape[use.stack :]
    out = use.out if fmt.per == "channel" else ()
    m = Matrix(core, out)
    whole_blocks = fmt.block == 1 or (m.out_shape and m.out_shape[-1] % fmt.block == 0)
    return m.rows % (fmt.group or m.rows) == 0 and whole_blocks


def shares():
    """A fifth of the formats for each model, in turn; the others with --full."""
    for i, name in enumerate(zoo.names()):
        for j in range(5):
            yield pytest.param(name, FORMATS[j::5], marks=() if i % 5 == j else pytest.mark.full)


@pytest.mark.parametrize(("name", "formats"), list(shares()))
def test_every_weight_is_planned_or_does_not_divide(name, formats):
    case = zoo.case(name)
    shapes = {p.path: p.value.shape for p in jom._paths.flatten(case.params)[0]}
    for path, use in case.uses.items():
        axes = jom.Axes(out=tuple(a + use.stack for a in use.out), stack=use.stack)
        for fmt in formats:
            rule = [jom.Rule(re.escape(path), fmt, axes)]
            if divides(fmt, use, shapes[path]):
                [row] = [r for r in jom.plan(case.params, rule) if r["path"] == path]
                assert row["encoder"] == repr(fmt)
            else:
                with pytest.raises(ValueError, match=f"{re.escape(path)}: .*does not divide"):
                    jom.plan(case.params, rule)


@pytest.mark.full
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("name", zoo.names())
def test_every_product(name, fmt):
    case = zoo.case(name)
    shapes = {p.path: p.value.shape for p in jom._paths.flatten(case.params)[0]}
    rules = [
        jom.Rule(re.escape(path), fmt, jom.Axes(tuple(a + u.stack for a in u.out), u.stack))
        for path, u in case.uses.items()
        if divides(fmt, u, shapes[path])
    ]
    if not rules:
        pytest.skip("no weight of this model divides")
    small = jom.compress(case.params, rules)
    got = jax.jit(jom.accelerate(case.fn))(small, *case.args)
    want = jax.jit(case.fn)(jom.materialize(small), *case.args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max(initial=0)))
    dense = {p.path: p.value for p in jom._paths.flatten(jom.materialize(small))[0]}
    assert all(jnp.isfinite(dense[path]).all() for path in case.uses)
