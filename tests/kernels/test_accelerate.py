"""Functions of packed parameters: every kind of product, each by its kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import kernels, prune, quant

if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)

RNG = np.random.default_rng(0)
W = np.random.default_rng(0).standard_normal((64, 96), np.float32)
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 64), np.float32))
I8 = quant.Int(bits=8)
W8A8 = jom.chain(I8, quant.Input(bits=8))


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


CASES = {
    "dense": (lambda p, x: x @ p["w"], W, None),
    "first operand": (lambda p, x: jnp.einsum("io,...i->o...", p["w"], x), W, None),
    "transposed": (lambda p, x: x @ p["w"].T, W.T, jom.Axes.torch()),
    "in bfloat16": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        W,
        None,
    ),
    "heads": (
        lambda p, x: jnp.einsum("bld,dhk->bhlk", x, p["w"]),
        W.reshape(64, 8, 12),
        jom.Axes(out=(1, 2)),
    ),
    "from heads": (
        lambda p, x: jnp.einsum("blhk,hkd->bld", x.reshape(3, 5, 8, 8), p["w"]),
        W.reshape(8, 8, 96),
        jom.Axes(out=(2,)),
    ),
    "experts": (
        lambda p, x: jnp.einsum("eli,eio->elo", x, p["w"]),
        np.stack([W, 2 * W, -W]),
        jom.Axes(stack=1),
    ),
    "scanned": (scanned, np.stack([W[:, :64], W[:, :64].T]) / 8, jom.Axes(stack=1)),
    "nested": (
        lambda p, x: jax.lax.scan(lambda c, w: (scanned({"w": w}, c), None), x, p["w"])[0],
        np.stack([W[:, :64], W[:, :64].T]).reshape(2, 1, 64, 64) / 8,
        jom.Axes(stack=2),
    ),
}


@pytest.mark.parametrize("encoder", [I8, quant.Int(bits=4, group=32), W8A8], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_product_by_its_kernel(name, encoder):
    fn, w, axes = CASES[name]
    if axes is not None and axes.out == (1, 2) and "group" in str(encoder):
        encoder = quant.Int(bits=4, group=64)
    small = jom.compress({"w": jnp.asarray(w)}, [jom.Rule("w", encoder, axes)])
    packed = jom.pack(small, target="cpu")
    run = jom.accelerate(fn)
    rows = run.explain(packed, X)
    tail = " + tanh" if name in ("scanned", "nested") else ""
    assert [(row["runs"], row["note"]) for row in rows] == [(f"packed matmul on cpu{tail}", "")]
    got, want = run(packed, X), jom.simulate(fn)(small, X)
    assert got.shape == want.shape and got.dtype == want.dtype
    bound = {"in bfloat16": 1e-2}.get(name, 1e-5 if encoder is W8A8 else 3e-4)
    np.testing.assert_allclose(
        got.astype(jnp.float32),
        want.astype(jnp.float32),
        rtol=0,
        atol=bound * float(jnp.abs(want).max()),
    )


@pytest.mark.parametrize("encoder", [I8, W8A8], ids=str)
def test_gradients_are_those_of_the_definition(encoder):
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", encoder)])
    packed = jom.pack(small, target="cpu")

    def loss(run, p, x):
        return jnp.mean(run(lambda p, x: x @ p["w"])(p, x) ** 2)

    got = jax.grad(loss, argnums=2)(jom.accelerate, packed, X)
    want = jax.grad(loss, argnums=2)(jom.simulate, small, X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * float(jnp.abs(want).max()))
    floats, rest = jom.partition(packed)
    steps = jax.grad(lambda f: loss(jom.accelerate, jom.combine(f, rest), X))(floats)
    [step] = jax.tree.leaves(steps)
    assert step.shape == jax.tree.leaves(floats)[0].shape and float(jnp.abs(step).max()) > 0


def test_a_scanned_stack_is_not_copied_slice_by_slice():
    stack = jnp.asarray(RNG.standard_normal((4, 512, 512)), jnp.float32) / 23
    small = jom.pack(jom.compress({"w": stack}, [jom.Rule("w", I8, jom.Axes(stack=1))]))
    run = jax.jit(jom.accelerate(scanned)).lower(small, jnp.ones((1, 512))).compile()
    assert run.memory_analysis().temp_size_in_bytes < 512 * 512 // 4


def test_masks_and_lookups():
    masked = jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4))
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", masked)])
    packed = jom.pack(small, target="cpu")
    run = jom.accelerate(lambda p, x: x @ p["w"])
    assert run.explain(packed, X)[0]["runs"] == "packed matmul on cpu"
    want = X @ small["w"].materialize()
    np.testing.assert_allclose(run(packed, X), want, rtol=0, atol=1e-3)


LOOKUPS = [
    (I8, None),
    (quant.Int(bits=3), jom.Axes(out=(0,))),
    (quant.NF4(group=None), None),
    (jom.chain(prune.Magnitude(sparsity=0.5), I8), None),
    (W8A8, None),
]


@pytest.mark.parametrize("target", ["tpu", "cpu"])
@pytest.mark.parametrize(("encoder", "axes"), LOOKUPS, ids=str)
def test_lookups_rebuild_their_rows_alone(encoder, axes, target):
    small = jom.compress({"w": jnp.asarray(W)}, [jom.Rule("w", encoder, axes)])
    packed = jom.pack(small, target=target)
    dense, ids = small["w"].materialize(), jnp.array([[1, 2], [63, -1], [70, 0]])
    for how in ("fill", "clip"):
        run = jom.accelerate(lambda p, i, how=how: jnp.take(p["w"], i, axis=0, mode=how))
        np.testing.assert_array_equal(run(packed, ids), jnp.take(dense, ids, axis=0, mode=how))
    row = run.explain(packed, ids)[0]
    rows = target == "tpu" or (axes is None and "WithInput" not in packed["w"].kind())
    assert row["runs"] == ("rows alone" if rows else "rebuilt")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(None, "b"), P("a", None), P("a", "b")])
def test_weights_divided_over_a_mesh(spec, axis_type):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    w = jnp.asarray(RNG.standard_normal((128, 256)), jnp.float32)
    leaf = jom.pack(I8(w), target="cpu")
    x = jnp.asarray(RNG.standard_normal((6, 128)), jnp.float32)
    want = kernels.matmul.matmul(x, leaf, implementation="cpu")
    local = tuple(n // (2 if s else 1) for n, s in zip(w.shape, spec, strict=True))
    specs = leaf.specs(spec, local)
    placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), leaf, specs)
    rows = jax.device_put(x, NamedSharding(mesh, P(None, spec[0])))
    run = jax.jit(lambda x, w: kernels.matmul.matmul(x, w, implementation="cpu"))
    with jax.set_mesh(mesh):
        program = run.lower(rows, placed).compile()
        np.testing.assert_allclose(program(rows, placed), want, rtol=0, atol=1e-3)
    gathers = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    whole = axis_type == AxisType.Explicit and jax.__version_info__ >= (0, 12) and spec[0]
    if not whole:  # elsewhere weights stay where they are
        assert not any("u8[" in line for line in gathers)
        assert ("all-reduce" in program.as_text()) == (spec[0] is not None)
