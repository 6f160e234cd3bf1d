import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import Rule, chain, codebook, prune, quant
from jaxopt_models.testing import leaf_bits

INT8 = quant.Int(bits=8)
HALF = prune.Magnitude(sparsity=0.5)
W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)


def test_donate_deletes_what_was_encoded_and_nothing_else():
    params = {"a": W + 1, "b": W + 2, "kept": W + 3, "n": jnp.arange(3), "host": np.ones((4, 4))}
    other = params["b"] + 0
    want = jom.compress(params, [Rule("[ab]|host", INT8)])
    small = jom.compress(params, [Rule("[ab]|host", INT8)], donate=True)
    assert params["a"].is_deleted()
    assert params["b"].is_deleted()
    assert not params["kept"].is_deleted()
    assert small["kept"] is params["kept"]
    assert not params["n"].is_deleted()
    assert not other.is_deleted()
    assert leaf_bits(small) == leaf_bits(want)
    assert W.sum() == W.sum()


@pytest.mark.parametrize(
    "encoder",
    [prune.Magnitude(sparsity=0.0), HALF, INT8, codebook.KMeans(bits=2), chain(HALF, INT8)],
)
def test_donate_leaves_a_whole_result(encoder):
    w = W + 0
    want = encoder(w).materialize()
    small = jom.compress({"w": w}, [Rule(".*", encoder)], donate=True)
    assert w.is_deleted()
    np.testing.assert_array_equal(jom.materialize(small)["w"], want)


def test_tied_weights_are_encoded_alike_and_may_be_donated():
    tied = W + 0
    want = leaf_bits(INT8(tied))
    small = jom.compress({"a": tied, "b": tied, "c": tied}, [Rule("[ab]", INT8)])
    assert leaf_bits(small["a"]) == leaf_bits(small["b"]) == want
    assert small["c"] is tied
    small = jom.compress({"a": tied, "b": tied}, [Rule(".*", INT8)], donate=True)
    assert leaf_bits(small["a"]) == leaf_bits(small["b"]) == want


def test_donate_keeps_an_array_that_is_also_kept_dense():
    tied = W + 0
    small = jom.compress({"a": tied, "z": tied}, [Rule("a", INT8)], donate=True)
    np.testing.assert_array_equal(small["z"], W)


@jom.leaf
class Kept(jom.Encoded):
    """A stranger's leaf that holds the dense array itself."""

    data: jax.Array
    core: tuple[int, ...] = jom.static()

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def stack(self):
        return self.data.shape[: self.data.ndim - len(self.core)]

    def rebuild(self):
        return self.data


@dataclasses.dataclass(frozen=True)
class Identity(jom.Encoder):
    """Hands the array on, compiled or not."""

    compiled: bool = True

    def encode(self, w, *, axes, keep, stats, key):
        return Kept(w, tuple(w.shape))

    def run(self, w, axes, keep, stats, key):
        if self.compiled:
            return super().run(w, axes, keep, stats, key)
        return self.encode(w, axes=axes, keep=keep, stats=stats, key=key)


@pytest.mark.parametrize("compiled", [True, False])
def test_donate_keeps_an_array_that_a_leaf_holds(compiled):
    w = W + 0
    small = jom.compress({"w": w}, [Rule("w", Identity(compiled))], donate=True)
    np.testing.assert_array_equal(jom.materialize(small)["w"], W)
