"""What follows a product at once and its kernel computes too: a bias, an activation function.

A product is put off to the last equation of what follows it, where all operands are there. An
activation function is known by its program: entrywise equations are written out as an expression of
what goes in, and compared with those of :data:`ACTIVATIONS`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from ._activations import ACTIVATIONS
from ._jaxpr import bind, inner, is_literal

#: The longest activation function has as many equations.
_MOST_STEPS = 16
_ARITHMETIC = {"add", "sub", "mul", "div", "neg", "max", "min", "integer_pow"}
_ENTRYWISE = _ARITHMETIC | {"tanh", "logistic", "erfc", "exp"}


@dataclasses.dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows a product: `activation(y + bias)`.

    Args:
      bias: the variable that is added, as broadcast as it is; ``None`` for none.
      activation: a key of :data:`ACTIVATIONS`.
      equations: all of this, in order.
    """

    bias: Any
    activation: str
    equations: tuple[Any, ...]

    @property
    def label(self) -> str:
        """Its parts in words."""
        parts = ["bias"] if self.bias is not None else []
        parts += [self.activation] if self.activation != "none" else []
        return "".join(f" + {part}" for part in parts)


@dataclasses.dataclass(frozen=True)
class Tail:
    """An epilogue with the array that it adds.

    Args:
      bias: as broadcast as it is added, or ``None``.
      activation: a key of :data:`ACTIVATIONS`.
    """

    bias: jax.Array | None = None
    activation: str = "none"

    def __call__(self, y: jax.Array) -> jax.Array:
        """Applies it in plain JAX."""
        return ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)

    def having(self, bias: jax.Array | None) -> Tail:
        """Returns the same with another array."""
        return dataclasses.replace(self, bias=bias)

    @property
    def options(self) -> dict[str, Any]:
        """It as kernels take it."""
        bias = None if self.bias is None else self.bias.reshape(-1)
        return {"bias": bias, "activation": self.activation}


NOTHING = Tail()


class Epilogues:
    """The epilogues of a jaxpr."""

    def __init__(self, jaxpr: Any):
        self._jaxpr = jaxpr

    @functools.cached_property
    def _readers(self) -> dict[Any, list[Any]]:
        """The equations that read each variable, ``None`` among them where it is returned."""
        found: dict[Any, list[Any]] = {}
        for eqn in self._jaxpr.eqns:
            for v in dict.fromkeys(v for v in eqn.invars if not is_literal(v)):
                found.setdefault(v, []).append(eqn)
        for v in self._jaxpr.outvars:
            if not is_literal(v):
                found.setdefault(v, []).append(None)
        return found

    @functools.cached_property
    def _place(self) -> dict[int, int]:
        return {id(eqn): i for i, eqn in enumerate(self._jaxpr.eqns)}

    def of(self, eqn: Any) -> Epilogue | None:
        """Returns what follows an equation with one result, or ``None`` if that is nothing."""
        [out] = eqn.outvars
        bias, equations = None, ()
        match self._readers.get(out, []):
            case [add] if add is not None and add.primitive.name == "add":
                others = [v for v in add.invars if v is not out]
                if len(others) == 1 and not is_literal(others[0]):
                    [bias], [out], equations = others, add.outvars, (add,)
        activation, steps = self._activation(out)
        equations += steps
        return Epilogue(bias, activation, equations) if equations else None

    def _activation(self, x: Any) -> tuple[str, tuple[Any, ...]]:
        """Returns the activation function that is all that reads ``x``, and its equations."""
        shape, known = x.aval.shape, _known(str(x.aval.dtype))
        wrote: dict[Any, str] = {x: "x"}
        steps: list[Any] = []
        best: tuple[str, tuple[Any, ...]] = "none", ()
        first = [self._place[id(e)] for e in self._readers.get(x, []) if e is not None]
        if not first:
            return best
        for eqn in self._jaxpr.eqns[min(first) : min(first) + 4 * _MOST_STEPS]:
            if len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape != shape:
                continue
            text = _written(eqn, wrote)
            if text is None:
                continue
            steps.append(eqn)
            wrote[eqn.outvars[0]] = text
            if text in known and self._inside(x, steps):
                best = known[text], tuple(steps)
            if len(steps) == _MOST_STEPS:
                break
        return best

    def _inside(self, x: Any, steps: list[Any]) -> bool:
        """Says whether nothing but these equations reads ``x`` and what is between them."""
        between = [x, *(e.outvars[0] for e in steps[:-1])]
        mine = set(map(id, steps))
        return all(
            e is not None and id(e) in mine for v in between for e in self._readers.get(v, [])
        )


def _written(eqn: Any, wrote: dict[Any, str]) -> str | None:
    """Writes an equation out as an expression; ``None`` if it is not one of what is written."""
    operands = [repr(_number(v)) if is_literal(v) else wrote.get(v) for v in eqn.invars]
    if None in operands or all(map(is_literal, eqn.invars)):
        return None
    name = eqn.primitive.name
    if name == "jit" or (name == "custom_jvp_call" and len(operands) == 1):
        jaxpr, consts = inner(eqn.params)
        if len(consts) or len(jaxpr.outvars) != 1:
            return None
        inside = dict(zip(jaxpr.invars, operands, strict=True))
        for step in jaxpr.eqns:
            text = _written(step, inside) if len(step.outvars) == 1 else None
            if text is None:
                return None
            inside[step.outvars[0]] = text
        body = inside.get(jaxpr.outvars[0])
        return f"{_derivative(eqn)}:{body}" if name == "custom_jvp_call" and body else body
    if name == "copy":
        return operands[0]
    if name not in _ENTRYWISE or eqn.params.get("accuracy") is not None:
        return None
    power = f"[{eqn.params['y']}]" if name == "integer_pow" else ""
    return f"{name}{power}({','.join(map(str, operands))})"


def _derivative(eqn: Any) -> str:
    """Writes out the derivative rule of a function of one operand, which its body does not tell."""
    [x] = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    along = jax.make_jaxpr(lambda x, t: jax.jvp(lambda x: bind(eqn, [x]), (x,), (t,)))(x, x)
    # The same whatever the shape is.
    return re.sub(r"\[[\d,]*\]|\([\d, ]*\)|\s", "", str(along))


def _number(v: Any) -> Any:
    return v.val.item() if hasattr(v.val, "item") and jnp.size(v.val) == 1 else v.val


@functools.cache
def _known(dtype: str) -> dict[str, str]:
    """Returns the names of the activation functions by what they are, written out."""
    found = {}
    for name, fn in ACTIVATIONS.items():
        if name == "none":
            continue
        jaxpr = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((2,), dtype)).jaxpr
        wrote: dict[Any, str] = dict.fromkeys(jaxpr.invars, "x")
        for eqn in jaxpr.eqns:
            text = _written(eqn, wrote)
            if text is not None:
                wrote[eqn.outvars[0]] = text
        if jaxpr.outvars[0] in wrote:
            found[wrote[jaxpr.outvars[0]]] = name
    return found
