"""Scales and rotations of inputs around packed codes: AWQ, Hadamard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import kernels, quant
from jaxopt_models._encoded import innermost

if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_normal((64, 48), np.float32))
X = jnp.asarray(RNG.standard_normal((3, 5, 64), np.float32)) * jnp.linspace(0.1, 4, 64).reshape(
    1, 1, 64
)
INT4 = quant.Int(bits=4, group=32)
FORMATS = {
    "awq": quant.AWQ(INT4),
    "hadamard": quant.Hadamard(INT4),
    "hadamard, a table": quant.Hadamard(quant.Normal(4)),
    "awq, rounded inputs": jom.chain(quant.AWQ(INT4), quant.Input(bits=8)),
    "hadamard, rounded inputs": jom.chain(quant.Hadamard(quant.Int(bits=8)), quant.Input(bits=8)),
}


def compressed(fn, params, encoder, x, axes=None):
    recipe = [jom.Rule("w", encoder, axes)]
    stats = jom.calibrate(fn, params, [(x,)], ["gram", "l2", "mean"])
    return jom.compress(params, recipe, stats=stats, key=jax.random.key(0))


def close(got, want, bound=3e-4):
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * float(jnp.abs(want).max()))


def dense(p, x):
    return jax.nn.silu(x @ p["w"] + 0.5 * jnp.ones((1, 1, 48)))


def transposed(p, x):
    return x @ p["w"].T


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def pointwise(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = x.reshape(1, 3, 5, 64)
    return jax.lax.conv_general_dilated(x, p["w"], (2, 2), "VALID", dimension_numbers=numbers)


CASES = {
    "dense": (dense, W, None, "packed matmul on cpu + bias + silu"),
    "transposed": (transposed, W.T, jom.Axes.torch(), "packed matmul on cpu"),
    "scanned": (
        scanned,
        jnp.stack([jnp.tile(W, (1, 2))[:, :64], W @ W.T]) / 32,
        jom.Axes(stack=1),
        "packed matmul on cpu + tanh",
    ),
    "pointwise": (pointwise, W[None, None], None, "packed conv on cpu"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_products_with_moved_values(name, case):
    fn, w, axes, runs = CASES[case]
    small = compressed(fn, {"w": w}, FORMATS[name], X, axes)
    packed = jom.pack(small, target="cpu")
    run = jom.accelerate(fn)
    rows = [r for r in run.explain(packed, X) if r["multiply-adds"]]
    assert [(r["runs"], r["note"]) for r in rows] == [(runs, "")]
    codes, before = (innermost(p["w"]).materialize() for p in (packed, small))
    np.testing.assert_array_equal(codes, before)
    # XLA contracts multiplications and sums of a rotation where it does not optimize.
    close(jom.materialize(packed)["w"], jom.materialize(small)["w"], 1e-6)
    close(jax.jit(run)(packed, X), jom.simulate(fn)(small, X), 2e-2 if "inputs" in name else 3e-4)


@pytest.mark.parametrize("name", ["awq", "hadamard"])
def test_gradients_are_those_of_the_definition(name):
    small = compressed(dense, {"w": W}, FORMATS[name], X)
    packed = jom.pack(small, target="cpu")

    def slope(run, p):
        return jax.grad(lambda x: jnp.sum(jnp.cos(run(dense)(p, x))))(X)

    close(slope(jom.accelerate, packed), slope(jom.simulate, small), 1e-3)


def test_windows_of_many_pixels_are_rebuilt():
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = x.reshape(1, 3, 5, 64)
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)

    params = {"w": jnp.asarray(RNG.standard_normal((3, 3, 64, 8), np.float32))}
    packed = jom.pack(compressed(fn, params, quant.Hadamard(quant.Int(bits=8)), X), target="cpu")
    [row] = jom.accelerate(fn).explain(packed, X)
    assert row["runs"] == "rebuilt" and "windows of one pixel" in row["note"]
    close(jom.accelerate(fn)(packed, X), fn(jom.materialize(packed), X), 1e-5)


def test_a_packed_leaf_with_moved_values_is_in_no_file(tmp_path):
    packed = jom.pack(compressed(dense, {"w": W}, FORMATS["hadamard"], X), target="cpu")
    assert jom.report(None, packed)[0]["kernel"] == "packed matmul"
    with pytest.raises(ValueError, match="laid out for the kernels"):
        jom.artifact.save(tmp_path / "x.jom", packed)
