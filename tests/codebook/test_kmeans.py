import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxopt_models import Axes, chain, prune
from jaxopt_models.codebook import KMeans
from jaxopt_models.codebook._lloyd import Sorted, _start, assign, ordered_sum
from jaxopt_models.testing import bits, leaf_bits

FEW = settings(max_examples=25, deadline=None)
FLOATS = st.floats(-1000, 1000, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0])
TENSORS = hnp.arrays(np.float32, (12, 8), elements=FLOATS)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def starts(w, k, start):
    """The first centroids of ``start``, by the library, in float64."""
    x = jnp.sort(jnp.ravel(w))
    values = Sorted(x, jnp.asarray(x.size, jnp.int32))
    return np.asarray(_start(values, None, k=k, start=start), np.float64)


def reference(w, k, start):
    """Loss of Lloyd's algorithm in float64 from the same start: scikit-learn's, or a loop."""
    x = np.asarray(w, np.float64).ravel()
    c = starts(w, k, start)
    if start == "density" and importlib.util.find_spec("sklearn"):
        from sklearn.cluster import KMeans as Peer

        peer = Peer(k, init=c[:, None], n_init=1, max_iter=1000, tol=0, algorithm="lloyd")
        c = np.sort(peer.fit(x[:, None]).cluster_centers_.ravel())
    else:
        for _ in range(1000):
            codes = np.abs(x[:, None] - c).argmin(1)
            new = np.array([x[codes == i].mean() if (codes == i).any() else c[i] for i in range(k)])
            if np.array_equal(new, c):
                break
            c = new
    return (np.abs(x[:, None] - c).min(1) ** 2).sum()


def loss(w, small):
    gap = np.asarray(w, np.float64) - np.asarray(small.materialize(), np.float64)
    return (gap**2).sum()


@pytest.mark.parametrize(
    ("width", "shape", "start"),
    [
        (3, (30, 7), "density"),
        (5, (64, 40), "linear"),
    ],
)
def test_the_loss_is_that_of_lloyd(width, shape, start):
    for seed in range(3):
        w = normal(*shape, seed=seed)
        got = loss(w, KMeans(bits=width, start=start)(w))
        assert got <= 1.001 * reference(w, 2**width, start)


@pytest.mark.parametrize("encoder", [KMeans(bits=1), KMeans(bits=3), KMeans(bits=2, per="channel")])
@FEW
@given(w=TENSORS)
def test_every_weight_has_its_nearest_centroid(encoder, w):
    small = encoder(jnp.asarray(w))
    tables = np.asarray(small.codebook, np.float64).reshape(-1, 2**encoder.bits)
    assert (np.diff(tables, axis=1) >= 0).all()
    for j in range(w.shape[1]):
        x, table = w[:, j].astype(np.float64), tables[j if len(tables) > 1 else 0]
        value = np.asarray(small.materialize()[:, j], np.float64)
        near = np.abs(x[:, None] - table).min(1)
        assert (np.abs(x - value) <= near * (1 + 1e-5) + 1e-4).all()


@pytest.mark.parametrize("encoder", [KMeans(bits=2), KMeans(bits=3, start="density")])
@FEW
@given(w=TENSORS)
def test_encoding_again_changes_no_bit(encoder, w):
    once = encoder(jnp.asarray(w)).materialize()
    assert bits(encoder(once).materialize()) == bits(once)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_centroids_are_values_of_the_type(dtype):
    w = normal(40, 9).astype(dtype)
    small = KMeans(bits=4)(w)
    assert small.codebook.dtype == jnp.float32
    np.testing.assert_array_equal(small.codebook.astype(dtype).astype(jnp.float32), small.codebook)
    assert bits(KMeans(bits=4)(small.materialize()).materialize()) == bits(small.materialize())


