"""Which kernels there are for packed signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ._dispatch_shapes import no_images, no_rows, of_images, of_rows, operand
from ._kernels import KERNELS, Kernel
from .kernels import binary, status
from .kernels.binary.layout import PackedSigns, why_not
from .quant._xnor import WithSign


def _unfit(values: Sequence[Any]) -> str:
    """Says why operands are not for the compiled kernels, ``""`` if they are."""
    position, seen = operand(values)
    leaf, x = seen.leaf, values[1 - position]
    if not isinstance(leaf.values, PackedSigns):
        return why_not(leaf) or "it is not laid out: call jaxopt_models.pack(tree)"
    found = status()
    if not found.path:
        return f"there are no compiled kernels: {found.why}"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the input is {x.dtype}"
    return ""


def _dot_refuses(eqn: Any, values: Sequence[Any]) -> str:
    return _unfit(values) or no_rows(eqn, values)


def _dot(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_rows(eqn, values, binary.matmul)


def _conv_refuses(eqn: Any, values: Sequence[Any]) -> str:
    if why := _unfit(values) or no_images(eqn, values):
        return why
    return "its channels are in groups" if eqn.params["feature_group_count"] > 1 else ""


def _conv(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_images(eqn, values, binary.conv)


KERNELS += [
    Kernel("binary matmul", "dot_general", WithSign, ("cpu",), _dot, _dot_refuses),
    Kernel("binary conv", "conv_general_dilated", WithSign, ("cpu",), _conv, _conv_refuses),
]
