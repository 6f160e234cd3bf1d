"""A net with batch normalization of every kind, and its parameters as after training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(3)


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


def relative(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(a)


def drawn(tree):
    """Returns parameters as after training: no variance is one, no mean zero, a scale negative."""

    def draw(path, a):
        last = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        if not jnp.issubdtype(a.dtype, jnp.floating) or "kernel" in last:
            return a
        return np.abs(normal(*a.shape)) + np.float32(0.1) if "var" in last else normal(*a.shape)

    return jax.tree_util.tree_map_with_path(draw, tree)


class Net(nn.Module):
    """Convolutions of every kind, with and without bias, and norms with and without parts."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.5)
        x = nn.relu(norm(epsilon=1e-3, name="n1")(nn.Conv(8, (3, 3), name="plain")(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(x)
        x = norm(use_scale=False, use_bias=False, name="n2")(x)
        x = nn.Conv(6, (1, 1), feature_group_count=2, use_bias=False, name="grouped")(x)
        x = nn.relu(norm(use_scale=False, name="n3")(x))
        x = norm(name="n4")(x)  # after ReLU: it stays
        x = norm(use_bias=False, name="n5")(nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(nn.relu(x))


@functools.cache
def net():
    x = normal(6, 4, 4, 3)
    model = Net()
    variables = drawn(jax.jit(model.init)(jax.random.key(0), x))
    return model, variables, x
