"""Products with weights of which only what is kept is stored; ``matmul`` is the operation."""

from .api import matmul as matmul
from .layout import PackedBlocks as PackedBlocks
from .layout import PackedPairs as PackedPairs
