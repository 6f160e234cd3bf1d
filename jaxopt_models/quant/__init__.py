"""Quantization: number formats as encoders."""

from ._int import Int as Int
from ._quantized import Quantized as Quantized
from ._with_input import Input as Input
from ._with_input import WithInput as WithInput
