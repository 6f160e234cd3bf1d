import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxopt_models import Axes, prune
from jaxopt_models.prune import Block, Magnitude, NofM
from jaxopt_models.prune._select import keep_largest

# Few distinct values make ties; zeros of both signs and denormals make trouble.
TIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-40, -1e-40, 3e38, -3e38])
FLOATS = TIES | st.floats(-(2.0**100), 2.0**100, width=32)
SHAPE = (6, 8)
TENSORS = hnp.arrays(np.float32, SHAPE, elements=FLOATS)
MASKS = hnp.arrays(bool, SHAPE)
FEW = settings(max_examples=25, deadline=None)


def oracle(w, count):
    """Marks the ``count`` largest magnitudes, the lower index first among equals."""
    flat = np.abs(np.asarray(w, np.float64)).ravel()
    marks = np.zeros(flat.size, bool)
    marks[np.lexsort((np.arange(flat.size), -flat))[:count]] = True
    return marks.reshape(np.shape(w))


select = jax.jit(lambda w, count, keep: keep_largest([jnp.abs(w)], count, keep=[keep])[0])


def kept(n, sparsity):
    return n - int(sparsity * n + 0.5)


@FEW
@given(w=TENSORS, count=st.integers(0, 48))
def test_selection_is_the_sort_of_numpy(w, count):
    marks = np.asarray(select(w, count, np.ones(SHAPE, bool)))
    np.testing.assert_array_equal(marks, oracle(w, count))


@FEW
@given(w=TENSORS, keep=MASKS, data=st.data())
def test_selection_among_candidates(w, keep, data):
    count = data.draw(st.integers(0, int(keep.sum())))
    marks = np.asarray(select(w, count, keep))
    assert marks.sum() == count
    assert not np.any(marks & ~keep)
    flat = np.where(keep, np.abs(w.astype(np.float64)), -1).ravel()
    order = np.lexsort((np.arange(flat.size), -flat))[:count]
    want = np.zeros(flat.size, bool)
    want[order] = True
    np.testing.assert_array_equal(marks, want.reshape(SHAPE))


def test_selection_over_several_arrays():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4, size=s).astype(np.float32) for s in [(3, 4), (5,), (2, 2, 2)]]
    whole = np.concatenate([a.ravel() for a in arrays])
    run = jax.jit(lambda arrays, count: keep_largest(arrays, count, keep=[None] * 3))
    for count in range(whole.size + 1):
        marks = run(arrays, count)
        got = np.concatenate([np.asarray(m).ravel() for m in marks])
        np.testing.assert_array_equal(got, oracle(whole, count))


@FEW
@given(w=TENSORS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.92, 0.999])
def test_magnitude_keeps_exactly_the_largest(sparsity, w):
    small = Magnitude(sparsity=sparsity)(jnp.asarray(w))
    marks = np.asarray(small.keep())
    np.testing.assert_array_equal(marks, oracle(w, kept(w.size, sparsity)))
    np.testing.assert_array_equal(np.asarray(small.materialize()), np.where(marks, w, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_narrow_types(dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(24, 16)), dtype)
    small = Magnitude(sparsity=0.7)(w)
    np.testing.assert_array_equal(small.keep(), oracle(np.asarray(w, np.float64), kept(384, 0.7)))
    assert small.values.dtype == dtype


def test_denormals_of_half_precision_are_told_apart():
    w = jnp.array([1, 3, 2, 0, 5, 4, 6, 7], jnp.float16) * jnp.float16(6e-8)
    np.testing.assert_array_equal(Magnitude(sparsity=0.5)(w).keep(), [False] * 4 + [True] * 4)


@pytest.mark.parametrize("n", [1, 2, 7, 25])
def test_counts_round_to_the_nearest(n):
    w = jnp.asarray(np.random.default_rng(n).normal(size=n), jnp.float32)
    for sparsity in (0.0, 0.5, 0.9):
        assert int(Magnitude(sparsity=sparsity)(w).keep().sum()) == kept(n, sparsity)


@FEW
@given(w=TENSORS, keep=MASKS)
def test_a_mask_only_shrinks(w, keep):
    marks = np.asarray(Magnitude(sparsity=0.5)(jnp.asarray(w), keep=jnp.asarray(keep)).keep())
    assert not np.any(marks & ~keep)
    assert marks.sum() == min(kept(48, 0.5), keep.sum())


def blocks_oracle(w, rows, columns, sparsity):
    tiles = np.abs(w.astype(np.float64)).reshape(w.shape[0] // rows, rows, -1, columns)
    marks = oracle(tiles.sum((1, 3)), kept(tiles.shape[0] * tiles.shape[2], sparsity))
    return np.repeat(np.repeat(marks, rows, 0), columns, 1)


@FEW
@given(w=hnp.arrays(np.float32, (8, 12), elements=st.integers(-9, 9).map(float)))
@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (2, 3), (8, 12), (1, 1)])
def test_blocks_against_numpy(rows, columns, w):
    small = Magnitude(sparsity=0.6, structure=Block(rows, columns))(jnp.asarray(w))
    np.testing.assert_array_equal(small.keep(), blocks_oracle(w, rows, columns, 0.6))


