"""Tiny networks in all three forms, and batches for them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxopt_models as jom

CLASSES = 3


def plain(sizes, seed=0):
    """A plain function and its dict of parameters."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    params = {
        f"layer{i}": {"kernel": jax.random.normal(k, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }
    return forward, params


def forward(params, x):
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        with jax.named_scope(f"layer{i}"):
            x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


class Linen(nn.Module):
    """Two dense layers, batch normalization between them."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, name="layer0")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(CLASSES, name="layer1")(jnp.tanh(x))


class Nnx(nnx.Module):
    """The same without normalization."""

    def __init__(self, rngs):
        self.layer0 = nnx.Linear(6, 5, rngs=rngs)
        self.layer1 = nnx.Linear(5, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.layer1(jnp.tanh(self.layer0(x)))


def student(form):
    """A function and its parameters in one of the three forms."""
    if form == "plain":
        return plain((6, 5, CLASSES), seed=1)
    if form == "linen":
        model = Linen()
        return jom.functional((model, model.init(jax.random.key(1), jnp.zeros((1, 6)))))
    return jom.functional(Nnx(nnx.Rngs(1)))


def batch(step=0, size=8):
    """Inputs and labels of a step."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(size, 6)).astype(np.float32)
    return x, rng.integers(0, CLASSES, size)


def same(a, b):
    """Says whether two trees hold the same bits."""
    a, b = ([_bits(x) for x in jax.tree.leaves(t)] for t in (a, b))
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def near(a, b, atol=1e-6):
    """Raises unless two trees hold nearly the same numbers."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def _bits(x):
    key = jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)
    return jax.random.key_data(x) if key else x
