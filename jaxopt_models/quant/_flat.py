"""A program laid out flat: calls are entered, loops over stacked layers run layer by layer."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jaxpr import CALLS, bind, inner, interpret, scan_counts


@dataclasses.dataclass(frozen=True)
class Unit:
    """A parameter, or one layer of a stacked one."""

    path: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


def like(aval: Any, without: int) -> Any:
    """Returns the type of an array, without some of its first axes."""
    return jax.ShapeDtypeStruct(aval.shape[without:], aval.dtype, weak_type=aval.weak_type)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A parameter whose first axis may be one of layers: a list of these, or not yet apart."""

    path: str
    value: Any


def laid_out(
    flat: Flat, program: Any, stacks: Sequence[str | None], params: list[Any], data: list[Any]
) -> list[Any]:
    """Runs a program, its parameters stacks where these have a path."""
    pairs = zip(stacks, params, strict=True)
    given = [x if path is None else Stack(path, x) for path, x in pairs]
    out = flat.run(program.jaxpr, program.consts, [*given, *data])
    return [x for x in out if not isinstance(x, Stack)]


class Flat:
    """Runs a jaxpr and enters what it calls.

    Args:
      wanted: paths for which a loop is run layer by layer.

    Attributes:
      layered: paths of stacks that such a loop runs over.
      whole: those of stacks that are used otherwise.
    """

    def __init__(self, wanted: Collection[str]):
        self.wanted = wanted
        self.layered: set[str] = set()
        self.whole: set[str] = set()

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a jaxpr."""
        return interpret(jaxpr, consts, args, self._apply)

    def _apply(self, eqn: Any, operands: list[Any]) -> list[Any]:
        if eqn.primitive.name in CALLS:
            return self.run(*inner(eqn.params), operands)
        if eqn.primitive.name == "scan" and self._over_layers(eqn, operands):
            return self._layers(eqn, operands)
        return bind(eqn, list(map(self._together, operands)))

    def _together(self, x: Any) -> Any:
        if not isinstance(x, Stack):
            return x
        self.whole.add(x.path)
        return jnp.stack(x.value) if isinstance(x.value, list) else x.value

    def _over_layers(self, eqn: Any, operands: Sequence[Any]) -> bool:
        stacks = [x for x in operands[sum(scan_counts(eqn.params)) :] if isinstance(x, Stack)]
        return any(x.path in self.wanted for x in stacks)

    def _layers(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """Runs a loop over stacked layers, iteration by iteration once they are apart."""
        p = eqn.params
        n, m = scan_counts(p)
        fixed, xs = list(map(self._together, operands[: n + m])), operands[n + m :]
        self.layered |= {x.path for x in xs if isinstance(x, Stack)}
        if any(isinstance(x, Stack) and not isinstance(x.value, list) for x in xs):
            return bind(eqn, [*fixed, *(x.value if isinstance(x, Stack) else x for x in xs)])
        consts, carry = fixed[:n], fixed[n:]
        order = range(p["length"])
        ys = []
        for i in reversed(order) if p["reverse"] else order:
            here = [
                x.value[i] if isinstance(x, Stack) else lax.index_in_dim(x, i, keepdims=False)
                for x in xs
            ]
            out = self.run(*inner(p), [*consts, *carry, *here])
            carry = out[:m]
            ys.append(out[m:])
        if p["reverse"]:
            ys.reverse()
        # What the body hands back as it came is the parameter still; nnx returns all of them.
        stacks = [x for x in xs if isinstance(x, Stack)]
        found = []
        for layers in zip(*ys, strict=True):
            same = [s for s in stacks if all(map(operator.is_, s.value, layers))]
            found.append(same[0] if same else jnp.stack(layers))
        return [*carry, *found]