def n_of_m_oracle(w, n, m):
    marks = np.zeros(w.shape, bool)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], m):
            marks[start : start + m, column] = oracle(w[start : start + m, column], n)
    return marks


@FEW
@given(w=hnp.arrays(np.float32, (8, 5), elements=FLOATS))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_n_of_m_against_numpy(n, m, w):
    small = Magnitude(structure=NofM(n, m))(jnp.asarray(w))
    marks = np.asarray(small.keep())
    # Magnitudes below the smallest normal number count as zero where XLA flushes them.
    flushed = np.where(np.abs(w) < np.finfo(np.float32).tiny, 0, w)
    assert (marks.reshape(8 // m, m, 5).sum(1) == n).all()
    assert any((marks == n_of_m_oracle(x, n, m)).all() for x in (w, flushed))


def test_n_of_m_runs_along_the_inputs_of_a_convolution():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 6)), jnp.float32)
    marks = np.asarray(Magnitude(structure=NofM(2, 4))(w).keep())
    assert (marks.sum(2) == 2).all()
    other = np.asarray(Magnitude(structure=NofM(2, 6))(w, axes=Axes(out=(0, 1, 2))).keep())
    assert (other.sum(3) == 2).all()


def test_n_of_m_under_a_mask():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    keep = jnp.asarray(np.random.default_rng(1).random((8, 4)) < 0.4)
    marks = np.asarray(Magnitude(structure=NofM(2, 4))(w, keep=keep).keep())
    want = np.minimum(np.asarray(keep).reshape(2, 4, 4).sum(1), 2)
    np.testing.assert_array_equal(marks.reshape(2, 4, 4).sum(1), want)
    assert not np.any(marks & ~np.asarray(keep))


def test_across_a_stack_is_global():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), jnp.float32)
    w = w * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    small = Magnitude(sparsity=0.5, across_stack=True)(w, axes=Axes(stack=1))
    assert small.stack == (3,)
    np.testing.assert_array_equal(small.keep(), oracle(w, 72))
    each = Magnitude(sparsity=0.5)(w, axes=Axes(stack=1))
    assert (each.keep().sum((1, 2)) == 24).all()
    with pytest.raises(ValueError, match="across_stack ranks single entries"):
        Magnitude(sparsity=0.5, structure=Block(2), across_stack=True)(w, axes=Axes(stack=1))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Magnitude(sparsity=1.0), "not in"),
        (lambda: Magnitude(sparsity=-0.1), "not in"),
        (lambda: Magnitude(sparsity=float("nan")), "not in"),
        (lambda: Magnitude(sparsity=0.5, structure=NofM(2, 4)), "fixes the sparsity"),
        (lambda: Magnitude(sparsity=0.5, structure=(2, 4)), "use Block or NofM"),
        (lambda: NofM(4, 4), "n lies between"),
        (lambda: NofM(0, 4), "n lies between"),
        (lambda: Block(0, 1), "Block: rows=0 must be at least 1"),
        (lambda: Magnitude(structure=NofM(2, 4))(jnp.ones((6, 4))), r"runs that do: \[2, 3, 6\]"),
        (
            lambda: Magnitude(sparsity=0.5, structure=Block(4))(jnp.ones((6, 4))),
            "do not divide the 6",
        ),
        (lambda: Magnitude(sparsity=0.5, structure=Block(2, 3))(jnp.ones((6, 4))), "the 4 outputs"),
    ],
)
def test_wrong_options_raise(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_the_name_space():
    assert {"Magnitude", "Block", "NofM", "allocate_global", "gradual", "rigl"} <= set(dir(prune))
