"""Models with state, in linen and nnx, and helpers to compare what they hold."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

X = jnp.arange(12.0).reshape(4, 3) / 7 - 0.5


class Linen(nn.Module):
    """Dense, BatchNorm and Dropout, with a second method."""

    rate: float = 0.0

    def setup(self):
        self.dense = nn.Dense(5)
        self.norm = nn.BatchNorm(momentum=0.5)
        self.drop = nn.Dropout(self.rate)

    def __call__(self, x, train=False):
        h = self.norm(self.dense(x), use_running_average=not train)
        return self.drop(h, deterministic=not train)

    def embed(self, x):
        return self.dense(x)


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, *, rngs, rate=0.0):
        self.dense = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, train=False):
        h = self.norm(self.dense(x), use_running_average=not train)
        return self.drop(h, deterministic=not train)

    def embed(self, x):
        return self.dense(x)


def copied(tree):
    return jax.tree.map(
        lambda a: np.array(
            jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        ),
        tree,
    )


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def linen_case(rate=0.0):
    module = Linen(rate)
    variables = module.init(jax.random.key(0), X)
    return (module, variables), lambda x, **k: module.apply(variables, x, **k), variables
