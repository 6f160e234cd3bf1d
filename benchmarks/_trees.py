"""What is counted of compressed trees."""

from __future__ import annotations

from typing import Any

import jax

import jaxopt_models as jom


def is_encoded(x: Any) -> bool:
    """Whether a node stands for a compressed parameter."""
    return isinstance(x, jom.Encoded)


def leaves(tree: Any) -> list[Any]:
    """Returns the parameters of a tree, compressed or not."""
    return jax.tree.leaves(tree, is_leaf=is_encoded)


def stored_bits(x: Any) -> int:
    """Returns the bits of a parameter in memory, scales and all else counted."""
    return x.storage_bits() if is_encoded(x) else 8 * x.nbytes


def stored_bytes(tree: Any) -> float:
    """Returns the bytes of all parameters of a tree."""
    return sum(map(stored_bits, leaves(tree))) / 8


def bits_per_weight(tree: Any) -> float:
    """Returns the mean over all parameters but vectors."""
    weights = [x for x in leaves(tree) if len(x.shape) > 1]
    return sum(map(stored_bits, weights)) / sum(x.size for x in weights)
