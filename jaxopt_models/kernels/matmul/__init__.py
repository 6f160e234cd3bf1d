"""Products of rows with packed integer codes; ``matmul`` is the operation."""

from .api import matmul as matmul
from .layout import Packed as Packed
