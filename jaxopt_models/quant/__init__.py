"""Quantization: number formats as encoders."""

from ._int import Int as Int
from ._quantized import Quantized as Quantized
