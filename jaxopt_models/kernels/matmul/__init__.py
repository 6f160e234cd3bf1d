"""Products of rows with packed integer codes; ``matmul`` is the operation."""

from .._layout import Packed as Packed
from .api import matmul as matmul
