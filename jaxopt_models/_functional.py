"""From a model object to a pure function and its parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ._bits import is_concrete
from ._encoded import is_encoded

PyTree = Any

_FORMS = (
    "an nnx.Module, a bound linen module (module.bind(variables)), "
    "or a tuple (linen module, variables)"
)


def functional(
    model: Any, *, method: str = "__call__", mutable: bool = False
) -> tuple[Callable[..., Any], PyTree]:
    """Splits a model into a pure function `fn(params, *args, **kwargs)` and its parameters.

    The function can be jitted, differentiated, vmapped and given to everything in this
    library that takes an `fn`; the model is neither changed by it nor by later changes of the
    model. Arguments after `params` go to the method, for linen also `rngs=`.

    `params` is what the framework calls it: the `nnx.State` of the whole nnx module (batch
    statistics and random keys included), or linen's `variables`; where `"params"` is the only
    collection, its inside, so that paths are `ip1/kernel` in both frameworks.

    Random state inside an nnx module (`nnx.Dropout(rngs=...)`) is part of `params`: with
    `mutable=False` the same `params` give the same noise at every call. Under `jit` a call that
    writes to an nnx *weight* is not noticed, as `nnx.remat` and `nnx.jit` hand every weight back as
    a new array. Intermediates that the
    call sows, and Python attributes it sets on an nnx module, are dropped.

    Args:
      model: an `nnx.Module`, a bound linen module (`module.bind(variables)`), or a tuple
        `(linen module, variables)`.
      method: name of the method to call.
      mutable: whether `fn` returns `(out, new_params)`, where `new_params` has the structure of
        `params` and holds what the call changed: batch statistics, caches, random counters.

    Returns:
      `(fn, params)`.

    Raises:
      TypeError: if `model` has another form; from `fn`, if `params` are compressed.
      ValueError: if there is no such method, a linen module is bound with `rngs`, or its
        variables have no `"params"`; from `fn`, if the call changes anything but random state
        and `mutable` is false, or changes the structure of `params`.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> model = nn.Dense(3)
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> fn, params = functional((model, variables))
      >>> sorted(params)
      ['bias', 'kernel']
      >>> jax.jit(fn)(params, jnp.ones((2, 4))).shape
      (2, 3)
    """
    nnx = sys.modules.get("flax.nnx")
    linen = sys.modules.get("flax.linen")
    if nnx is not None and isinstance(model, nnx.Module):
        return _of_nnx(model, method, mutable)
    if linen is not None:
        if isinstance(model, linen.Module):
            return _of_linen(*_unbind(model), method, mutable)
        if (
            isinstance(model, tuple)
            and len(model) == 2
            and isinstance(model[0], linen.Module)
            and isinstance(model[1], Mapping)
        ):
            return _of_linen(*model, method, mutable)
    raise TypeError(f"functional: model is {_describe(model)}; give {_FORMS}.")


def _of_nnx(model: Any, method: str, mutable: bool) -> tuple[Callable[..., Any], PyTree]:
    from flax import nnx

    _check_method(model, type(model), method)
    graphdef, state = nnx.split(model)
    params = _detached(state)

    def rest(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights, and everything but these, random state and what was sown, by path."""
        _, _, weights, state = nnx.split(module, (nnx.RngState, nnx.Intermediate), nnx.Param, ...)
        return _by_path(weights), _by_path(state)

    def call(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        # Variables are boxes that the call writes into: it gets boxes of its own.
        module = nnx.merge(graphdef, _detached(params))
        before = rest(module)
        out = getattr(module, method)(*args, **kwargs)
        after = rest(module)
        if not mutable:
            changed = [
                p
                for old, new, state in zip(before, after, (False, True), strict=True)
                for p in {**old, **new}
                if _differs(old.get(p), new.get(p), traced=state)
            ]
            if changed:
                raise ValueError(_changed(name, changed))
            return out
        known = {path for path, _ in nnx.to_flat_state(params)}
        flat = nnx.to_flat_state(nnx.state(module))
        kept = nnx.from_flat_state(
            [(p, v) for p, v in flat if p in known or not isinstance(v, nnx.Intermediate)]
        )
        return out, _same_structure(name, params, _detached(kept))

    name = _name(type(model), method)
    return _finished(call, name, mutable), params


def _of_linen(
    module: Any, variables: Mapping[str, Any], method: str, mutable: bool
) -> tuple[Callable[..., Any], PyTree]:
    from flax.core import unfreeze
    from flax.errors import ModifyScopeVariableError

    _check_method(type(module), type(module), method)
    if variables and "params" not in variables:
        raise ValueError(
            f'functional: variables have no "params" but {sorted(variables)}; '
            "give what module.init returned, all collections."
        )
    variables = unfreeze(variables)  # Plain dicts, as apply returns them, and our own.
    only = set(variables) == {"params"}
    params = variables["params"] if only else variables

    def call(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        everything = {"params": params} if only else params
        if mutable:
            states = [collection for collection in everything if collection != "params"]
            out, new = module.apply(everything, *args, method=method, mutable=states, **kwargs)
            new = params if only else {**everything, **new}
            return out, _same_structure(name, params, new)
        try:
            return module.apply(everything, *args, method=method, **kwargs)
        except ModifyScopeVariableError as error:
            raise ValueError(_changed(name, [str(error).split(" (")[0]])) from error

    name = _name(type(module), method)
    return _finished(call, name, mutable), params


def _unbind(module: Any) -> tuple[Any, Mapping[str, Any]]:
    if module.scope is None:
        raise TypeError(
            f"functional: model is an unbound linen {type(module).__name__}; give {_FORMS}."
        )
    if module.scope.rngs:
        raise ValueError(
            f"functional: the linen {type(module).__name__} is bound with rngs "
            f"{sorted(module.scope.rngs)}, which would be the same at every call; "
            "bind it without and pass rngs= to fn."
        )
    return module.unbind()


def _finished(call: Callable[..., Any], name: str, mutable: bool) -> Callable[..., Any]:
    def fn(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_encoded)[0]:
            if is_encoded(leaf):
                raise TypeError(
                    f"{name}: parameter {_path(path)} is compressed ({leaf.kind()}), the model "
                    "needs arrays; call jaxopt_models.materialize(params) first."
                )
        return call(params, *args, **kwargs)

    fn.__name__ = fn.__qualname__ = name
    result = "(out, new_params)" if mutable else "out"
    fn.__doc__ = f"Computes `{name}(params, *args, **kwargs) -> {result}` without side effects."
    return fn


def _check_method(owner: Any, cls: type, method: str) -> None:
    if not callable(getattr(owner, method, None)):
        raise ValueError(f"functional: {cls.__name__} has no method {method!r}.")


def _name(cls: type, method: str) -> str:
    return cls.__name__ if method == "__call__" else f"{cls.__name__}_{method}"


def _changed(name: str, what: list[str]) -> str:
    return (
        f"{name}: the call changed state that would be lost: {', '.join(what)}. Pass mutable=True "
        "to functional, and fn returns (out, new_params); or call the model in evaluation mode."
    )


def _differs(old: Any, new: Any, *, traced: bool) -> bool:
    """Says whether a call changed an array; ``traced`` is the answer where only JAX will know.

    Transforms such as `nnx.remat` and `nnx.jit` hand every variable back as a new array, so
    arrays are compared, and traced weights are taken to be what they were.
    """
    if old is new:
        return False
    if old is None or new is None or not (is_concrete(old) and is_concrete(new)):
        return old is None or new is None or traced
    same = old.shape == new.shape and old.dtype == new.dtype
    return not (same and bool((old == new).all()))


def _same_structure(name: str, old: PyTree, new: PyTree) -> PyTree:
    if jax.tree.structure(old) != jax.tree.structure(new):
        differ = sorted(set(_by_path(old)) ^ set(_by_path(new)))
        raise ValueError(
            f"{name}: the call changed the structure of params at {differ}; "
            "initialise the model so that its state exists before functional."
        )
    return new


def _detached(tree: PyTree) -> PyTree:
    """The same arrays in new containers and boxes."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(model: Any) -> str:
    if isinstance(model, tuple):
        return f"a tuple of ({', '.join(type(part).__name__ for part in model)})"
    if isinstance(model, type):
        return f"the class {model.__name__} (not an instance)"
    return f"of type {type(model).__name__}"
