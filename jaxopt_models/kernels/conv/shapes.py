"""Sizes of convolutions that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A convolution of a square image with SAME padding.

    Args:
      size: height and width of the image.
      channels: of the image.
      outputs: channels of the result.
      window: height and width of the kernel.
      stride: step of the window.
      groups: number of groups of channels.
    """

    size: int
    channels: int
    outputs: int
    window: int = 3
    stride: int = 1
    groups: int = 1


def _resnet50() -> tuple[Shape, ...]:
    found = []
    for stage, (size, width) in enumerate(((56, 64), (28, 128), (14, 256), (7, 512))):
        stride = 1 if stage == 0 else 2
        before = 64 if stage == 0 else 2 * width
        found += [
            Shape(size * stride, before, width, 1),
            Shape(size * stride, width, width, 3, stride),
            Shape(size, width, 4 * width, 1),
            Shape(size * stride, before, 4 * width, 1, stride),
            Shape(size, 4 * width, width, 1),
            Shape(size, width, width, 3),
        ]
    return tuple(dict.fromkeys(found))


#: Every 3x3 and 1x1 convolution of ResNet-50.
RESNET50 = _resnet50()
#: The depthwise convolutions of EfficientNet-Lite0.
LITE0 = (
    Shape(112, 32, 32, 3, 1, 32),
    Shape(112, 96, 96, 3, 2, 96),
    Shape(56, 144, 144, 3, 1, 144),
    Shape(56, 144, 144, 5, 2, 144),
    Shape(28, 240, 240, 5, 1, 240),
    Shape(28, 240, 240, 3, 2, 240),
    Shape(14, 480, 480, 3, 1, 480),
    Shape(14, 480, 480, 5, 1, 480),
    Shape(14, 672, 672, 5, 1, 672),
    Shape(14, 672, 672, 5, 2, 672),
    Shape(7, 1152, 1152, 5, 1, 1152),
    Shape(7, 1152, 1152, 3, 1, 1152),
)
#: Small ones at which layouts end: odd sizes, few and many channels, groups.
EDGES = (
    Shape(1, 1, 1, 1),
    Shape(5, 3, 8),
    Shape(7, 64, 64, 3, 2),
    Shape(4, 33, 70, 1),
    Shape(9, 16, 16, 3, 1, 16),
    Shape(8, 70, 70, 5, 2, 70),
    Shape(6, 32, 64, 3, 1, 4),
    Shape(6, 8, 24, 3, 1, 8),
)
