"""The one place where an operation, a type of leaf and a platform meet.

A kernel computes an operation on a parameter as it is stored. Without one for the operation, the
leaf and the platform, the walk rebuilds the parameter; :func:`pick` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._encoded import Encoded, is_encoded


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation on packed parameters.

    Args:
      name: what :meth:`explain` prints.
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

    def on(self, eqn: Any, operands: Sequence[Any], *, otherwise: Callable[..., Any]) -> list[Any]:
        """Runs where the program is compiled for a platform of this kernel, else ``otherwise``."""
        values = [getattr(x, "value", x) for x in operands]
        here = dict.fromkeys(self.platforms, lambda *a: tuple(self.run(eqn, a)))
        elsewhere = lambda *a: tuple(otherwise(eqn, a))  # noqa: E731
        return list(jax.lax.platform_dependent(*values, default=elsewhere, **here))


KERNELS: list[Kernel] = []


def pick(eqn: Any, operands: Sequence[Any]) -> tuple[Kernel | None, str]:
    """Chooses the kernel of an operation.

    Args:
      eqn: the equation.
      operands: arrays, and tracked values where it meets parameters.

    Returns:
      The first kernel that fits, or ``None`` and why none does.
    """
    name = eqn.primitive.name
    leaves = [x.value for x in operands if is_encoded(getattr(x, "value", None))]
    if len(leaves) != 1:
        return None, "the parameter is changed before it is used" if not leaves else "two leaves"
    [leaf] = leaves
    why = f"no kernel for {name} of {leaf.kind()}"
    for kernel in KERNELS:
        if kernel.operation == name and isinstance(leaf, kernel.leaf):
            reason = kernel.refuses(eqn, operands)
            if not reason:
                return kernel, ""
            why = f"{kernel.name}: {reason}"
    return None, why
