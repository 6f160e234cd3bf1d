"""How operations multiply an input with a parameter."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of an input with an operand that is a parameter.

    Args:
      eqn: the equation.
      position: which operand the parameter is.
      reduced: its axes that are summed over, in the order in which :meth:`inputs` has them.
      shared: its axes that the input has too; each index has an input of its own.
      free: all others.
      groups: `(axis, count)` where an axis of ``free`` is divided into runs that each see
        another part of the input, or ``None``.
      multiply_adds: of one run of the equation.
    """

    eqn: Any
    position: int
    reduced: tuple[int, ...]
    shared: tuple[int, ...]
    free: tuple[int, ...]
    groups: tuple[int, int] | None
    multiply_adds: int

    @property
    def lookup(self) -> bool:
        """Whether the input is a set of indices, which count as one-hot rows."""
        return self.eqn.primitive.name == "gather"

    @property
    def row(self) -> tuple[int, ...]:
        """Axes of the input that one sample extends over."""
        if self.eqn.primitive.name == "dot_general":
            return tuple(self.eqn.params["dimension_numbers"][0][1 - self.position])
        return tuple(self.eqn.params["dimension_numbers"].lhs_spec[1:])

    @property
    def span(self) -> tuple[int, ...]:
        """Axes of the result that one sample extends over."""
        if self.eqn.primitive.name == "dot_general":
            (contract, _), (batch, _) = self.eqn.params["dimension_numbers"]
            first = len(self.eqn.invars[0].aval.shape) - len(contract)
            if self.position == 0:
                return tuple(range(len(batch), first))
            return tuple(range(first, len(self.eqn.outvars[0].aval.shape)))
        return tuple(self.eqn.params["dimension_numbers"].out_spec[1:])

    def inputs(self, x: jax.Array, kept: Sequence[int]) -> list[jax.Array]:
        """Returns what the parameter is multiplied with.

        Args:
          x: the other operand.
          kept: axes of ``shared`` that are kept apart; the others count as samples.

        Returns:
          Blocks `[*kept, *groups, samples, k]` that follow each other along the last axis.
        """
        if self.eqn.primitive.name == "dot_general":
            return [self._of_dot(x, kept)]
        return self._of_conv(x)

    def _of_dot(self, x: jax.Array, kept: Sequence[int]) -> jax.Array:
        contract, batch = self.eqn.params["dimension_numbers"]
        mine, other = contract[self.position], contract[1 - self.position]
        order = [other[mine.index(a)] for a in self.reduced]
        mine_b, other_b = batch[self.position], batch[1 - self.position]
        lead = [other_b[mine_b.index(a)] for a in kept]
        samples = [a for a in range(x.ndim) if a not in order and a not in lead]
        shape = [x.shape[a] for a in lead]
        x = x.transpose(*lead, *samples, *order)
        rows = math.prod(x.shape[x.ndim - len(order) :])
        return x.reshape(*shape, math.prod(x.shape[len(lead) : x.ndim - len(order)]), rows)

    def _of_conv(self, x: jax.Array) -> list[jax.Array]:
        p = self.eqn.params
        spec = p["dimension_numbers"]
        kernel, out = self.eqn.invars[1].aval.shape, self.eqn.outvars[0].aval.shape
        x = x.transpose(*spec.lhs_spec)
        spatial = zip(p["padding"], p["lhs_dilation"], strict=True)
        config = [(0, 0, 0), (0, 0, 0), *((lo, hi, d - 1) for (lo, hi), d in spatial)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
        sizes = [out[a] for a in spec.out_spec[2:]]
        blocks = []
        for offset in itertools.product(*(range(kernel[a]) for a in spec.rhs_spec[2:])):
            start = [o * d for o, d in zip(offset, p["rhs_dilation"], strict=True)]
            stride = list(p["window_strides"])
            limit = [s + (n - 1) * t + 1 for s, n, t in zip(start, sizes, stride, strict=True)]
            part = jax.lax.slice(x, [0, 0, *start], [*x.shape[:2], *limit], strides=[1, 1, *stride])
            part = jnp.moveaxis(part, 1, -1)
            groups = p["feature_group_count"]
            part = part.reshape(math.prod(part.shape[:-1]), groups, part.shape[-1] // groups)
            blocks.append(part.swapaxes(0, 1) if self.groups else part[:, 0])
        return blocks

    def counts(self, indices: jax.Array) -> tuple[jax.Array, int]:
        """Returns how often each row is looked up, and the number of lookups."""
        mode = self.eqn.params["mode"]
        rows = self.eqn.invars[0].aval.shape[self.reduced[0]]
        flat = indices.reshape(-1)
        if mode != jax.lax.GatherScatterMode.FILL_OR_DROP:
            flat = jnp.clip(flat, 0, rows - 1)
        inside = (flat >= 0) & (flat < rows)
        found = jnp.zeros(rows, jnp.int32).at[jnp.where(inside, flat, rows)].add(1, mode="drop")
        return found, flat.size


def product_of(eqn: Any, position: int) -> Product | str:
    """Reads an equation as a product with one of its operands.

    Args:
      eqn: the equation.
      position: the operand that is a parameter.

    Returns:
      The product, or why it is none.
    """
    name = eqn.primitive.name
    shape = eqn.invars[position].aval.shape
    axes = range(len(shape))
    if name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        reduced, shared = tuple(sorted(contract[position])), tuple(sorted(batch[position]))
        free = tuple(a for a in axes if a not in reduced and a not in shared)
        return Product(eqn, position, reduced, shared, free, None, multiply_adds(eqn))
    if name == "conv_general_dilated":
        if position != 1:
            return "the parameter is the input of a convolution"
        if eqn.params["batch_group_count"] != 1:
            return "a convolution with batch groups is the gradient of one"
        spec, groups = eqn.params["dimension_numbers"].rhs_spec, eqn.params["feature_group_count"]
        divided = (spec[0], groups) if groups > 1 else None
        return Product(eqn, 1, (*spec[2:], spec[1]), (), spec[:1], divided, multiply_adds(eqn))
    if name == "gather" and position == 0:
        dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        one = tuple(dims.start_index_map)
        whole = all(sizes[a] == shape[a] for a in axes if a not in one)
        if len(one) == 1 and whole and sizes[one[0]] == 1 and not dims.operand_batching_dims:
            free = tuple(a for a in axes if a not in one)
            return Product(eqn, 0, one, (), free, None, 0)
        return "it is indexed along several axes"
    return {"mul": "it scales entry by entry", "add": "it is added"}.get(
        name, f"{name} is no product with an input"
    )


def multiply_adds(eqn: Any) -> int:
    """Returns the multiply-adds of an equation, 0 unless it is a product or a convolution."""
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        [out] = eqn.outvars
        (contract, _), _ = p["dimension_numbers"]
        return math.prod(out.aval.shape) * math.prod(eqn.invars[0].aval.shape[a] for a in contract)
    if name == "conv_general_dilated":
        [out] = eqn.outvars
        kernel, spec = eqn.invars[1].aval.shape, p["dimension_numbers"].rhs_spec
        each = math.prod(kernel[a] for a in spec[1:])
        # Of a transposed convolution only every stride-th product is not with a zero put in.
        return math.prod(out.aval.shape) * each // int(np.prod(p["lhs_dilation"]))
    return 0
