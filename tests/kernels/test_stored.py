"""Codes as they are stored, by kernels of a GPU run on a CPU, and by integers of XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import _dispatch_stored, _kernels, codebook, prune, quant

W = np.random.default_rng(0).standard_normal((64, 96), np.float32)
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 64), np.float32))
I8 = quant.Int(bits=8)
AFTER, PLACE = "scales after the product on cpu", "codes in place on cpu"


@pytest.fixture
def here(monkeypatch):
    """The kernels of a GPU as if they were those of a CPU; Triton's are interpreted."""
    found = []
    for kernel in _kernels.KERNELS:
        if kernel.platforms == ("cuda",):
            run = kernel.run
            if run is _dispatch_stored.stored:
                run = functools.partial(run, interpret=True)
            found.append(dataclasses.replace(kernel, platforms=("cpu",), run=run))
    monkeypatch.setattr(_kernels, "KERNELS", found)


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def product(p, x):
    return x @ p["w"]


E4M3, NF4 = quant.Float("e4m3"), quant.NF4(group=32)
W8A8 = jom.chain(I8, quant.Input(bits=8))
MASKED = jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4))
HEADS = W.reshape(64, 8, 12)
CASES = [
    (product, W, None, I8, AFTER),
    (product, W, None, quant.Int(bits=4, block=2), AFTER),
    (product, W, None, quant.Int(bits=8, per="tensor"), AFTER),
    (product, W, None, E4M3, AFTER),
    (product, W, None, W8A8, AFTER),
    (product, W, None, MASKED, AFTER),
    (product, W, None, quant.Int(bits=8, symmetric=False), PLACE),
    (product, W, None, quant.Int(bits=3), PLACE),
    (lambda p, x: x @ p["w"].T, W.T, jom.Axes.torch(), I8, AFTER),
    (lambda p, x: x @ p["w"].T, W.T, jom.Axes.torch(), NF4, PLACE),
    # A tied embedding, whose scales are those of what is summed over.
    (lambda p, x: x @ p["w"].T, W.T, None, I8, AFTER),
    (lambda p, x: x @ p["w"].T, W.T, None, codebook.KMeans(bits=4), PLACE),
    (lambda p, x: jnp.einsum("io,...i->o...", p["w"], x), W, None, I8, AFTER),
    (lambda p, x: jnp.einsum("io,...i->o...", p["w"], x), W, None, NF4, PLACE),
    (lambda p, x: jnp.einsum("bld,dhk->bhlk", x, p["w"]), HEADS, jom.Axes(out=(1, 2)), I8, AFTER),
    (
        lambda p, x: jnp.einsum("eli,eio->elo", x, p["w"]),
        np.stack([W, 2 * W, -W]),
        jom.Axes(stack=1),
        I8,
        AFTER,
    ),
    (
        lambda p, x: jnp.einsum("eli,eio->elo", x, p["w"]),
        np.stack([W, 2 * W, -W]),
        jom.Axes(stack=1),
        quant.Int(bits=4, group=32),
        PLACE,
    ),
    (scanned, np.stack([W[:, :64], W[:, :64].T]) / 8, jom.Axes(stack=1), I8, AFTER),
    (scanned, np.stack([W[:, :64], W[:, :64].T]) / 8, jom.Axes(stack=1), NF4, PLACE),
]


@pytest.mark.parametrize(("fn", "w", "axes", "encoder", "runs"), CASES)
def test_value_and_gradients_are_those_of_the_definition(here, fn, w, axes, encoder, runs):
    small = jom.compress({"w": jnp.asarray(w)}, [jom.Rule("w", encoder, axes)])
    floats, rest = jom.partition(small)

    def loss(run, floats, x):
        return jnp.sum(jnp.sin(run(fn)(jom.combine(floats, rest), x)))

    assert jom.accelerate(fn).explain(small, X)[0]["runs"] == runs
    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1)))(floats, X)
        for run in (jom.accelerate, jom.simulate)
    ]
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("per", ["row", "tensor", "static"])
@pytest.mark.parametrize(("w", "axes"), [(W, None), (W.T, jom.Axes.torch())])
def test_rounded_inputs_are_multiplied_as_integers(w, axes, per, rows):
    encoder = jom.chain(quant.Int(bits=5), quant.Input(bits=8, per="row"))
    small = jom.compress({"w": jnp.asarray(w)}, [jom.Rule("w", encoder, axes)])
    if per != "row":
        scale = jnp.float32(0.02) if per == "static" else None
        small = {"w": dataclasses.replace(small["w"], per=per, scale=scale)}
    floats, rest = jom.partition(small)
    x = X.reshape(15, 64)[:rows]

    def fn(p, x):
        return x @ (p["w"] if axes is None else p["w"].T)

    def loss(run, floats, x):
        return jnp.sum(jnp.sin(run(fn)(jom.combine(floats, rest), x)))

    runs = jom.accelerate(fn).explain(small, x)[0]["runs"]
    assert runs.startswith("integers by XLA on cpu")
    both = [
        jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1))(floats, x)
        for run in (jom.accelerate, jom.simulate)
    ]
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_alone(bad):
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", W8A8)])
    x = X.reshape(15, 64)
    got = jom.accelerate(product)(small, x.at[4, 63].set(bad))
    assert np.isnan(got[4]).all()
    want = jom.accelerate(product)(small, x)
    np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(want, 4, 0))


@pytest.mark.parametrize("encoder", [quant.Int(bits=4), quant.Int(bits=4, group=32)], ids=str)
def test_a_result_of_another_type_is_refused(encoder):
    def fn(p, x):
        return jax.lax.dot(x, p["w"], preferred_element_type=jnp.float16)

    for rule in (encoder, jom.chain(encoder, quant.Input(bits=8))):
        small = jom.compress({"w": jnp.ones((64, 8))}, [jom.Rule("w", rule)])
        [row] = jom.accelerate(fn).explain(small, jnp.ones((3, 64)))
        assert row["runs"] == "rebuilt" and "the result is float16" in row["note"]