def test_few_values_are_their_own_centroids():
    w = jnp.array([[0.3, -7.0, 1e-30], [0.3, 5.5, 1e-30], [-7.0, 0.3, 5.5]])
    small = KMeans(bits=3)(w)
    np.testing.assert_array_equal(small.materialize(), w)
    assert small.codebook.shape == (8,)
    equal = jnp.full((3, 3), 0.7)
    np.testing.assert_array_equal(KMeans(bits=3)(equal).materialize(), equal)
    zeros = equal.at[0].set(-0.0) * 0
    assert bits(KMeans(bits=3)(zeros).materialize()) == bits(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(KMeans(bits=2)(jnp.array(0.7)).materialize(), np.float32(0.7))


def test_when_everything_is_dropped():
    w = normal(6, 4)
    for encoder in (KMeans(bits=2), KMeans(bits=2, per="channel")):
        small = encoder(w, keep=jnp.zeros(w.shape, bool))
        assert not bool(jnp.any(small.materialize()))
        assert bool(jnp.isfinite(small.values.codebook).all())
        one = encoder(w, keep=jnp.zeros(w.shape, bool).at[2, 1].set(True))
        np.testing.assert_array_equal(one.materialize(), jnp.zeros_like(w).at[2, 1].set(w[2, 1]))


def test_only_kept_weights_are_clustered():
    w = normal(20, 10)
    masked = prune.Magnitude(sparsity=0.7)(w)
    small = KMeans(bits=3)(masked)
    kept = w[masked.keep()]
    alone = KMeans(bits=3)(kept)
    assert bits(small.values.codebook) == bits(alone.codebook)
    assert bits(small.materialize()[masked.keep()]) == bits(alone.materialize())


def test_a_cluster_of_outliers_is_precise():
    rng = np.random.default_rng(0)
    w = np.concatenate([rng.normal(size=50_000) * 1e-2, [1000.25, 1000.75, -512.5]])
    w = jnp.asarray(rng.permutation(w), jnp.float32)
    table = np.asarray(KMeans(bits=4)(w).codebook)
    assert table[0] == -512.5
    assert table[-1] == 1000.5


def test_large_and_small_weights():
    huge = jnp.array([3e38, -3e38, 1e38, -1e38, 2e38])
    assert bool(jnp.isfinite(KMeans(bits=1)(huge).materialize()).all())
    np.testing.assert_array_equal(KMeans(bits=3)(huge).materialize(), huge)


def test_channels_are_clustered_apart():
    w = normal(16, 5)
    small = KMeans(bits=2, per="channel")(w)
    assert small.codebook.shape == (5, 4)
    for j in range(5):
        alone = KMeans(bits=2)(w[:, j])
        assert bits(small.codebook[j]) == bits(alone.codebook)
        assert bits(small.materialize()[:, j]) == bits(alone.materialize())
    conv = normal(3, 3, 2, 4)
    small = KMeans(bits=2, per="channel")(conv, axes=Axes(out=(2, 3)))
    assert small.codebook.shape == (2, 4, 4)
    alone = KMeans(bits=2)(conv[:, :, 1, 2])
    assert bits(small.materialize()[:, :, 1, 2]) == bits(alone.materialize())


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (KMeans(bits=3), (5, 7)),
        (KMeans(bits=5, start="density"), (300, 100)),
        (chain(prune.Magnitude(sparsity=0.5), KMeans(bits=3)), (16, 8)),
    ],
)
def test_numpy_jit_vmap_and_stacks_give_the_same_bits(encoder, shape):
    w = normal(*shape)
    want = leaf_bits(encoder(w))  # sorted by NumPy
    assert leaf_bits(jax.jit(lambda w: encoder(w))(w)) == want  # sorted by XLA
    stack = jnp.stack([w, 3 * w])
    got = encoder(stack, axes=Axes(stack=1))  # by vmap
    assert leaf_bits(jax.tree.map(lambda x: x[0], got)) == want


def test_random_starts_follow_the_key():
    w = normal(40, 9)
    encoder = KMeans(bits=4, start="random", iterations=1)
    one, same, other = (encoder(w, key=jax.random.key(i)).codebook for i in (0, 0, 1))
    assert bits(one) == bits(same)
    assert bits(one) != bits(other)
    assert bits(jax.jit(lambda w, k: encoder(w, key=k))(w, jax.random.key(0)).codebook) == bits(one)
    with pytest.raises(ValueError, match="give key="):
        encoder(w)


def test_more_iterations_never_lose():
    w = normal(64, 40)
    losses = [loss(w, KMeans(bits=4, iterations=i)(w)) for i in (1, 5, 300)]
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_assignment_takes_the_lower_on_a_tie():
    table = jnp.array([-1.0, 0.0, 2.0])
    x = jnp.array([-9.0, -0.5, -0.499, 1.0, 1.001, 9.0])
    np.testing.assert_array_equal(assign(x, table), [0, 0, 1, 1, 2, 2])
    many = jnp.arange(40.0)
    np.testing.assert_array_equal(assign(many + 0.5, many), [*range(39), 39])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65])
def test_ordered_sums(n):
    x = normal(3, n)
    np.testing.assert_allclose(
        ordered_sum(x), np.asarray(x, np.float64).sum(1), rtol=1e-5, atol=1e-6
    )


def test_wrong_options_raise():
    for make, why in [
        (lambda: KMeans(bits=0), "not a width of 1 to 8"),
        (lambda: KMeans(bits=9), "not a width of 1 to 8"),
        (lambda: KMeans(bits=4, per="row"), "neither 'leaf' nor 'channel'"),
        (lambda: KMeans(bits=4, start="kmeans++"), "not linear, density or random"),
        (lambda: KMeans(bits=4, iterations=0), "not positive"),
    ]:
        with pytest.raises(ValueError, match=why):
            make()
