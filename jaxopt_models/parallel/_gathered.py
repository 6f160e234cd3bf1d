"""Parameters that are divided over devices, brought together where they are used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from .._axes import Axes
from .._call import check_function, finish, take_apart, trace
from .._compress import encode
from .._divided import full_spec, mesh_axes, moved, shard_shape, without
from .._encoded import Encoded, is_encoded, leaf, static
from .._encoder import Encoder
from .._paths import flatten
from .._recipe import Rule, decide
from .._tracked import Tracked, readers
from .._walk import Walk
from ._dense import dense_specs
from ._rules import on_auto, why_not


def gathered(
    fn: Callable[..., Any],
    rules: Any,
    *,
    mesh: Mesh,
    axis: str = "data",
    recipe: Sequence[Rule] = (),
) -> Callable[..., Any]:
    r"""Returns ``fn`` for parameters that are divided over a mesh axis, as :func:`fsdp` divides.

    A parameter is brought together just before each operation that uses it, layer by layer in a
    loop over stacked layers, and again in the backward pass: it is never kept whole. What travels
    is what is stored: of a compressed parameter its codes and scales, which are rebuilt after.
    Gradients come back divided as the parameters are. Nothing that is computed changes.

    With a ``recipe`` a *dense* parameter is encoded first, each device its part, and the codes
    travel instead of the floating numbers; the gradient passes straight through. This is
    ``fn(straight_through(recipe)(params), ...)``, with a quarter of the bytes at 8 bits. For
    rules that cut no group of the codes give :func:`fsdp` the shapes of the compressed tree,
    ``fsdp(jax.eval_shape(lambda p: compress(p, recipe), params), ...)``. Stacked layers come one
    by one where the rule says ``axes=Axes(stack=1)``, and else all at once, as they are encoded.

    Args:
      fn: function of `(params, ...)`.
      rules: how the parameters are divided, as for :func:`shardings`; other mesh axes in them
        (:func:`tensor`) stay divided.
      mesh: the devices, with Auto axes.
      axis: name of the mesh axis along which parameters are brought together.
      recipe: encoders by path for dense parameters, such as ``quant.Int(bits=8)``. They see no
        data and draw no numbers.

    Returns:
      A function of the same arguments, to be compiled with `jax.jit`.

    Raises:
      TypeError: if ``fn`` is no function or ``mesh`` none; when called, for rules that are none.
      ValueError: if ``axis`` is none of the mesh's, or its axes are not Auto; when called, if a
        parameter cannot be divided as the rules say, or the recipe names one that is compressed
        already.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> params = {"w": jnp.ones((2, 3))}
      >>> rules = parallel.fsdp(params, mesh=mesh, smallest=0)
      >>> run = parallel.gathered(lambda p, x: x @ p["w"], rules, mesh=mesh)
      >>> jax.jit(run)(params, jnp.ones((1, 2)))
      Array([[2., 2., 2.]], dtype=float32)

    References:
      Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
      <https://arxiv.org/abs/1910.02054>`_, 2020
      Wang et al., `ZeRO++: Extremely Efficient Collective Communication for Giant Model Training
      <https://arxiv.org/abs/2306.10209>`_, 2023
    """
    check_function(fn, "gathered")
    if axis not in on_auto(mesh, "gathered").shape:
        raise ValueError(f"gathered: axis={axis!r} is none of the mesh's {tuple(mesh.axis_names)}")

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        frame, arrays = take_apart(params, args, kwargs)
        return (kept if frame.hashable() else run)(frame, arrays)

    def run(frame: Any, arrays: list[Any]) -> Any:
        program = trace(fn, frame, arrays, who="gathered", every=True, reached=False)
        specs = dense_specs(frame.restore(arrays)[0], mesh, rules, who="gathered")
        spread = {}
        for d in decide(flatten(frame.restore(arrays)[0])[0], recipe, who="gathered"):
            spec = specs.get(d.parameter.path, PartitionSpec())
            there = axis in mesh_axes(spec) or d.encoder is not None
            if there and hasattr(d.parameter.value, "dtype"):
                spread[d.parameter.path] = _spread(d, spec, mesh, axis)
        operands = [
            Tracked(spread[x.origins[0].path], x.origins)
            if isinstance(x, Tracked) and x.origins[0].path in spread
            else x
            for x in program.operands
        ]
        out = Walk().run(program.jaxpr, program.consts, operands)
        # What comes back untouched was divided and still is.
        out = [
            Tracked(x.value.values, x.origins)
            if isinstance(x, Tracked) and isinstance(x.value, Spread)
            else x
            for x in out
        ]
        return finish(program, out)

    kept = jax.jit(run, static_argnums=0)
    return call


def _spread(d: Any, spec: PartitionSpec, mesh: Mesh, axis: str) -> Encoded:
    path, x = d.parameter.path, d.parameter.value
    spec = PartitionSpec(*full_spec(spec, len(x.shape)))
    encoder, axes = d.encoder, None
    if encoder is not None:
        if is_encoded(x):
            raise ValueError(f"gathered: the recipe names {path}, which is a {x.kind()} already")
        axes = (d.rule.axes or Axes()).resolve(len(x.shape))
    stored = x
    if encoder is not None:
        stored = jax.eval_shape(lambda w: encode(d, stats=None, key=None, who="gathered"), x)
    if why := why_not(stored, spec, dict(mesh.shape)):
        raise ValueError(
            f"gathered: {path} cannot be divided by {spec}: {why}; take the rules from "
            "fsdp of the compressed tree (shapes are enough)"
        )
    return _inside(x, tuple(spec), mesh, axis, encoder, axes)


def _inside(
    x: Any, spec: tuple[Any, ...], mesh: Mesh, axis: str, encoder: Any, axes: Axes | None
) -> Encoded:
    """Puts what gathers inside of what has a say in products."""
    if is_encoded(x) and readers(x):
        return dataclasses.replace(x, values=_inside(x.values, spec, mesh, axis, encoder, axes))
    # Loops take away only what is encoded apart: layers that are encoded as one come as one.
    core = tuple(x.core) if is_encoded(x) else tuple(x.shape[1 if axes is None else axes.stack :])
    return Spread(x, core=core, spec=spec, mesh=mesh, axis=axis, encoder=encoder, axes=axes)


@leaf
class Spread(Encoded):
    """A parameter that is divided over devices, and whole where it is rebuilt.

    Args:
      values: what is stored, an array or a leaf.
      core: shape of it without the stack; of an array that is not encoded the first axis may be
        one.
      spec: its partition, an entry for each axis there was; a loop takes the first ones away.
      mesh: the devices.
      axis: the mesh axis along which it is brought together.
      encoder: what it is encoded by before it travels, or ``None``.
      axes: roles of its axes for the encoder.
    """

    values: Any
    core: tuple[int, ...] = static()
    spec: tuple[Any, ...] = static()
    mesh: Mesh = static()
    axis: str = static()
    encoder: Encoder | None = static(default=None)
    axes: Axes | None = static(default=None)

    @property
    def dtype(self) -> Any:
        """That of the tensor."""
        return self.values.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes."""
        shape = tuple(self.values.shape)
        return shape[: max(0, len(shape) - len(self.core))]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.values.shape)

    def rebuild(self) -> jax.Array:
        """Brings it together and rebuilds it."""
        return self.materialize()

    def materialize(self) -> jax.Array:
        """Brings it together and rebuilds it, stack and all."""
        if self.encoder is None:
            return _dense(self._moved(self.values))
        encoder, axes = self.encoder, self.axes
        assert axes is not None and axes.out is not None
        stack = axes.stack - (len(self.spec) - len(self.shape))
        # An encoder is given the axes of all it encodes, counted with the stack that is left.
        axes = Axes(tuple(stack + a for a in axes.out), stack)

        @jax.custom_jvp
        def shown(w: jax.Array) -> jax.Array:
            return _dense(self._moved(encoder(w, axes=axes)))

        @shown.defjvp
        def _(w: Any, step: Any) -> Any:
            return shown(*w), self._moved(step[0])

        return shown(self.values)

    def _moved(self, x: Any) -> Any:
        """Pins the parts as they are divided, then as they are used."""
        spec = PartitionSpec(*self.spec[len(self.spec) - len(x.shape) :])
        left = PartitionSpec(*(without(entry, (self.axis,)) for entry in spec))
        here = _specs_of_parts(x, spec, self.mesh), _specs_of_parts(x, left, self.mesh)
        return jax.tree.map(lambda part, *specs: moved(part, self.mesh, *specs), x, *here)


def _specs_of_parts(x: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    """Returns a partition for each part."""
    if not is_encoded(x):
        return spec
    found = x.specs(spec, shard_shape(x.shape, spec, mesh.shape)) if mesh_axes(spec) else None
    return jax.tree.map(lambda _: PartitionSpec(), x) if found is None else found


def _dense(x: Any) -> jax.Array:
    return x.materialize() if is_encoded(x) else x
