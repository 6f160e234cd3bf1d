"""Which kernels there are for what a mask keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ._dispatch_shapes import no_floats, no_rows, of_rows, operand, unready
from ._encoded import Masked
from ._kernels import KERNELS, Kernel
from .kernels import sparse
from .kernels._load import chosen
from .kernels.sparse import PackedBlocks, PackedPairs

#: Rows up to which pairs are faster than the rebuilt weight.
MOST_ROWS_OF_PAIRS = 64


def _refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = operand(values)
    leaf, x = seen.leaf, values[1 - position]
    why = unready(leaf, not isinstance(leaf, Masked)) or no_floats(eqn, x)
    if why := why or no_rows(eqn, values):
        return why
    rows = math.prod(x.shape) // max(1, math.prod(leaf.stack) * leaf.matrix.rows)
    if isinstance(leaf, PackedPairs) and rows > MOST_ROWS_OF_PAIRS:
        return f"for more than {MOST_ROWS_OF_PAIRS} rows its weight is better rebuilt"
    return ""


def _run(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_rows(eqn, values, sparse.matmul)


KERNELS += [
    Kernel("sparse matmul", "dot_general", leaf, ("cpu",), _run, _refuses, path=chosen)
    for leaf in (PackedBlocks, PackedPairs, Masked)
]
