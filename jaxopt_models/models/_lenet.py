"""The LeNets of the compression papers, as linen modules."""

import flax.linen as nn
import jax

from ._images import halve, pixels


class LeNet300(nn.Module):
    """LeNet-300-100: 784 -> 300 -> 100 -> 10 with ReLU, 266,610 parameters.

    The dense network of the pruning papers. Layers `ip1`, `ip2`, `ip3`.

    Example:
      >>> import jax.numpy as jnp
      >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
      >>> variables = LeNet300().init(jax.random.key(0), images)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      266610
      >>> LeNet300().apply(variables, images).shape
      (2, 10)

    References:
      LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document
      Recognition, Proceedings of the IEEE 86(11), 1998
      Han, Mao and Dally, `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2015
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `uint8` or float images `[B, 28, 28]` or `[B, 28, 28, 1]` to logits `[B, 10]`."""
        x = pixels(images)
        x = x.reshape(-1, 784)
        x = nn.relu(nn.Dense(300, name="ip1")(x))
        x = nn.relu(nn.Dense(100, name="ip2")(x))
        return nn.Dense(10, name="ip3")(x)


class LeNet5(nn.Module):
    """Caffe's LeNet: two 5x5 convolutions and two dense layers, 431,080 parameters.

    The convolutional network of Deep Compression: 20 and 50 channels without padding, each
    followed by 2x2 max pooling and by no other nonlinearity, then 500 with ReLU, then 10.
    Layers `conv1`, `conv2`, `ip1`, `ip2`. Rows of `ip1/kernel` are in the order height,
    width, channel.

    Example:
      >>> import jax.numpy as jnp
      >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
      >>> variables = LeNet5().init(jax.random.key(0), images)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      431080
      >>> LeNet5().apply(variables, images).shape
      (2, 10)

    References:
      Jia et al., `Caffe: Convolutional Architecture for Fast Feature Embedding
      <https://arxiv.org/abs/1408.5093>`_, 2014
      Han, Mao and Dally, `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2015
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `uint8` or float images `[B, 28, 28]` or `[B, 28, 28, 1]` to logits `[B, 10]`."""
        x = pixels(images)
        x = nn.Conv(20, (5, 5), padding="VALID", name="conv1")(x)
        x = halve(x)
        x = nn.Conv(50, (5, 5), padding="VALID", name="conv2")(x)
        x = halve(x)
        x = x.reshape(-1, 800)
        x = nn.relu(nn.Dense(500, name="ip1")(x))
        return nn.Dense(10, name="ip2")(x)
