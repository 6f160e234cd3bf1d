"""The one place where an operation, a type of leaf and a platform meet.

A kernel computes an operation on a parameter as it is stored. :func:`pick` chooses it by operation
and leaf, or says why there is none; the platform is known when the program is compiled, and on
others the walk rebuilds the parameter. A parameter that is only transposed or cast before it is
used still meets its kernel (:class:`View`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._encoded import Encoded, innermost, is_encoded
from ._epilogue import Tail
from ._jaxpr import context_of
from ._products import Product, product_of
from ._roles import Roles, roles
from ._tracked import Deferred, Tracked, is_tracked, origins_of, packed, readers, values_of


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf as an operation sees it.

    Args:
      leaf: the parameter.
      order: which axis of the leaf each axis of the operand is.
    """

    leaf: Encoded
    order: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> View | None:
        """Returns the leaf behind transposes and casts between floats, or ``None``."""
        if is_encoded(value):
            return cls(value, tuple(range(value.ndim)))
        if not isinstance(value, Deferred) or len(value.operands) != 1:
            return None
        seen, step = cls.of(value.operands[0]), value.step
        if seen is None:
            return None
        if step.name == "transpose":
            return cls(seen.leaf, tuple(seen.order[a] for a in step.params["permutation"]))
        floats = step.name == "convert_element_type" and jnp.issubdtype(
            step.params["new_dtype"], jnp.floating
        )
        return seen if floats or step.name == "copy" else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation on packed parameters.

    Args:
      name: its name in tables.
      operation: primitive, such as ``"dot_general"``.
      leaf: type of the parameter.
      platforms: where it runs: ``"cpu"``, ``"cuda"``, ``"tpu"``; none for everywhere.
      run: from the equation and its operands (arrays, and the leaf or what waits on it) to its
        outputs.
      refuses: from the same to the reason why it does not fit, or ``""``.
      follows: from the same and the shape of a bias (``None`` for none) to whether it computes an
        epilogue, too; ``run`` then takes it as ``tail``.
      path: returns what else it hangs on that is fixed once it is traced.
      quiet: whether another kernel of its platforms says why a parameter does not fit.
    """

    name: str
    operation: str
    leaf: type[Encoded]
    platforms: tuple[str, ...]
    run: Callable[..., list[Any]]
    refuses: Callable[[Any, Sequence[Any]], str] = lambda eqn, operands: ""
    follows: Callable[[Any, Sequence[Any], Any], bool] = lambda eqn, operands, bias: False
    path: Callable[[], str] = lambda: ""
    quiet: bool = False

    @property
    def label(self) -> str:
        """The name and where it runs; which of these it is, the compiler decides."""
        return f"{self.name} on {', '.join(self.platforms)}" if self.platforms else self.name


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernels of a use of a parameter.

    Args:
      kernels: one for each platform that has one, in the order of :data:`KERNELS`.
    """

    kernels: tuple[Kernel, ...]

    @property
    def label(self) -> str:
        """The names and where they run."""
        return ", ".join(k.label for k in self.kernels)

    def follows(self, eqn: Any, values: Sequence[Any], bias: tuple[int, ...] | None) -> bool:
        """Says whether one of them computes an epilogue with a bias of some shape, too."""
        return any(k.follows(eqn, values, bias) for k in self.kernels)

    def on(self, platform: str) -> Kernel | None:
        """Returns the one that runs on a platform."""
        return next((k for k in self.kernels if not k.platforms or platform in k.platforms), None)

    def run(
        self,
        eqn: Any,
        operands: Sequence[Any],
        *,
        otherwise: Callable[..., Any],
        looping: bool,
        tail: Tail | None = None,
    ) -> list[Any]:
        """Runs the kernel of the platform that the program is compiled for, else ``otherwise``.

        Args:
          eqn: the equation.
          operands: as for :func:`pick`.
          otherwise: from the equation, its operands and ``looping`` to its outputs.
          looping: whether this is in a loop, where nothing is merged across iterations.
          tail: what follows the operation, which a kernel may compute, too.

        Returns:
          The outputs.
        """
        if all(not k.platforms for k in self.kernels):
            return list(self.kernels[0].run(eqn, values_of(operands)))

        def use(operands: Sequence[Any]) -> Callable[..., Any]:
            def finished(found: Sequence[Any], bias: Any) -> tuple[Any, ...]:
                return tuple(found if tail is None else map(tail.having(bias), found))

            def elsewhere(bias: Any, *values: Any) -> tuple[Any, ...]:
                pairs = zip(operands, values, strict=True)
                again = [dataclasses.replace(x, value=v) if is_tracked(x) else v for x, v in pairs]
                return finished(otherwise(eqn, again, looping), bias)

            def by(kernel: Kernel) -> Callable[..., tuple[Any, ...]]:
                def run(bias: Any, *values: Any) -> tuple[Any, ...]:
                    shape = None if bias is None else bias.shape
                    if tail is None or not kernel.follows(eqn, values, shape):
                        return finished(kernel.run(eqn, values), bias)
                    return tuple(kernel.run(eqn, values, tail=tail.having(bias)))

                return run

            here = {p: by(k) for k in self.kernels for p in k.platforms}
            default = next((by(k) for k in self.kernels if not k.platforms), elsewhere)

            # Each branch would keep for the gradient what any of them needs.
            @functools.partial(jax.checkpoint, prevent_cse=not looping)
            def either(*values: Any) -> tuple[Any, ...]:
                return jax.lax.platform_dependent(*values, default=default, **here)

            return either

        values, bias = values_of(operands), None if tail is None else tail.bias
        if any(map(readers, values)):  # what rounds an input is told where it came from
            return list(use(operands)(bias, *values))
        # What is kept holds no array.
        alone = [Tracked(None) if packed(v) else None for v in values]
        tail = None if tail is None else tail.having(None)
        activation = None if tail is None else tail.activation
        paths = tuple(k.path() for k in self.kernels)
        key = self, paths, otherwise, looping, activation, _key(eqn, values)
        return list(_kept(_Use(key, lambda: use(alone)))(bias, *values))


