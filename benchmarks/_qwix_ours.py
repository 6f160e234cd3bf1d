"""Our side of the table of programs that Qwix is tried on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import quant

from ._qwix_rows import PROGRAMS

_REFUSED = {
    "a rule that matches nothing": ("encoder/.*", quant.Int(bits=8), "matches no parameter"),
    "a group size that does not divide": (".*kernel", quant.Int(bits=8, group=24), "not divide"),
    "a conv with a group size": (".*kernel", quant.Int(bits=8, group=5), "not divide"),
    "a NaN in a weight": (".*kernel", quant.Int(bits=8), "NaN"),
}


def outcomes() -> dict[str, str]:
    """Returns what is wrong with ours in each program, ``""`` if nothing is.

    Every weight has to be found by calibration, be stored in integers, and give in
    ``accelerate`` what the rebuilt parameters give; what Qwix should refuse, ours must.
    """
    return {
        name: _refuses(name, make) if name in _REFUSED else _quantizes(make)
        for name, make in PROGRAMS.items()
    }


def _program(make: Callable[[], Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    module, args = make()
    fn, params = jom.functional((module, module.init(jax.random.key(0), *args)))
    return fn, params, args


def _refuses(name: str, make: Callable[[], Any]) -> str:
    path, encoder, why = _REFUSED[name]
    _, params, _ = _program(make)
    try:
        jom.compress(params, [jom.Rule(path, encoder)])
    except ValueError as error:
        return "" if why in str(error) else f"raised something else: {error}"
    return "was not refused"


def _quantizes(make: Callable[[], Any]) -> str:
    fn, params, args = _program(make)
    stats = jom.calibrate(fn, params, [args])
    weights = [p for p in stats.keys() | stats.missing.keys() if not p.endswith("bias")]
    missed = [p for p in weights if p not in stats]
    if missed:
        return f"not found: {missed}"
    rules = [jom.Rule(p, quant.Int(bits=8)) for p in weights]
    small = jom.compress(params, rules, stats=stats)
    got, want = jom.accelerate(fn)(small, *args), fn(jom.materialize(small), *args)
    dense = fn(params, *args)
    if not np.allclose(got, want, rtol=1e-4, atol=1e-5):
        return "accelerate is not the rebuilt model"
    error = jnp.linalg.norm((got - dense).reshape(-1)) / jnp.linalg.norm(dense.reshape(-1))
    if not 0 < error < 0.02:
        return f"is off by {float(error):.1%}"
    bits = sum(p.storage_bits() for p in jax.tree.leaves(small, is_leaf=_is_leaf) if _is_leaf(p))
    whole = sum(math.prod(p.shape) for p in jax.tree.leaves(small, is_leaf=_is_leaf) if _is_leaf(p))
    return "" if bits < 12 * whole else f"stored in {bits / whole:.1f} bits a weight"


def _is_leaf(x: Any) -> bool:
    return isinstance(x, jom.Encoded)
