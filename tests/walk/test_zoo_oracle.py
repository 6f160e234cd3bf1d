"""The truth of the zoo holds: its NumPy models compute what JAX computes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from zoo_oracle import patches

from jaxopt_models._paths import flatten

FRAMEWORKS = ("linen", "nnx", "dict")
CASES = zoo.cases()
JITTED = {c.name: jax.jit(c.fn) for c in CASES}
ALL = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def weights(case):
    return {
        p.path: np.asarray(p.value, np.float64) for p in flatten(case.params)[0] if not p.reason
    }


def cores(case, path):
    """Matrices `[rows, columns]` of a weight: of its layers, of its groups, or the only one."""
    use, w = case.uses[path], weights(case)[path]
    for core in w if use.stack else [w]:
        inner = [a for a in range(core.ndim) if a not in use.out]
        matrix = core.transpose(*inner, *use.out).reshape(
            -1, math.prod(core.shape[a] for a in use.out)
        )
        yield from np.split(matrix, use.groups, axis=1)


def blocks(use):
    """The inputs of each layer or group."""
    return list(use.inputs) if use.stack or use.groups > 1 else [use.inputs]


def test_names():
    names = zoo.names()
    assert len(set(names)) == len(names)
    assert {n.split()[0] for n in names} == set(FRAMEWORKS)
    linen, nnx = ({n.split(" ", 1)[1] for n in names if n.startswith(f)} for f in FRAMEWORKS[:2])
    assert linen == nnx and len(linen) > 20


@ALL
def test_forward(case):
    """The rows of each weight are what the outputs are computed from."""
    out = JITTED[case.name](case.params, *case.args)
    assert out.dtype == jnp.float32 and out.shape == case.expected.shape
    assert case.expected.dtype == np.float64
    np.testing.assert_allclose(out, case.expected, rtol=1e-5, atol=1e-5)


@ALL
def test_uses(case):
    """Paths are there, and inputs have the rows and blocks of their weights."""
    found = weights(case)
    assert case.uses
    for path, use in case.uses.items():
        matrices, inputs = list(cores(case, path)), blocks(use)
        assert path in found and len(matrices) == len(inputs)
        assert bool(use.stack) == bool(case.stacked and re.fullmatch(case.stacked, path))
        for matrix, block in zip(matrices, inputs, strict=True):
            assert block.dtype == np.float64 and block.ndim == 2
            assert block.shape[1] == matrix.shape[0]
    if case.stacked:
        assert any(use.stack for use in case.uses.values())
    left = set(found) - set(case.uses)
    assert all(path.split("/")[-1] in ("bias", "b", "scale", "mean", "var") for path in left), left


# Multiply-adds that are fewer than those of the whole weight and all its samples.
SPARSE = {
    "linen conv transpose": 4,
    "nnx conv transpose": 4,
    "linen conv transpose 1d": 2,
    "nnx conv transpose 1d": 2,
    "linen embedding": math.inf,
    "nnx embedding": math.inf,
    "dict take": math.inf,
    "dict some columns": 10 / 3,
    "dict some rows": 6 / 4,
}


@ALL
def test_macs(case):
    """The hand counts agree with samples times entries."""
    for path, use in case.uses.items():
        count = sum(len(b) * m.size for b, m in zip(blocks(use), cores(case, path), strict=True))
        assert use.macs == round(count / SPARSE.get(case.name, 1))


@ALL
def test_every_use_matters(case):
    """The output hangs on each weight that has samples, and on no other."""
    leaves, unflatten = flatten(case.params)
    expected = JITTED[case.name](case.params, *case.args)
    for path, use in case.uses.items():
        moved = unflatten([p.value * 1.5 if p.path == path else p.value for p in leaves])
        changed = not np.allclose(
            JITTED[case.name](moved, *case.args), expected, rtol=1e-3, atol=1e-3
        )
        assert changed == any(len(b) for b in blocks(use))


def test_ragged():
    """Layers without samples, and branches not taken, are there with none."""
    assert [len(b) for b in zoo.case("dict one of a stack").uses["v"].inputs] == [0, 0, 3, 0]
    assert zoo.case("dict cond").uses["off"].inputs.shape == (0, 6)
    assert zoo.case("dict while loop").uses["w"].inputs.shape == (3 * 2, 6)
    assert zoo.case("dict used twice").uses["w"].inputs.shape == (3 + 2, 6)
    assert not zoo.case("dict some rows").uses["w"].inputs[:, 4:].any()


def test_groups():
    assert zoo.case("nnx conv grouped").uses["kernel"].inputs.shape == (2, 2 * 4 * 5, 3 * 2 * 2)
    assert zoo.case("nnx conv depthwise").uses["kernel"].inputs.shape == (4, 2 * 3 * 3, 2 * 3)
    assert zoo.case("linen scan").uses["layers/dense/kernel"].inputs.shape == (3, 2, 8)


def test_gradient():
    """`inputs` are the other factor: the gradient of a weighted sum is `inputs.T @ weights`."""
    rng = np.random.default_rng(0)
    for name in ("linen conv 2d dilated", "nnx conv transpose", "dict conv with channels first"):
        case = zoo.case(name)
        (path, use), out = *case.uses.items(), case.expected
        c = rng.normal(size=out.shape)
        grads = jax.grad(lambda p, case=case, c=c: (case.fn(p, *case.args) * c).sum())(case.params)
        grad = next(np.asarray(p.value) for p in flatten(grads)[0] if p.path == path)
        channel = 1 if "first" in name else c.ndim - 1
        rows = use.inputs.T @ np.moveaxis(c, channel, -1).reshape(len(use.inputs), -1)
        inner = [a for a in range(grad.ndim) if a not in use.out]
        grad = grad.transpose(*inner, *use.out).reshape(rows.shape)
        np.testing.assert_allclose(grad, rows, rtol=1e-4, atol=1e-4)


def test_patches():
    """Padding, stride, dilation and spread in one window each."""
    x = np.arange(1.0, 5)[None, :, None]

    def cut(*args, **options):
        return patches(x, *args, **options)[0, ..., 0].tolist()

    assert cut([3], [(1, 0)]) == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert cut([2], [(0, 0)], stride=[2]) == [[1, 2], [3, 4]]
    assert cut([2], [(0, 1)], dilation=[3]) == [[1, 4], [2, 0]]
    assert cut([4], [(0, 0)], spread=[2]) == [
        [1, 0, 2, 0],
        [0, 2, 0, 3],
        [2, 0, 3, 0],
        [0, 3, 0, 4],
    ]
