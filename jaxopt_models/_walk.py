"""Runs the program of a function with parameters that are followed, compressed or not.

A function is traced to a jaxpr on the dense shapes, and the jaxpr is interpreted with a
:class:`Tracked` value wherever a value hangs on parameters only. A tracked value knows how to
rebuild itself and by which way it came from which parameter (its origins). An equation without
a tracked operand is bound as it is. One with such an operand is handled by the rule of its
primitive:

* layout, type and entrywise arithmetic of parameters are deferred: the way gets longer, nothing
  is computed (:func:`deferred`);
* ``jit`` is entered; ``scan``, ``while``, ``cond``, ``remat`` and ``shard_map`` are wrapped again
  through JAX's public functions with leaves as pytree arguments, so that loops stay loops and
  ``remat`` saves what it saves;
* everything else goes to :meth:`Walk.use`, the one place where an operation meets a parameter.
  There operands are rebuilt just in time, inside `jax.checkpoint`, so that no rebuilt weight is
  kept for the backward pass. Custom derivative rules are used like this, never entered, or their
  gradient would be that of their body.

Kinds of walk are subclasses that override :meth:`Walk.use`. One that collects values (statistics,
taps) sets ``collects`` and calls :meth:`Walk.emit`; the rules carry what was emitted out of loops
and branches.

**How a rule is added.** A rule takes the walk, the equation and its operands, and returns the
outputs of the equation. Say that ``cumsum`` of a parameter along an axis should be deferred like a
change of layout, as it hangs on the parameter alone: that needs no more than

>>> from jaxopt_models._walk import Walk, deferred
>>> class Summing(Walk):
...     rules = {**Walk.rules, "cumsum": deferred}

(statistics of such a parameter are then listed as missing, until :func:`_roles.pull` says what the
step does to axes). A rule for a primitive with a body runs ``walk.body(...)``; see
``_bodies.remat``, the shortest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from . import _bodies
from ._bits import dtype_bits
from ._deferred import ARITHMETIC, ENTRYWISE, LAYOUT, deferred, dynamic_slice, several, stacked
from ._epilogue import Epilogue, Epilogues, Tail
from ._jaxpr import bind, interpret, is_literal
from ._kernels import pick
from ._products import Product, multiply_adds, product_of
from ._roles import Roles, roles
from ._tracked import (
    Origin,
    Tracked,
    dense,
    is_fixed,
    is_tracked,
    origins_of,
    packed,
    readers,
    values_of,
)

# ------------------------------------------------------------------ the interpreter


@dataclasses.dataclass
class Walk:
    """Interprets jaxprs.

    Args:
      around: the equations whose bodies are being run, outermost first.
      side: what was emitted, by name, as :class:`Emitted`.
    """

    around: tuple[Any, ...] = ()
    side: dict[str, Any] = dataclasses.field(default_factory=dict)

    collects: ClassVar[bool] = False
    kernels: ClassVar[bool] = True
    #: Whether a kernel may compute what follows a product, too, whose equations are then not met.
    fuses: ClassVar[bool] = False

    @property
    def loops(self) -> list[Any]:
        """The loops around, outermost first."""
        return [e for e in self.around if e.primitive.name in ("scan", "while")]

    @property
    def times(self) -> int:
        """How often this is run, a ``while`` loop counted as one iteration."""
        return math.prod(e.params.get("length", 1) or 1 for e in self.loops)

    def trail(self, eqn: Any) -> tuple[int, ...]:
        """Returns what tells an equation from all others, in whichever call of its body."""
        return tuple(id(e) for e in (*self.around, eqn))

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a jaxpr; an output that is an untouched leaf stays one."""
        # Constants hang on no data: arithmetic of a parameter with one is still deferred.
        epilogues = Epilogues(jaxpr)

        def follow(eqn: Any, operands: list[Any]) -> Epilogue | None:
            return self._follow(epilogues, eqn, operands) if self.fuses else None

        return interpret(jaxpr, list(map(Tracked, consts)), args, self._apply, follow=follow)

    def _follow(self, epilogues: Epilogues, eqn: Any, operands: list[Any]) -> Epilogue | None:
        """Returns what follows an equation, if a kernel computes it with it."""
        if not multiply_adds(eqn) or not any(packed(x) for x in operands if is_tracked(x)):
            return None
        if is_fixed(eqn, operands):  # what comes of it is still followed
            return None
        found = epilogues.of(eqn)
        choice = None if found is None else pick(eqn, operands)[0]
        if choice is None:
            return None
        shape = None if found.bias is None else found.bias.aval.shape
        return found if choice.follows(eqn, values_of(operands), shape) else None

    def _apply(
        self,
        eqn: Any,
        operands: list[Any],
        epilogue: Epilogue | None = None,
        bias: Any = None,
    ) -> list[Any]:
        if epilogue is not None:
            return self.use_all(eqn, operands, epilogue, bias)
        if any(map(is_tracked, operands)) or self.wants(eqn):
            rule = self.rules.get(eqn.primitive.name, type(self).meet)
            found = rule(self, eqn, operands)
        else:
            found = bind(eqn, operands)
            if all(map(is_literal, eqn.invars)):  # as iota: a constant, too
                found = [Tracked(x) for x in found]
        self.after(eqn, found)
        return found

    def wants(self, eqn: Any) -> bool:
        """Says whether an equation without a tracked operand has to go by its rule."""
        return False

    def lose(self, x: Any, why: str) -> None:
        """Is told that a parameter goes where it is not followed, or is rebuilt whole."""
        if readers(x.value):
            raise ValueError(
                f"{', '.join(o.path for o in x.origins)}: its input could not be rounded, as "
                f"{why}; leave quant.Input off it, or change the program (a stack that a loop "
                "slices needs jaxopt_models.Axes(stack=1))"
            )

    def after(self, eqn: Any, found: list[Any]) -> None:
        """Is told the outputs of every equation."""

    def meet(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """Applies an operation to parameters; what hangs on nothing else stays tracked."""
        found = self.use(eqn, operands)
        if not is_fixed(eqn, operands):
            return found
        if not _is_norm_or_product(eqn):
            for x in filter(origins_of, operands):
                self.lose(x, f"it goes through {eqn.primitive.name} before it is used")
        return [Tracked(x) for x in found]

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """An operation meets a parameter: runs a kernel, or rebuilds it just in time."""
        if eqn.effects or not any(packed(x) for x in operands if is_tracked(x)):
            return bind(eqn, [dense(x) for x in operands])
        choice = pick(eqn, operands)[0] if self.kernels else None
        looping = bool(self.loops)
        if choice is not None:
            return choice.run(eqn, operands, otherwise=_rebuilt, looping=looping)
        return _rebuilt(eqn, operands, looping)

    def use_all(
        self, eqn: Any, operands: Sequence[Any], epilogue: Epilogue, bias: Any
    ) -> list[Any]:
        """An operation meets a parameter, and a kernel computes what follows, too."""
        choice = pick(eqn, operands)[0]
        assert choice is not None
        tail = Tail(None if bias is None else dense(bias), epilogue.activation)
        looping = bool(self.loops)
        return choice.run(eqn, operands, otherwise=_rebuilt, looping=looping, tail=tail)

    def body(self, eqn: Any, jaxpr: Any, consts: Sequence[Any]) -> Callable[..., Any]:
        """Returns a body as a function of its operands to arrays, and what it emits."""

        def run(*args: Any) -> tuple[list[Any], dict[str, Any]]:
            child = dataclasses.replace(self, around=(*self.around, eqn), side={})
            out = child.run(jaxpr, consts, args)
            for v, x in zip(jaxpr.outvars, out, strict=True):
                if origins_of(x) and v not in jaxpr.invars:
                    self.lose(x, f"it is returned by a {eqn.primitive.name}")
            return [dense(x) for x in out], child.side

        return run

    def emit(self, name: str, value: Any, loops: tuple[int, ...] = ()) -> None:
        """Puts a value beside the outputs of the program, merged with an earlier one."""
        new = Emitted(value, tuple(loops))
        self.side[name] = self.merge(self.side[name], new) if name in self.side else new

    def emit_all(self, side: dict[str, Any]) -> None:
        """Passes on what a body emitted."""
        for name, e in side.items():
            self.emit(name, e.value, e.loops)

    def zero(self, e: Any) -> Any:
        """Returns what a branch that is not taken emits in the shapes of ``e``."""
        raise NotImplementedError

    def merge(self, a: Any, b: Any) -> Any:
        """Merges two values emitted under one name."""
        raise NotImplementedError

    def over_mesh(self, name: str, e: Any, axes: tuple[str, ...], typed: bool) -> Any:
        """Makes one of what the devices of a mesh emitted; its partition is ``mesh_spec``.

        ``typed`` says whether JAX knows along which axes a value varies.
        """
        raise NotImplementedError

    def mesh_spec(self, axes: tuple[str, ...]) -> Any:
        """Returns the partition of what :meth:`over_mesh` returns."""
        return PartitionSpec()

    rules: ClassVar[dict[str, Callable[..., list[Any]]]] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """A value beside the outputs.

    Args:
      value: arrays.
      loops: depths of the loops whose iterations it keeps apart, along a leading axis each.
    """

    value: Any
    loops: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def _rebuilt(eqn: Any, operands: Sequence[Any], looping: bool) -> list[Any]:
    """Rebuilds the operands of an equation and binds it, keeping none for the gradient."""

    # In a loop nothing is merged across iterations, and `checkpoint` need not prevent it.
    @functools.partial(jax.checkpoint, prevent_cse=not looping)
    def rebuilt(values: list[Any]) -> list[Any]:
        ordered = values if looping else _in_order(values)
        return _multiplied(eqn, operands, ordered)

    return rebuilt(values_of(operands))


def _multiplied(eqn: Any, operands: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Rebuilds values and binds an equation; a leaf may have a say in input and product."""
    arrays, leaf = [dense(x) for x in values], None
    for i, x in enumerate(values):
        product = product_of(eqn, i) if packed(x) and readers(x) else ""
        if isinstance(product, Product) and not (product.lookup or origins_of(operands[1 - i])):
            leaf, paths, over = _reader(readers(x), operands[i].origins, product)
            other = arrays[1 - i]
            try:
                arrays[1 - i] = leaf.read(other, product.row, over)
            except ValueError as e:
                raise ValueError(f"{paths}: {e}") from e
            break  # the other operand is no parameter
    found = bind(eqn, arrays)
    return found if leaf is None else [leaf.result(found[0], other, product, over)]


def _reader(
    leaves: list[Any], origins: Sequence[Origin], product: Product
) -> tuple[Any, str, tuple[str, ...]]:
    """Returns the leaf that reads an input, its paths, and the mesh axes that divide a sample."""
    paths = ", ".join(o.path for o in origins)
    leaf, *others = leaves
    if any(_spec(leaf) != _spec(o) for o in others):
        raise ValueError(
            f"{paths} meet one input and round it in different ways; give them one quant.Input"
        )
    found = [roles(o, product) for o in origins]
    over = [n for r in found if isinstance(r, Roles) for _, names in r.gathered for n in names]
    for o, r in zip(origins, found, strict=True):
        if o.lost and isinstance(r, str):
            raise ValueError(f"{o.path}: its input could not be rounded, as {r}")
    return leaf, paths, tuple(dict.fromkeys(over))


def _spec(leaf: Any) -> Any:
    return type(leaf), [getattr(leaf, n) for n in type(leaf).static_names if n != "core"]


def _is_norm_or_product(eqn: Any) -> bool:
    """Says whether what comes of a parameter is a number of it, or a factor of its own."""
    return eqn.primitive.name.startswith(("reduce_", "arg")) or bool(multiply_adds(eqn))


# ------------------------------------------------------------------ order of rebuilding
# Nothing in an unrolled model says when a weight is rebuilt, and the scheduler of XLA on a CPU
# rebuilds all of them first. So each rebuild is made to wait for the other operand. Up to JAX
# 0.11 XLA drops barriers on a CPU; there the codes get a zero added that only the data knows, on
# a mesh each device its own, since any one entry of an array would have to be sent to all others.

_BARRIERS_HOLD = jax.__version_info__ >= (0, 12)


def _in_order(operands: list[Any]) -> Sequence[Any]:
    partners = [x for x in operands if not packed(x) and _can_order(x)]
    if not partners:
        return operands
    if _BARRIERS_HOLD:
        return jax.lax.optimization_barrier(tuple(operands))

    late = [x for x in operands if packed(x)]
    if jax.sharding.get_abstract_mesh().manual_axes:  # each device has its own array already
        late = _waiting(late, partners[0], _first_as_zero)
    else:
        zero = functools.partial(_waiting, zero=_zero)
        late = jax.lax.platform_dependent(late, partners[0], cpu=zero, default=_barred)
    new = iter(late)
    return [next(new) if packed(x) else x for x in operands]


def _waiting(late: list[Any], partner: jax.Array, zero: Callable[..., jax.Array]) -> list[Any]:
    nothing = zero(jax.lax.stop_gradient(partner))
    return jax.tree.map(lambda a: _wait(a, nothing), late)


def _barred(late: list[Any], partner: jax.Array) -> list[Any]:
    return jax.lax.optimization_barrier((late, partner))[0]


def _can_order(x: Any) -> bool:
    # An entry of an array that is divided over Explicit mesh axes cannot be sliced out of it.
    divided = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.size(x) > 0 and not divided


def _first_as_zero(x: jax.Array) -> jax.Array:
    first = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)
    return (jax.lax.bitcast_convert_type(first, jnp.uint32) >> 31) >> 1


def _of_each_device(mesh: Any, shapes: Any, result: Any) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    return mesh, _first_as_zero, whole, (shapes[0].sharding,)


_own = custom_partitioning(_first_as_zero)
_own.def_partition(partition=_of_each_device, sharding_rule="... ->")


@jax.custom_batching.custom_vmap
def _zero(x: jax.Array) -> jax.Array:
    return _own(x)


@_zero.def_vmap
def _zero_of_a_batch(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    # One zero for the whole batch, or the weight would be rebuilt for each of its elements.
    return _zero(x), False


def _wait(part: jax.Array, zero: jax.Array) -> jax.Array:
    if not jnp.issubdtype(part.dtype, jnp.integer):
        return part
    # A TPU adds nothing that has 2 bits.
    wide = part.astype(jnp.int8) if dtype_bits(part.dtype) < 4 else part
    return (wide + zero.astype(wide.dtype)).astype(part.dtype)


# ------------------------------------------------------------------ which rule

Walk.rules = {
    **dict.fromkeys(ENTRYWISE | ARITHMETIC | LAYOUT, deferred),
    **dict.fromkeys(("split", "unstack"), several),
    "stack": stacked,
    "dynamic_slice": dynamic_slice,
    **dict.fromkeys(("jit", "closed_call"), _bodies.enter),
    "remat2": _bodies.remat,
    "custom_jvp_call": _bodies.custom,
    "scan": _bodies.scan,
    "while": _bodies.while_loop,
    "cond": _bodies.cond,
    "shard_map": _bodies.shard_map,
}
# Where nothing is differentiated, bodies with derivative rules of their own may be entered.
ENTERING: dict[str, Callable[..., list[Any]]] = {
    **Walk.rules,
    **dict.fromkeys(("custom_vjp_call", "custom_jvp_call"), _bodies.enter),
}
