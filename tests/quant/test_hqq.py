import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxopt_models as jom
from jaxopt_models import Rule, chain, prune
from jaxopt_models.quant import GPTQ, HQQ, MSE, Int
from jaxopt_models.testing import leaf_bits

FEW = settings(max_examples=40, deadline=None)
NUMBERS = hnp.arrays(
    np.float32, (16, 4), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)


def full(bits):
    """A width that other tests have, too."""
    return pytest.param(bits, marks=pytest.mark.full)


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_t(4, size=shape).astype(np.float32)


def objective(w, small, power=0.7, group=None):
    """The sum of powers of errors of each column, or of each run of it, float64."""
    miss = np.abs(np.asarray(w, np.float64) - np.asarray(small.materialize(), np.float64))
    group = group or len(w)
    return (miss**power).reshape(len(w) // group, group, -1).sum(1)


def half_quadratic(w, bits, power=0.7, beta=10.0, kappa=1.01, steps=20):
    """The method as published, of one group, in steps of the grid; the best zero point."""
    top = 2**bits - 1
    low, high = min(w.min(), 0), max(w.max(), 0)
    step = (high - low) / top
    u, zero = w / step, float(np.round(-low / step))
    found = []
    for _ in range(steps + 1):
        q = np.clip(np.round(u + zero), 0, top)
        r = u - (q - zero)
        found.append(np.sum(np.abs(r * step) ** power))
        with np.errstate(divide="ignore"):
            e = np.sign(r) * np.maximum(np.abs(r) - np.abs(r) ** (power - 1) / beta, 0)
        zero = float(np.float16(np.clip(np.mean(q - (u - e)), 0, top)))
        beta *= kappa
    return min(found)


@pytest.mark.parametrize("bits", [2, full(3), 4])
def test_each_group_is_as_near_as_the_method_gets_it(bits):
    w = weights(128, 16)
    got = objective(w, HQQ(bits=bits, group=32)(w), group=32)
    want = [
        [half_quadratic(np.float64(w[32 * g : 32 * g + 32, c]), bits) for c in range(16)]
        for g in range(4)
    ]
    # A tie that float32 rounds another way leads to another zero point, not much worse.
    np.testing.assert_allclose(got.mean(), np.mean(want), rtol=1e-3)
    near = np.isclose(got, want, rtol=1e-3)
    assert near.mean() > 0.9


@pytest.mark.parametrize("bits", [full(2), 3, full(4)])
@FEW
@given(w=NUMBERS)
def test_the_objective_is_never_above_that_of_the_nearest(bits, w):
    small, nearest = HQQ(bits=bits)(w), Int(bits=bits, symmetric=False)(w)
    assert small.check() == [] and small.zero_point.dtype == jnp.float16
    ours, theirs = objective(w, small), objective(w, nearest)
    # Where all errors are roundings of float32 none is nearer than another.
    least = len(w) * (np.abs(w).max(0) * 1e-6) ** 0.7
    assert np.all(ours <= theirs * (1 + 1e-5) + least)


@pytest.mark.parametrize("bits", [2, full(3), full(4)])
def test_a_real_zero_point_lowers_the_objective(bits):
    w = weights(512, 32, seed=2)
    ratio = objective(w, HQQ(bits=bits, group=64)(w)).sum()
    ratio /= objective(w, Int(bits=bits, symmetric=False, group=64)(w)).sum()
    assert 0.9 < ratio < 0.98


def test_the_solver_is_the_same_for_weights_of_any_size():
    w = weights(64, 8)
    a, b = HQQ(bits=3)(w), HQQ(bits=3)(w * 2**-10)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)
    np.testing.assert_array_equal(a.integers(), b.integers())


def test_weights_that_fit_the_grid_stay():
    w = (np.arange(8.0, dtype=np.float32) - 3)[:, None]
    np.testing.assert_array_equal(HQQ(bits=3)(w).materialize(), w)
    np.testing.assert_array_equal(HQQ(bits=3)(0 * w).materialize(), 0 * w)


def test_pruned_entries_have_no_say_and_stay_zero():
    w = weights(64, 8)
    keep = np.random.default_rng(0).random(w.shape) < 0.5
    small = HQQ(bits=3)(w, keep=jnp.asarray(keep))
    assert small.kind() == "Masked(Quantized)"
    got = np.asarray(small.materialize())
    assert not np.any(got[~keep])
    nearest = np.asarray(Int(bits=3, symmetric=False)(w * keep).materialize())
    miss = [np.sum((np.abs(a - w) ** 0.7)[keep]) for a in (got, nearest)]
    assert miss[0] < 0.98 * miss[1]


def test_it_is_a_format_for_solvers_and_a_file_gives_back_every_bit(tmp_path):
    w, x = weights(64, 16), weights(256, 64, seed=1) @ weights(64, 64, seed=2)
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}
    stats = jom.calibrate(fn, params, [(x,)], ["gram"])
    errors = []
    for encoder in (HQQ(bits=3, group=16), GPTQ(HQQ(bits=3, group=16))):
        small = jom.compress(params, [Rule("w", encoder)], stats=stats)
        errors.append(np.sum((x @ (np.asarray(small["w"].materialize()) - w)) ** 2))
    assert errors[1] < errors[0] / 1.5
    small = jom.compress(params, [Rule("w", chain(prune.Magnitude(sparsity=0.5), HQQ(bits=4)))])
    path = str(tmp_path / "a.jom")
    jom.save(path, small)
    assert leaf_bits(jom.load(path)) == leaf_bits(small)
    jom.verify(path)


def test_blocks_and_observers_are_those_of_integers():
    w = weights(32, 8)
    small = HQQ(bits=4, group=8, block=4, scale="bfloat16", observer=MSE())(w)
    assert small.scale.shape == small.zero_point.shape == (2, 4)
    assert small.scale.dtype == jnp.bfloat16 and small.check() == []
    nearest = Int(bits=4, symmetric=False, group=8, block=4, scale="bfloat16", observer=MSE())(w)
    assert objective(w, small).sum() < objective(w, nearest).sum()


def test_compiled_once_it_runs_on_a_stack():
    w = weights(3, 32, 8)
    encode = jax.jit(lambda w: HQQ(bits=3)(w, axes=jom.Axes(stack=1)))
    small = encode(w)
    for i in range(3):
        alone = HQQ(bits=3)(w[i])
        np.testing.assert_array_equal(alone.zero_point, small.zero_point[i])


def test_errors_say_what_to_do():
    for options, words in [
        ({"symmetric": True}, "leaves no zero point"),
        ({"power": 0.0}, r"power=0.0 is not in \(0, 1\]"),
        ({"power": 2}, "power=2.0 is not"),
        ({"beta": 0}, "beta=0.0 must be positive"),
        ({"kappa": 0.5}, "kappa=0.5 at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            HQQ(bits=4, **options)
    with pytest.raises(TypeError, match="HQQ: power='a' is no number"):
        HQQ(bits=4, power="a")
    with pytest.raises(ValueError, match="bits=9 is not a width"):
        HQQ(bits=9)
