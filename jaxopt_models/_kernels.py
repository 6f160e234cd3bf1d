"""The one place where an operation, a type of leaf and a platform meet.

A kernel computes an operation on a parameter as it is stored. :func:`pick` chooses it by operation
and leaf, or says why there is none; the platform is known when the program is compiled, and on
others the walk rebuilds the parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._encoded import Encoded, is_encoded
from ._tracked import Deferred, is_tracked, values_of


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation on packed parameters.

    Args:
      name: its name in tables.
      operation: primitive, such as ``"dot_general"``.
      leaf: type of the parameter.
      platforms: where it runs: ``"cpu"``, ``"cuda"``, ``"tpu"``.
      run: from the equation and its operands (arrays and the leaf) to its outputs.
      refuses: from the same to the reason why it does not fit, or ``""``.
    """

    name: str
    operation: str
    leaf: type[Encoded]
    platforms: tuple[str, ...]
    run: Callable[..., list[Any]]
    refuses: Callable[[Any, Sequence[Any]], str] = lambda eqn, operands: ""

    @property
    def label(self) -> str:
        """The name and where it runs; which of these it is, the compiler decides."""
        return f"{self.name} on {', '.join(self.platforms)}"

    def on(self, eqn: Any, operands: Sequence[Any], *, otherwise: Callable[..., Any]) -> list[Any]:
        """Runs where the program is compiled for a platform of this kernel, else ``otherwise``."""

        def elsewhere(*values: Any) -> tuple[Any, ...]:
            pairs = zip(operands, values, strict=True)
            again = [dataclasses.replace(x, value=v) if is_tracked(x) else v for x, v in pairs]
            return tuple(otherwise(eqn, again))

        here = dict.fromkeys(self.platforms, lambda *values: tuple(self.run(eqn, values)))
        return list(jax.lax.platform_dependent(*values_of(operands), default=elsewhere, **here))


KERNELS: list[Kernel] = []


def pick(eqn: Any, operands: Sequence[Any]) -> tuple[Kernel | None, str]:
    """Chooses the kernel of an operation.

    Args:
      eqn: the equation.
      operands: arrays, and tracked values where it meets parameters.

    Returns:
      The first kernel that fits, or ``None`` and why none does.
    """
    name, values = eqn.primitive.name, values_of(operands)
    leaves = list(filter(is_encoded, values))
    if len(leaves) > 1:
        return None, "two compressed parameters meet"
    if not leaves:
        steps = [x.step.name for x in values if isinstance(x, Deferred)]
        return None, f"the parameter goes through {steps[0]} before it is used"
    [leaf] = leaves
    why = f"no kernel for {name} of {leaf.kind()}"
    for kernel in KERNELS:
        if kernel.operation == name and isinstance(leaf, kernel.leaf):
            reason = kernel.refuses(eqn, values)
            if not reason:
                return kernel, ""
            why = f"{kernel.name}: {reason}"
    return None, why
