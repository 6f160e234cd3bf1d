"""Small reference models, as linen modules here and as nnx twins in `models.nnx`.

The twins have the same parameter paths (`ip1/kernel`), shapes and function.
"""

from . import _nnx as nnx
from ._linen import LeNet5 as LeNet5
from ._linen import LeNet300 as LeNet300

__all__ = ["LeNet5", "LeNet300", "nnx"]
