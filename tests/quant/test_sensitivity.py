"""Scores of one parameter in many formats, against plain loops and NumPy in float64."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sensitivity_models import BATCHES, FORMATS, RNG, X, plain, weights

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, quant


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.tanh(nn.Dense(12, name="hidden")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def model(kind):
    if kind == "dict":
        return plain, weights()
    if kind == "nnx":
        return jom.functional(Nnx(nnx.Rngs(0)))
    return jom.functional((Linen(), jax.jit(Linen().init)(jax.random.key(0), X)))


def loss_of(fn):
    def loss(params, x, y):
        logp = jax.nn.log_softmax(fn(params, x))
        return -jnp.mean(jnp.take_along_axis(logp, y[:, None], axis=1))

    return loss


@functools.cache
def compiled(fn, metric):
    return jax.jit(loss_of(fn) if metric == "loss" else fn)


def by_hand(metric, fn, params, path, encoder):
    """Compresses one parameter, runs the model, and compares in NumPy."""
    small = jom.materialize(jom.compress(params, [Rule(path, encoder)]))
    run = compiled(fn, metric)
    over = under = 0.0
    for x, y in BATCHES:
        if metric == "loss":
            over += float(run(small, x, y)) - float(run(params, x, y))
            under += 1
            continue
        a, b = (np.asarray(run(p, x), np.float64) for p in (params, small))
        if metric == "mse":
            over, under = over + np.sum((a - b) ** 2), under + np.sum(a**2)
            continue
        p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (a, b))
        over, under = over + np.sum(p * np.log(p / q)), under + len(x)
    return over / under


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("dict", "loss"), ("linen", "mse"), ("nnx", "kl"), ("nnx", "loss")],
)
def test_scores_are_those_of_a_plain_loop(kind, metric):
    fn, params = model(kind)
    batches = BATCHES if metric == "loss" else [(x,) for x, _ in BATCHES]
    given = {"metric": metric, "loss": loss_of(fn)}
    found = quant.sensitivity(fn, params, batches, FORMATS, **given)
    assert [c.path for c in found] == ["hidden/kernel", "out/kernel"]
    for c in found:
        assert [k.encoder for k in c.candidates] == FORMATS
        for k in c.candidates[:-1]:
            want = by_hand(metric, fn, params, c.path, k.encoder)
            assert k.score == pytest.approx(want, rel=2e-3, abs=2e-6)
            small = jom.plan(params, [Rule(c.path, k.encoder)])
            [row] = [row for row in small if row["path"] == c.path]
            assert k.bits == row["bits"] * c.size
        assert (c.candidates[-1].score, c.candidates[-1].bits) == (0, 32 * c.size)
    assert found.others == 32 * (12 + 4)


def test_all_at_once_scores_alike_and_one_program_serves_all():
    traces = []

    def fn(params, x):
        traces.append(None)
        return plain(params, x)

    batches = [(X,), (X[::-1],)]
    one = quant.sensitivity(fn, weights(), batches, FORMATS)
    assert len(traces) == 2  # the outputs, and what is compared with them
    together = quant.sensitivity(fn, weights(), batches, FORMATS, vectorize=True)
    for a, b in zip(one, together, strict=True):
        scores = [[k.score for k in c.candidates] for c in (a, b)]
        np.testing.assert_allclose(*scores, rtol=1e-4)


def test_hutchinson_is_within_five_percent_on_a_quadratic():
    shapes, n = {"a": (10, 6), "b": (2, 5, 4)}, 100
    mix = RNG.normal(size=(n, n)) * np.exp(RNG.normal(size=n))
    curve = mix @ mix.T / n
    cuts = [0, 60, 80, 100]  # a, and both of the stack b
    blocks = [curve[i:j, i:j] for i, j in itertools.pairwise(cuts)]
    traces = [np.trace(block) for block in blocks]
    params = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in shapes.items()}
    stacked = {"b": jom.Axes(stack=1)}

    def loss(params, h):
        v = jnp.concatenate([params["a"].ravel(), params["b"].ravel()])
        return v @ h @ v / 2

    batches = [(jnp.asarray(curve * c, jnp.float32),) for c in (0.5, 1.5)]
    encoder = quant.Int(bits=3)
    for path, axes in {"a": None, **stacked}.items():
        found = quant.sensitivity(
            loss,
            params,
            batches,
            [encoder],
            only=path,
            axes=axes,
            metric="hessian",
            probes=3000,
            key=jax.random.key(0),
        )
        w = np.asarray(params[path], np.float64)
        q = np.asarray(encoder(params[path], axes=axes).materialize(), np.float64)
        if path == "a":
            want = traces[0] * np.sum((w - q) ** 2) / 60 / 2
        else:
            errors = np.sum((w - q) ** 2, axis=(1, 2))
            want = sum(t * e / 20 / 2 for t, e in zip(traces[1:], errors, strict=True))
        assert found[path].candidates[0].score == pytest.approx(want, rel=0.05)
        assert "standard error" in found.note


def product(params, x):
    y = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )  # fmt: skip
    return y, y[:, 0, 0, :3] @ params["table"].T


def test_gram_is_the_relative_error_of_a_product():
    params = {
        "conv": jnp.asarray(RNG.normal(size=(2, 2, 3, 4)), jnp.float32),
        "table": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
    }
    x = jnp.asarray(RNG.normal(size=(4, 3, 3, 6)), jnp.float32)
    stats = jom.calibrate(product, params, [(x,)], ["gram"])
    encoder = quant.Int(bits=3)
    found = quant.sensitivity(None, params, None, [encoder], metric="gram", stats=stats)
    assert found["conv"].axes is None and found["table"].axes == Axes(out=(0,))
    small = jom.materialize(jom.compress(params, [Rule(".*", encoder)], stats=stats))
    for path, i in (("conv", 0), ("table", 1)):
        whole, new = (
            np.asarray(product({**params, path: p[path]}, x)[i], np.float64)
            for p in (params, small)
        )
        want = np.sum((whole - new) ** 2) / np.sum(whole**2)
        assert found[path].candidates[0].score == pytest.approx(want, rel=1e-4)
    assert quant.allocate_bits(found, budget_bits=40)[1] == Rule("table", encoder, Axes(out=(0,)))
