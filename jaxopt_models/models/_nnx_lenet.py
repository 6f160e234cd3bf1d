"""The LeNets of the compression papers, as nnx modules: twins of the linen ones."""

import jax
from flax import nnx

from ._images import halve, pixels


class LeNet300(nnx.Module):
    """LeNet-300-100: 784 -> 300 -> 100 -> 10 with ReLU, 266,610 parameters.

    The twin of the linen :class:`jaxopt_models.models.LeNet300`. Layers `ip1`, `ip2`, `ip3`.

    Args:
      rngs: keys for the initial parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> model = LeNet300(rngs=nnx.Rngs(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
      266610
      >>> model(jnp.zeros((2, 28, 28), jnp.uint8)).shape
      (2, 10)

    References:
      LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document
      Recognition, Proceedings of the IEEE 86(11), 1998
      Han, Mao and Dally, `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2015
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.ip1 = nnx.Linear(784, 300, rngs=rngs)
        self.ip2 = nnx.Linear(300, 100, rngs=rngs)
        self.ip3 = nnx.Linear(100, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `uint8` or float images `[B, 28, 28]` or `[B, 28, 28, 1]` to logits `[B, 10]`."""
        x = pixels(images)
        x = x.reshape(-1, 784)
        x = nnx.relu(self.ip1(x))
        x = nnx.relu(self.ip2(x))
        return self.ip3(x)


class LeNet5(nnx.Module):
    """Caffe's LeNet: two 5x5 convolutions and two dense layers, 431,080 parameters.

    The twin of the linen :class:`jaxopt_models.models.LeNet5`. Layers `conv1`, `conv2`,
    `ip1`, `ip2`; no nonlinearity after the convolutions but the max pooling.

    Args:
      rngs: keys for the initial parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> model = LeNet5(rngs=nnx.Rngs(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
      431080
      >>> model(jnp.zeros((2, 28, 28), jnp.uint8)).shape
      (2, 10)

    References:
      Jia et al., `Caffe: Convolutional Architecture for Fast Feature Embedding
      <https://arxiv.org/abs/1408.5093>`_, 2014
      Han, Mao and Dally, `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2015
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 20, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(20, 50, (5, 5), padding="VALID", rngs=rngs)
        self.ip1 = nnx.Linear(800, 500, rngs=rngs)
        self.ip2 = nnx.Linear(500, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `uint8` or float images `[B, 28, 28]` or `[B, 28, 28, 1]` to logits `[B, 10]`."""
        x = self.conv1(pixels(images))
        x = halve(x)
        x = self.conv2(x)
        x = halve(x)
        x = x.reshape(-1, 800)
        x = nnx.relu(self.ip1(x))
        return self.ip2(x)
