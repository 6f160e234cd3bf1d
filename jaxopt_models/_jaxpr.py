"""What the walk reads of jaxprs: the only place that leans on what JAX keeps private.

JAX 0.12 made `Jaxpr` hold its constants and gave `scan` the counts of its operands in another
form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex


def inner(params: dict[str, Any], *names: str) -> tuple[Any, Sequence[Any]]:
    """Returns the jaxpr of a primitive with a body, and its constants."""
    jaxpr = next(params[n] for n in names or ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def bodies(eqn: Any) -> list[Any]:
    """Returns every jaxpr inside an equation."""
    return [getattr(one, "jaxpr", one) for one in _inside(eqn)]


def _inside(eqn: Any) -> list[Any]:
    """Returns the same, those that have constants with them."""
    found = []
    for value in eqn.params.values():
        found += value if isinstance(value, (tuple, list)) else [value]
    return [x for x in found if hasattr(getattr(x, "jaxpr", x), "eqns")]


def constants(closed: Any) -> list[Any]:
    """Returns the values that a jaxpr and all inside it hold, arrays in closures for instance."""
    found, todo = [], [closed]
    while todo:
        one = todo.pop()
        found += getattr(one, "consts", ())
        jaxpr = getattr(one, "jaxpr", one)
        for eqn in jaxpr.eqns:
            found += [v.val for v in eqn.invars if is_literal(v) and jnp.shape(v.val)]
            todo += _inside(eqn)
    return found


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan are constants and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Applies the primitive of an equation to dense operands."""
    found = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = ([], found) if isinstance(found, dict) else found
    if eqn.primitive.name == "pvary":
        # A rebuilt weight varies already where it was made to wait for its input.
        params = {**params, "axes": tuple(set(params["axes"]) - varying(operands[0]))}
        if not params["axes"]:
            return list(operands)
    with eqn.ctx.manager, jax.named_scope(scope_of(eqn)):
        out = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


#: Primitives that only call what is inside them.
CALLS = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")


def interpret(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    apply: Callable[..., Sequence[Any]],
    *,
    number: Callable[[Any], Any] = lambda x: x,
    follow: Callable[[Any, list[Any]], Any] = lambda eqn, operands: None,
) -> list[Any]:
    """Runs the equations of a jaxpr in order.

    Args:
      jaxpr: the program.
      consts: what its constants are.
      args: what it is applied to.
      apply: from an equation and its operands to its outputs; of one that was put off, with what
        it was put off for and the operand that this adds to.
      number: from a number written into an equation to the operand that it is.
      follow: from an equation and its operands to the equations that are computed with it, an
        :class:`jaxopt_models._epilogue.Epilogue`, or ``None``; it is then put off to their last.

    Returns:
      The outputs.
    """
    env: dict[Any, Any] = {}

    def read(v: Any) -> Any:
        return number(v.val) if is_literal(v) else env[v]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    late: dict[int, Any] = {}
    passed: set[int] = set()
    for eqn in jaxpr.eqns:
        if id(eqn) in late:
            product, operands, epilogue = late[id(eqn)]
            bias = None if epilogue.bias is None else read(epilogue.bias)
            found = apply(product, operands, epilogue, bias)
        elif id(eqn) in passed:
            continue
        else:
            operands = [read(v) for v in eqn.invars]
            epilogue = follow(eqn, operands)
            # Of two products that are added up only one is put off, and adds to the other.
            if epilogue is not None and passed.isdisjoint(map(id, epilogue.equations)):
                late[id(epilogue.equations[-1])] = eqn, operands, epilogue
                passed.update(map(id, epilogue.equations))
                continue
            found = apply(eqn, operands)
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def context_of(eqn: Any) -> str:
    """Returns what says where and how an equation is computed, beside its parameters."""
    named = ("compute_type", "xla_metadata")
    return repr([getattr(eqn.ctx, name, None) for name in named])


def scope_of(*eqns: Any) -> str:
    """Returns the name scope of the last equation, inside the bodies of those before it."""
    return "/".join(s for s in (str(e.source_info.name_stack) for e in eqns) if s)


def is_literal(v: Any) -> bool:
    """Says whether an operand of an equation is a number written into it."""
    return isinstance(v, jex.Literal)


def varying(x: Any) -> frozenset[str]:
    """Returns the mesh axes along which JAX knows an array to vary inside ``shard_map``."""
    return jax.typeof(x).manual_axis_type.varying


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """Returns a jaxpr as a function of its flat operands."""
    return jex.jaxpr_as_fun(closed)
