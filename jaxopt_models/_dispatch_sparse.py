"""Which kernels there are for what a mask keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ._dispatch_shapes import no_rows, of_rows, operand
from ._encoded import Masked
from ._kernels import KERNELS, Kernel
from ._pack import why_not
from .kernels import sparse, status
from .kernels.sparse import PackedBlocks, PackedPairs

#: Rows up to which pairs are faster than the rebuilt weight.
MOST_ROWS_OF_PAIRS = 64


def _refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = operand(values)
    leaf, x = seen.leaf, values[1 - position]
    if isinstance(leaf, Masked):
        return why_not(leaf) or "it is not laid out: call jaxopt_models.pack(tree)"
    found = status()
    if not found.path:
        return f"there are no compiled kernels: {found.why}"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the input is {x.dtype}"
    if why := no_rows(eqn, values):
        return why
    rows = math.prod(x.shape) // max(1, math.prod(leaf.stack) * leaf.matrix.rows)
    if isinstance(leaf, PackedPairs) and rows > MOST_ROWS_OF_PAIRS:
        return f"for more than {MOST_ROWS_OF_PAIRS} rows its weight is better rebuilt"
    return ""


def _run(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_rows(eqn, values, sparse.matmul)


KERNELS += [
    Kernel("sparse matmul", "dot_general", leaf, ("cpu",), _run, _refuses)
    for leaf in (PackedBlocks, PackedPairs, Masked)
]
