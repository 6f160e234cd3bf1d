"""The nnx twins of the residual networks."""

import jax
import jax.numpy as jnp
from flax import nnx

from ._images import colors
from ._resnet import HE, Convolutions, blocks, projected


def _add(
    module: nnx.Module,
    name: str,
    kernel: int,
    channels: int,
    features: int,
    stride: int,
    rngs: nnx.Rngs,
) -> None:
    convolution = nnx.Conv(
        channels,
        features,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=HE,
        rngs=rngs,
    )
    setattr(module, f"conv{name}", convolution)
    setattr(module, f"bn{name}", nnx.BatchNorm(features, momentum=0.9, rngs=rngs))


def _convolve(module: nnx.Module, name: str, x: jax.Array, *, train: bool) -> jax.Array:
    x = getattr(module, f"conv{name}")(x)
    return getattr(module, f"bn{name}")(x, use_running_average=not train)


class _Block(nnx.Module):
    """Convolutions with batch normalization around a shortcut."""

    def __init__(self, channels: int, convolutions: Convolutions, *, rngs: nnx.Rngs):
        self.depth = len(convolutions)
        self.projects = False
        if projection := projected(convolutions, channels):
            self.projects = True
            _add(self, "_shortcut", 1, channels, *projection, rngs)
        for i, (kernel, features, stride) in enumerate(convolutions, 1):
            _add(self, str(i), kernel, channels, features, stride, rngs)
            channels = features

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = x
        for i in range(1, self.depth + 1):
            y = _convolve(self, str(i), y, train=train)
            y = nnx.relu(y) if i < self.depth else y
        if self.projects:
            x = _convolve(self, "_shortcut", x, train=train)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """A residual network for images: a stem, stages of blocks, and a dense layer on the mean.

    The twin of the linen :class:`jaxopt_models.models.ResNet`. The stem `conv1` is 7x7 with
    stride 2, followed by 3x3 max pooling with stride 2. Layers `stage1_block1/conv1`,
    `stage1_block1/bn1` and so on, `conv_shortcut` where the shortcut is a projection, and
    `head`. Statistics of the batch normalization are of type `nnx.BatchStat`.

    Args:
      stages: number of blocks of each stage.
      block: `"basic"`, two 3x3 convolutions, or `"bottleneck"`, a 3x3 one between two of 1x1,
        the last with four times the channels.
      classes: number of logits.
      width: channels of the stem and of the first stage.
      rngs: keys for the initial parameters.

    Example:
      >>> model = ResNet(stages=(1,), classes=10, width=8, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)

    References:
      He, Zhang, Ren and Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
      Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017
      (the stride of the bottleneck)
    """

    def __init__(
        self,
        stages: tuple[int, ...] = (2, 2, 2, 2),
        block: str = "basic",
        classes: int = 1000,
        width: int = 64,
        *,
        rngs: nnx.Rngs,
    ):
        _add(self, "1", 7, 3, width, 2, rngs)
        channels, names = width, []
        for name, convolutions in blocks(stages, block, width):
            setattr(self, name, _Block(channels, convolutions, rngs=rngs))
            names.append(name)
            channels = convolutions[-1][1]
        self.blocks = tuple(names)
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps normalized float images `[B, H, W, 3]` to logits `[B, classes]`.

        With `train` the batch's own statistics are used and the running ones change, without
        it the running ones are used.
        """
        x = nnx.relu(_convolve(self, "1", colors(images), train=train))
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for name in self.blocks:
            x = getattr(self, name)(x, train=train)
        return self.head(jnp.mean(x, axis=(1, 2)))


def ResNet18(classes: int = 1000, *, width: int = 64, rngs: nnx.Rngs) -> ResNet:
    """ResNet-18: basic blocks 2, 2, 2, 2; 11,689,512 parameters for 1000 classes.

    The twin of the linen :func:`jaxopt_models.models.ResNet18`.

    Args:
      classes: number of logits.
      width: channels of the stem and of the first stage.
      rngs: keys for the initial parameters.

    Returns:
      The module, for images of 224 x 224.

    Example:
      >>> model = nnx.eval_shape(lambda: ResNet18(rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      11689512

    References:
      He, Zhang, Ren and Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
    """
    return ResNet((2, 2, 2, 2), "basic", classes, width, rngs=rngs)


def ResNet50(classes: int = 1000, *, width: int = 64, rngs: nnx.Rngs) -> ResNet:
    """ResNet-50: bottlenecks 3, 4, 6, 3; 25,557,032 parameters for 1000 classes.

    The twin of the linen :func:`jaxopt_models.models.ResNet50`.

    Args:
      classes: number of logits.
      width: channels of the stem and of the first stage.
      rngs: keys for the initial parameters.

    Returns:
      The module, for images of 224 x 224.

    Example:
      >>> model = nnx.eval_shape(lambda: ResNet50(rngs=nnx.Rngs(0)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
      25557032

    References:
      He, Zhang, Ren and Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
    """
    return ResNet((3, 4, 6, 3), "bottleneck", classes, width, rngs=rngs)
