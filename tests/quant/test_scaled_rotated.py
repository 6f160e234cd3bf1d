import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Axes, Masked, Rule, chain, codebook, prune
from jaxopt_models.artifact import ArtifactError, Reader
from jaxopt_models.artifact._describe import BUILT_IN, check
from jaxopt_models.quant import GPTQ, MSE, NF4, Hadamard, Input, Int, Rotated, Scaled
from jaxopt_models.quant._rotated import block_of, paley, rotate
from jaxopt_models.testing import leaf_bits

KEY = jax.random.key(7)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix(rows, flips):
    """The rotation as a matrix, float64, its power of two by the parity of common bits."""
    power, order = block_of(rows)
    i = np.arange(power)
    sylvester = np.array([[(-1.0) ** (int(a) & int(b)).bit_count() for b in i] for a in i])
    h = sylvester if order == 1 else np.kron(paley(order), sylvester)
    whole = np.kron(np.eye(rows // len(h)), h) / np.sqrt(len(h))
    return whole * np.where(flips, -1, 1)


@pytest.mark.parametrize("order", [12, 20, 28, 36])
def test_small_matrices_are_those_of_hadamard(order):
    h = paley(order)
    assert set(np.unique(h)) == {-1, 1}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("rows", "block"),
    [(1, 1), (9, 1), (22, 2), (64, 64), (384, 384), (576, 576), (40, 40), (56, 56), (11008, 256)],
)
def test_blocks_are_the_largest_that_there_are(rows, block):
    power, order = block_of(rows)
    assert power * order == block and power & -power == power


@pytest.mark.parametrize("rows", [2, 16, 24, 40, 44, 56, 72, 180])
def test_the_rotation_is_the_product_with_its_matrix(rows):
    x, flips = normal(rows, 3), np.random.default_rng(1).random(rows) < 0.5
    r = matrix(rows, flips)
    np.testing.assert_allclose(r @ r.T, np.eye(rows), atol=1e-12)
    both = jax.jit(lambda x, flips: (rotate(x, flips), rotate(x, flips, back=True)))
    got, back = both(x, flips)
    np.testing.assert_allclose(got, r @ x, atol=1e-5)
    np.testing.assert_allclose(back, r.T @ x, atol=1e-5)


INNER = {
    "dense": lambda v, axes: jnp.asarray(v),
    "Quantized": lambda v, axes: Int(bits=3, symmetric=False)(v, axes=axes),
    "Tabulated": lambda v, axes: NF4(group=8)(v, axes=axes),
    "Clustered": lambda v, axes: codebook.KMeans(bits=3)(v, axes=axes),
    "Masked(Quantized)": lambda v, axes: chain(prune.Magnitude(sparsity=0.5), Int(bits=4))(
        v, axes=axes
    ),
}


def around(kind, values, rng):
    """A leaf around values `[2, 4, 6, 4]` with a stack of 2 and outputs along the middle axis."""
    if kind is Scaled:
        scale = jnp.asarray(rng.random((2, 16)) + 0.5, jnp.float16)
        return Scaled(values, scale, (4, 6, 4), (1,), "bfloat16")
    signs = jnp.asarray(rng.integers(0, 256, (2, 2)), jnp.uint8)
    return Rotated(values, signs, (4, 6, 4), (1,), "bfloat16")


def pairs():
    """Each kind around every other leaf; every kind around every leaf with --full."""
    for i, (inner, kind) in enumerate(itertools.product(INNER, (Scaled, Rotated))):
        once = i % 4 in (0, 3)
        yield pytest.param(kind, inner, marks=() if once else pytest.mark.full)


@pytest.mark.parametrize(("kind", "inner"), list(pairs()))
def test_leaves_undo_what_was_done_around_any_leaf(kind, inner, tmp_path):
    rng = np.random.default_rng(3)
    values = INNER[inner](jnp.asarray(normal(2, 4, 6, 4)), Axes(out=(2,), stack=1))
    leaf = around(kind, values, rng)
    assert leaf.check() == [] and (leaf.shape, leaf.dtype) == ((2, 4, 6, 4), jnp.bfloat16)
    want = []
    for i in range(2):
        v = np.asarray(jom.materialize(values), np.float64)[i].transpose(0, 2, 1).reshape(16, 6)
        if kind is Scaled:
            w = v * np.asarray(leaf.scale, np.float64)[i][:, None]
        else:
            flips = np.unpackbits(np.asarray(leaf.signs)[i], bitorder="little")
            w = matrix(16, flips).T @ v
        want.append(w.reshape(4, 4, 6).transpose(0, 2, 1))
    np.testing.assert_allclose(
        leaf.materialize().astype(jnp.float32), np.stack(want), rtol=4e-3, atol=1e-2
    )
    path = str(tmp_path / "a.jom")
    jom.save(path, {"w": leaf})
    again = jom.load(path)["w"]
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    assert leaf_bits(again) == leaf_bits(leaf)
    jom.verify(path)
    part = {"signs": 32} if kind is Rotated else {"scale": 2 * 16 * 16}
    [(name, bits)] = part.items()
    inside = 0 if inner == "dense" else values.bits_by_part().get(name, 0)
    assert leaf.bits_by_part()[name] - inside == bits


def test_a_mask_stands_outside_and_a_file_keeps_nothing_that_it_drops(tmp_path):
    w, axes = jnp.asarray(normal(64, 32)), Axes()
    keep = jnp.asarray(np.random.default_rng(0).random((64, 32)) < 0.2)
    kept = jnp.where(keep, w, 0)
    scale = jnp.full(64, 0.5, jnp.float16)
    sizes = []
    for values in (Int(bits=8)(kept, axes=axes).hidden(keep), kept):
        inner = Scaled(values, scale, (64, 32), (1,), "float32")
        leaf = Masked.of(keep, inner)
        assert leaf.check() == [] and not np.any(np.asarray(leaf.materialize())[~keep])
        path = str(tmp_path / "a.jom")
        sizes.append(jom.save(path, {"w": leaf}, dense="bfloat16"))
        again = jom.load(path)["w"]
        assert again.kind() == leaf.kind()
        tolerance = 0 if values is not kept else 4e-3
        np.testing.assert_allclose(again.materialize(), leaf.materialize(), rtol=tolerance)
        jom.verify(path)
    assert sizes[0] < 64 * 32 * 8 / 8 / 2 and sizes[1] < 64 * 32 * 2 / 2


def test_values_and_scales_are_trained():
    leaf = Scaled(jnp.ones((3, 2)), jnp.ones(3), (3, 2), (1,), "float32")
    trainable, rest = jom.partition({"w": leaf})
    loss = lambda t: jnp.sum(jom.materialize(jom.combine(t, rest))["w"] * jnp.arange(2.0)[None])  # noqa: E731
    slope = jax.grad(loss)(trainable)["w"]
    np.testing.assert_array_equal(slope.scale, [1, 1, 1])
    np.testing.assert_array_equal(slope.values, np.tile([0.0, 1.0], (3, 1)))
    leaf = Rotated(jnp.ones((4, 2)), jnp.zeros(1, jnp.uint8), (4, 2), (1,), "float32")
    trainable, rest = jom.partition({"w": leaf})
    slope = jax.grad(loss)(trainable)["w"]
    np.testing.assert_allclose(slope.values[:, 1], matrix(4, np.zeros(4)) @ np.ones(4), atol=1e-6)
    assert slope.signs is None


def test_parts_are_divided_as_the_tensor_where_that_can_be():
    leaf = Scaled(jnp.ones((1, 8, 4, 2)), jnp.ones((1, 16)), (8, 4, 2), (1,), "float32")
    both = leaf.specs(P(None, "x", "y"), (1, 4, 2, 2))
    assert (both.values, both.scale) == (P(None, "x", "y"), P(None, "x"))
    assert leaf.specs(P(None, None, "y"), (1, 8, 2, 2)).scale == P(None, None)
    assert leaf.specs(P(None, None, None, "x"), (1, 8, 4, 1)) is None
    turned = Rotated(leaf.values, jnp.zeros((1, 2), jnp.uint8), (8, 4, 2), (1,), "float32")
    assert turned.specs(P(None, None, "y"), (1, 8, 2, 2)).signs == P(None, None)
    assert turned.specs(P(None, "x"), (1, 4, 4, 2)) is None
    shard = jax.tree.map(lambda a: a[..., :2, :] if a.ndim == 4 else a, turned)
    part = shard.resized((1, 8, 2, 2)).materialize()
    np.testing.assert_array_equal(part, turned.materialize()[:, :, :2])


def test_what_is_wrong_with_a_leaf_is_said():
    leaf = around(Scaled, jnp.ones((2, 4, 6, 4)), np.random.default_rng(0))
    wrong = [
        Scaled(leaf.values[..., :2], leaf.scale, leaf.core, leaf.out, leaf.dtype_name),
        Scaled(leaf.values, leaf.scale[:, 1:], leaf.core, leaf.out, leaf.dtype_name),
        Scaled(leaf.values, leaf.scale.astype(int), leaf.core, leaf.out, leaf.dtype_name),
        Scaled(leaf.values, leaf.scale * jnp.inf, leaf.core, leaf.out, leaf.dtype_name),
    ]
    said = ["values have shape", "for 16 inputs", "scale is int32", "NaN or Inf"]
    bits = jnp.full((2, 2), 255, jnp.uint8)
    values = jnp.ones((2, 4, 6, 3))
    wrong += [
        Rotated(leaf.values[:, :3], bits, leaf.core, leaf.out, "float32"),
        Rotated(leaf.values, bits[:, :1], leaf.core, leaf.out, "float32"),
        Rotated(values, bits, (4, 6, 3), (1,), "float32"),
    ]
    said += ["values have shape", "not bits of 16 inputs", "bits set beyond"]
    for bad, words in zip(wrong, said, strict=True):
        assert words in " ".join(bad.check())


def test_what_is_rotated_may_be_pruned():
    encoder = Hadamard(chain(prune.Magnitude(sparsity=0.5), NF4(group=8)))
    small = encoder(jnp.asarray(normal(24, 8)), key=KEY)
    assert small.kind() == "Rotated(Masked(Tabulated))" and small.check() == []


@pytest.mark.parametrize("rows", [64, pytest.param(96, marks=pytest.mark.full), 576])
def test_outliers_cost_less_when_they_are_spread(rows):
    w = normal(rows, 32)
    w[np.random.default_rng(1).choice(rows, rows // 32, replace=False)] *= 30
    w = jnp.asarray(w)
    error = lambda q: float(jnp.mean((q.materialize() - w) ** 2))  # noqa: E731
    fmt = Int(bits=4)
    small = Hadamard(fmt)(w, key=KEY)
    assert error(small) < error(fmt(w)) / 2
    # A rotation changes no squared error: it is that of what is kept.
    flips = np.unpackbits(np.asarray(small.signs), count=rows, bitorder="little")
    kept = np.asarray(small.values.materialize(), np.float64)
    turned = matrix(rows, flips) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(error(small), np.mean((kept - turned) ** 2), rtol=1e-4)


def test_statistics_are_those_of_rotated_inputs():
    w, x = jnp.asarray(normal(24, 8)), normal(50, 24, seed=1) * np.linspace(0.1, 3, 24)
    x = x.astype(np.float32)
    fn, params = lambda p, x: x @ p["w"], {"w": w}
    weighted = Hadamard(Int(bits=3, observer=MSE(weighted=True)))
    recipe = [Rule("w", weighted)]
    assert weighted.needs == ("gram",)
    stats = jom.calibrate(fn, params, [(x,)], recipe)
    small = jom.compress(params, recipe, stats=stats, key=KEY)["w"]
    flips = np.unpackbits(np.asarray(small.signs), count=24, bitorder="little")
    r = matrix(24, flips)
    turned = jnp.asarray(r @ np.asarray(w, np.float64), jnp.float32)
    seen = jom.calibrate(fn, {"w": turned}, [((x @ r.T).astype(np.float32),)], ["l2"])
    want = Int(bits=3, observer=MSE(weighted=True))(turned, stats=seen["w"], axes=Axes())
    np.testing.assert_allclose(small.values.materialize(), want.materialize(), atol=1e-5)


def test_a_solver_may_round_what_is_rotated():
    w = normal(64, 32)
    w[5] *= 20
    x = normal(256, 64, seed=1) @ normal(64, 64, seed=2)
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}
    errors = {}
    for encoder in (Int(bits=3), GPTQ(Int(bits=3)), Hadamard(GPTQ(Int(bits=3)))):
        recipe = [Rule("w", encoder)]
        stats = jom.calibrate(fn, params, [(x,)], ["gram"])
        small = jom.compress(params, recipe, stats=stats, key=KEY)
        miss = x @ (np.asarray(small["w"].materialize(), np.float64) - w)
        errors[type(encoder)] = np.mean(miss**2)
    assert errors[Hadamard] < errors[GPTQ] / 2 < errors[Int] / 2


def test_what_cannot_be_rotated_says_why():
    w = jnp.asarray(normal(24, 8))
    with pytest.raises(ValueError, match="zeros would not survive a rotation"):
        Hadamard(Int(bits=4))(w, keep=w > 0, key=KEY)
    with pytest.raises(ValueError, match="zeros would not survive a rotation"):
        chain(prune.Magnitude(sparsity=0.5), Hadamard(Int(bits=4)))(w, key=KEY)
    with pytest.raises(ValueError, match=r"draws signs; give key"):
        Hadamard(Int(bits=4))(w)
    with pytest.raises(ValueError, match=r"divides 27 inputs .* an odd number"):
        Hadamard(Int(bits=4))(jnp.ones((3, 3, 3, 8)), key=KEY)
    with pytest.raises(TypeError, match="fmt=4 is no encoder"):
        Hadamard(4)
    with pytest.raises(ValueError, match=r"needs \['minmax'\] of the rotated inputs"):
        Hadamard(chain(Int(bits=4), Input(bits=8, per="static")))
    solver = Hadamard(GPTQ(Int(bits=4)))
    with pytest.raises(ValueError, match="needs statistics; calibrate"):
        solver(w, key=KEY)
    broken = jom.Stats({"gram": jnp.full((24, 24), jnp.nan)}, Axes(out=(1,)))
    with pytest.raises(ValueError, match="Hadamard: the gram of the inputs holds NaN"):
        solver(w, stats=broken, key=KEY)


def test_a_rotated_leaf_is_encoded_anew_and_takes_a_grid_of_inputs():
    w = jnp.asarray(normal(24, 8))
    small = chain(Hadamard(Int(bits=4)), Input(bits=8))(w, key=KEY)
    assert small.kind() == "WithInput(Rotated(Quantized))"
    assert Int(bits=8)(small.values).kind() == "Quantized"
    with pytest.raises(ValueError, match="lose its codes"):
        prune.Magnitude(sparsity=0.5)(small.values)


@pytest.mark.parametrize("kind", [Scaled, Rotated])
def test_a_file_with_parts_that_do_not_fit_is_refused(kind, tmp_path):
    leaf = around(kind, jnp.ones((2, 4, 6, 4)), np.random.default_rng(0))
    path = str(tmp_path / "a.jom")
    jom.save(path, {"w": leaf})
    with Reader(path) as reader:
        [good] = [s.description for s in reader.sections if s.description]
    assert check(good, BUILT_IN).kind == kind.__name__
    for change in (
        lambda name, statics, parts: [name, [[4, 6], *statics[1:]], parts],
        lambda name, statics, parts: [name, [statics[0], [3], statics[2]], parts],
        lambda name, statics, parts: [name, [statics[0], [1, 1], statics[2]], parts],
        lambda name, statics, parts: [name, [*statics[:2], "int8"], parts],
        lambda name, statics, parts: [name, statics, [parts[0], None]],
        lambda name, statics, parts: [name, statics, [parts[0], parts[0]]],
        lambda name, statics, parts: [name, statics, [parts[1], parts[1]]],
    ):
        with pytest.raises(ArtifactError):
            check(change(*good), BUILT_IN)