@dataclasses.dataclass(frozen=True)
class _Use:
    """A use of a parameter; equal ones are traced once, under the name scope of the first."""

    key: Any
    make: Callable[[], Callable[..., Any]] = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=512)
def _kept(use: _Use) -> Callable[..., Any]:
    return jax.jit(use.make())


def _key(eqn: Any, values: Sequence[Any]) -> Any:
    """Returns what tells an equation on such operands from others."""
    known = (eqn.primitive, tuple(sorted(eqn.params.items())), context_of(eqn))
    avals = tuple(v.aval for v in (*eqn.invars, *eqn.outvars))
    try:
        hash(known)
    except TypeError:
        known = id(eqn)
    return known, avals, tuple(jax.tree.structure(v) for v in values)


KERNELS: list[Kernel] = []


def pick(eqn: Any, operands: Sequence[Any]) -> tuple[Choice | None, str]:
    """Chooses the kernels of an operation.

    Args:
      eqn: the equation.
      operands: arrays, and tracked values where it meets parameters.

    Returns:
      For each platform the first kernel that fits, or ``None`` without any; and why those before
      the first of these do not, and those for this type of leaf.
    """
    name, values = eqn.primitive.name, values_of(operands)
    waiting = [i for i, x in enumerate(values) if packed(x)]
    if len(waiting) > 1:
        return None, "two compressed parameters meet"
    [position] = waiting
    seen = View.of(values[position])
    if seen is None:
        step = values[position].step.name
        return None, f"the parameter goes through {step} before it is used"
    leaf = seen.leaf
    found: dict[tuple[str, ...], Kernel] = {}
    why: dict[tuple[str, ...], str] = {}
    own: dict[tuple[str, ...], str] = {}
    for kernel in KERNELS:
        where = kernel.platforms
        if kernel.operation != name or not isinstance(leaf, kernel.leaf) or where in found:
            continue
        reason = kernel.refuses(eqn, values) or _divided(eqn, operands, position)
        if not reason:
            found[where] = kernel
        elif kernel.leaf is not Encoded:  # a kernel for this very type knows best
            own[where] = f"{kernel.name}: {reason}"
        elif where and "cpu" not in where and innermost(leaf).laid_out:
            continue  # for a CPU, as whoever packed it knows
        elif not found and not kernel.quiet:
            why[where] = f"{kernel.name}: {reason}"
    known = "; ".join({**why, **own}.values())
    if not found:
        return None, known or f"no kernel for {name} of {leaf.kind()}"
    return Choice(tuple(found.values())), known


def names_for(leaf: Encoded) -> list[str]:
    """Returns the kernels that multiply with a leaf that is laid out, as far as it alone says."""
    own = [k for k in KERNELS if k.leaf is not Encoded and isinstance(leaf, k.leaf)]
    operations = {"dot_general"} | ({"conv_general_dilated"} if leaf.ndim in (3, 4) else set())
    found = own or [k for k in KERNELS if k.leaf is Encoded and "cpu" in k.platforms]
    return [k.name for k in found if k.operation in operations and not k.quiet]


def _divided(eqn: Any, operands: Sequence[Any], position: int) -> str:
    """Says that an input is rounded over several devices, which no kernel does."""
    if not readers(operands[position]):
        return ""
    product = product_of(eqn, position)
    if not isinstance(product, Product) or product.lookup:
        return ""
    for o in origins_of(operands[position]):
        found = roles(o, product)
        if isinstance(found, Roles) and found.gathered:
            return "its input is divided over devices"
    return ""
