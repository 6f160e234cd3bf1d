"""A small classifier on a dict of arrays, its data, and the formats that are compared."""

import jax.numpy as jnp
import numpy as np

from jaxopt_models import quant

FORMATS = [quant.Int(bits=2), quant.Int(bits=4, group=4), quant.NF4(group=4), None]
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 4, size=16), jnp.int32)
BATCHES = [(X[:12], Y[:12]), (X[12:], Y[12:])]


def plain(params, x):
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def weights(seed=1):
    rng = np.random.default_rng(seed)

    def layer(n, m):
        kernel = jnp.asarray(rng.normal(size=(n, m)) / 2, jnp.float32)
        return {"kernel": kernel, "bias": jnp.zeros(m)}

    return {"hidden": layer(8, 12), "out": layer(12, 4)}
