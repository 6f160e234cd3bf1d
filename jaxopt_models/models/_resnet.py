"""Residual networks, as linen modules."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._images import colors

# Kernel size, channels and stride of each convolution of a block.
Convolutions = tuple[tuple[int, int, int], ...]

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def blocks(stages: tuple[int, ...], block: str, width: int) -> Iterator[tuple[str, Convolutions]]:
    """Lists the blocks of a network with their names."""
    for i, count in enumerate(stages):
        channels = width * 2**i
        for j in range(count):
            stride = 2 if i and not j else 1
            if block == "basic":
                convolutions = ((3, channels, stride), (3, channels, 1))
            elif block == "bottleneck":
                convolutions = ((1, channels, 1), (3, channels, stride), (1, 4 * channels, 1))
            else:
                raise ValueError(f"block is {block!r}; give 'basic' or 'bottleneck'.")
            yield f"stage{i + 1}_block{j + 1}", convolutions


def projected(convolutions: Convolutions, channels: int) -> tuple[int, int] | None:
    """Gives channels and stride of the projection of a shortcut, if the block needs one."""
    features = convolutions[-1][1]
    stride = max(stride for _, _, stride in convolutions)
    return (features, stride) if stride > 1 or features != channels else None


def _convolve(
    x: jax.Array, name: str, kernel: int, features: int, stride: int, *, train: bool
) -> jax.Array:
    x = nn.Conv(
        features,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=HE,
        name=f"conv{name}",
    )(x)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{name}")(x)


class _Block(nn.Module):
    """Convolutions with batch normalization around a shortcut."""

    convolutions: Convolutions

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = x
        for i, (kernel, features, stride) in enumerate(self.convolutions, 1):
            y = _convolve(y, str(i), kernel, features, stride, train=train)
            y = nn.relu(y) if i < len(self.convolutions) else y
        if projection := projected(self.convolutions, x.shape[-1]):
            x = _convolve(x, "_shortcut", 1, *projection, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network for images: a stem, stages of blocks, and a dense layer on the mean.

    The stem `conv1` is 7x7 with stride 2, followed by 3x3 max pooling with stride 2. Each stage
    has twice the channels of the one before and begins, but for the first, with stride 2, which
    in a bottleneck is that of its 3x3 convolution. Layers `stage1_block1/conv1`,
    `stage1_block1/bn1` and so on, `conv_shortcut` where the shortcut is a projection, and
    `head`. Statistics of the batch normalization are in the collection `batch_stats`.

    Args:
      stages: number of blocks of each stage.
      block: `"basic"`, two 3x3 convolutions, or `"bottleneck"`, a 3x3 one between two of 1x1,
        the last with four times the channels.
      classes: number of logits.
      width: channels of the stem and of the first stage.

    Example:
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> model = ResNet(stages=(1, 1), classes=10, width=8)
      >>> variables = model.init(jax.random.key(0), images)
      >>> model.apply(variables, images).shape
      (2, 10)
      >>> logits, new = model.apply(variables, images, train=True, mutable="batch_stats")
      >>> sorted(new["batch_stats"])
      ['bn1', 'stage1_block1', 'stage2_block1']

    References:
      He, Zhang, Ren and Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
      Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017
      (the stride of the bottleneck)
    """

    stages: tuple[int, ...] = (2, 2, 2, 2)
    block: str = "basic"
    classes: int = 1000
    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps normalized float images `[B, H, W, 3]` to logits `[B, classes]`.

        With `train` the batch's own statistics are used and the running ones change, without
        it the running ones are used.
        """
        x = nn.relu(_convolve(colors(images), "1", 7, self.width, 2, train=train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for name, convolutions in blocks(self.stages, self.block, self.width):
            x = _Block(convolutions, name=name)(x, train=train)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))


def ResNet18(classes: int = 1000, *, width: int = 64) -> ResNet:
    """ResNet-18: basic blocks 2, 2, 2, 2; 11,689,512 parameters for 1000 classes.

    Args:
      classes: number of logits.
      width: channels of the stem and of the first stage.

    Returns:
      The module, for images of 224 x 224.

    Example:
      >>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
      >>> variables = jax.eval_shape(ResNet18().init, jax.random.key(0), images)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      11689512

    References:
      He, Zhang, Ren and Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
    """
    return ResNet((2, 2, 2, 2), "basic", classes, width)


def ResNet50(classes: int = 1000, *, width: int = 64) -> ResNet:
    """ResNet-50: bottlenecks 3, 4, 6, 3; 25,557,032 parameters for 1000 classes.

    Args:
      classes: number of logits.
      width: channels of the stem and of the first stage.

    Returns:
      The module, for images of 224 x 224.

    Example:
      >>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
      >>> variables = jax.eval_shape(ResNet50().init, jax.random.key(0), images)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      25557032

    References:
      He, Zhang, Ren and Sun, `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
    """
    return ResNet((3, 4, 6, 3), "bottleneck", classes, width)
