"""Which kernels there are for packed signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._dispatch_shapes import (
    no_floats,
    no_images,
    no_rows,
    of_images,
    of_rows,
    operand,
    unready,
)
from ._kernels import KERNELS, Kernel
from .kernels import binary
from .kernels._load import chosen
from .kernels.binary.layout import PackedSigns
from .quant._xnor import WithSign


def _unfit(eqn: Any, values: Sequence[Any]) -> str:
    """Says why operands are not for the compiled kernels, ``""`` if they are."""
    position, seen = operand(values)
    leaf, x = seen.leaf, values[1 - position]
    return unready(leaf, isinstance(leaf.values, PackedSigns)) or no_floats(eqn, x)


def _dot_refuses(eqn: Any, values: Sequence[Any]) -> str:
    return _unfit(eqn, values) or no_rows(eqn, values)


def _dot(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_rows(eqn, values, binary.matmul)


def _conv_refuses(eqn: Any, values: Sequence[Any]) -> str:
    if why := _unfit(eqn, values) or no_images(eqn, values):
        return why
    return "its channels are in groups" if eqn.params["feature_group_count"] > 1 else ""


def _conv(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_images(eqn, values, binary.conv)


KERNELS += [
    Kernel("binary matmul", "dot_general", WithSign, ("cpu",), _dot, _dot_refuses, path=chosen),
    Kernel(
        "binary conv", "conv_general_dilated", WithSign, ("cpu",), _conv, _conv_refuses, path=chosen
    ),
]
