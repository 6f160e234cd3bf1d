"""Every weight of the zoo in every format: it is encoded, or said not to divide, by its path.

What divides is the rule of `README.md`, whose table is checked row by row at the end.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import prune, quant
from jaxopt_models._axes import Matrix
from jaxopt_models.testing import random_stats

sys.path.insert(0, str(Path(__file__).parents[1] / "walk"))
import zoo

KINDS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
FORMATS = [
    *(quant.Int(bits=b) for b in range(2, 9)),
    *(quant.Int(bits=b, symmetric=False) for b in range(2, 9)),
    quant.Int(bits=8, per="tensor"),
    quant.Int(bits=4, group=32),
    quant.Int(bits=4, group=2, block=2),
    *(quant.Int(bits=8, scale=s) for s in ("power_of_two", "bfloat16", "float16")),
    quant.Int(bits=4, scale=quant.Int(bits=8)),
    quant.Int(bits=3, group=2, scale=quant.Float("e4m3", per="tensor")),
    quant.HQQ(bits=4),
    quant.HQQ(bits=2, group=2),
    quant.NF4(),
    quant.Normal(bits=4),
    quant.Table((-1.0, -0.25, 0.0, 0.25, 1.0)),
    *(quant.Float(kind) for kind in KINDS),
    *(quant.MX(kind) for kind in KINDS),
    quant.NVFP4(),
    quant.Ternary(),
    quant.Binary(),
    quant.Binary(unit=True),
]

# What the formats are cut into; in the default suite each model plans one part.
PARTS = 16


def divides(fmt, use, shape):
    """Whether runs and blocks fit a weight, by the rule that the README states."""
    core = shape[use.stack :]
    out = use.out if fmt.per == "channel" else ()
    m = Matrix(core, out)
    whole_blocks = fmt.block == 1 or (m.out_shape and m.out_shape[-1] % fmt.block == 0)
    return m.rows % (fmt.group or m.rows) == 0 and whole_blocks


def shares():
    """A part of the formats for each model, in turn; the others with --full."""
    for i, name in enumerate(zoo.names()):
        for j in range(PARTS):
            marks = () if i % PARTS == j else pytest.mark.full
            yield pytest.param(name, FORMATS[j::PARTS], marks=marks)


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


TORCH, HEADS = jom.Axes(out=(0,)), jom.Axes(out=(1, 2))
FOUR = quant.Int(bits=4, group=4)
# By the beginning of a row of the table: encoders, with a shape that divides and one that does not.
CASES = {
    "any encoder with `group=g`": [
        (FOUR, (8, 3), (10, 3)),
        (FOUR, (5, 8), (4, 6), TORCH),
        (FOUR, (2, 6, 4, 5), (3, 3, 2, 8)),  # of a convolution: 48 inputs, and 18
        (quant.Int(bits=4, group=3), (3, 3, 1, 8), (2, 2, 1, 9)),  # a depthwise one
        (quant.Int(bits=4, group=3), (9, 2, 2), (4, 3, 3), HEADS),
        (quant.GPTQ(FOUR), (8, 3), (6, 3)),
        (quant.Hadamard(FOUR), (8, 3), (6, 3)),
        (quant.HQQ(bits=4, group=4), (8, 3), (6, 3)),
        (jom.chain(prune.Magnitude(sparsity=0.5), FOUR), (8, 3), (6, 3)),
        (jom.chain(FOUR, quant.Input(bits=8)), (8, 3), (6, 3)),
    ],
    "`NF4()`, `MX(...)`, `NVFP4()`": [
        (quant.NF4(), (128, 2), (96, 2)),
        (quant.MX("e2m1"), (96, 2), (48, 2)),
        (quant.NVFP4(), (48, 2), (24, 2)),
        (quant.MX("e4m3"), (32, 1, 1, 5), (3, 3, 1, 5)),
        (quant.MX("e4m3"), (3, 3, 32, 8), (3, 3, 3, 32)),
    ],
    "any format with `block=b`": [
        (quant.Int(bits=8, block=3), (5, 6), (6, 5)),
        (quant.Int(bits=8, block=4), (2, 3, 8), (2, 4, 6), HEADS),  # both have 24 outputs
        (quant.NF4(group=None, block=2), (5, 6), (6, 5)),
    ],
    "`Hadamard(...)`": [
        (quant.Hadamard(quant.Int(bits=4)), (6, 5), (9, 4)),
        (quant.Hadamard(quant.NF4(group=None)), (2, 2, 1, 5), (3, 3, 1, 4)),
    ],
    "`scale=` a format with `group=g`": [
        (quant.Int(bits=4, group=2, scale=quant.Int(bits=8, group=3)), (12, 2), (8, 3)),
        (quant.Int(bits=4, scale=quant.Int(bits=8, group=1)), (12, 2), None),
    ],
    "`prune.Block(a, b)`, `prune.NofM(n, m)`": [
        (prune.Magnitude(sparsity=0.5, structure=prune.Block(2, 3)), (4, 6), (6, 4)),
        (prune.Magnitude(structure=prune.NofM(2, 4)), (8, 3), (6, 4)),
    ],
    "formats per channel or per tensor": [
        (quant.Int(bits=3), (7, 5), None),
        (quant.Int(bits=8, per="tensor"), (7, 5), None),
        (quant.Ternary(), (1, 1), None),
        (quant.Binary(), (3, 3, 1, 7), None),
        (quant.HQQ(bits=3), (5,), None),
        (quant.Float("e2m1"), (5,), None),
    ],
}  # fmt: skip


def test_the_table_of_what_does_not_divide_has_a_case_a_row():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = text.split("| encoder | raises for a weight unless |")[1].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert len(rows) == len(CASES)
    assert all(row.startswith(case) for row, case in zip(rows, CASES, strict=True)), rows


@pytest.mark.parametrize(
    "case", [case for cases in CASES.values() for case in cases], ids=lambda case: str(case[0])
)
def test_what_the_table_says_divides_is_planned_and_what_it_says_does_not_raises(case):
    encoder, good, bad, *axes = case
    rule = [jom.Rule("layers/w", encoder, *axes)]

    def planned(shape):
        w = jnp.ones(shape)
        stats = random_stats(encoder, w, axes=axes[0] if axes else None)
        given = {"stats": {"layers/w": stats} if stats else None, "key": jax.random.key(0)}
        return jom.plan({"layers": {"w": w}}, rule, **given)

    assert planned(good)[0]["encoder"] == repr(encoder)
    if bad is not None:
        with pytest.raises(ValueError, match="layers/w: "):
            planned(bad)
