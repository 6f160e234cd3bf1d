"""Products of rows with codes, packed or as they are stored; ``matmul`` is the operation."""

from .._layout import Packed as Packed
from .api import matmul as matmul
