"""Products of signs with packed signs; ``matmul`` and ``conv`` are the operations."""

from .api import conv as conv
from .api import matmul as matmul
from .layout import PackedSigns as PackedSigns
