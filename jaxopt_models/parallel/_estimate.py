"""What a program needs on each device, and how long it takes there, before there is a device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .._accelerate import accelerate
from .._call import check_function, take_apart
from .._encoded import is_encoded
from .._jaxpr import bodies
from .._products import multiply_adds
from ._layout import Layout, as_stored, place_inputs, place_params, shard_bytes
from ._plan import Estimate, Plan
from ._program import Collective, as_module, collectives, messages
from ._topology import Chip, Topology, of_mesh, topology
from ._work import work


def estimate(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    on: str | Topology | Mesh,
    layouts: Layout | Sequence[Layout] | None = None,
    others: Mapping[str, Any] | None = None,
    chip: Chip | str | None = None,
    donate: bool = False,
) -> Plan:
    r"""Compiles a function for devices that need not be there, and says what each would do.

    Nothing is run, and shapes are enough for ``params`` and ``args``. Of each layout, and of each
    tree of parameters, it counts in the compiled program the operations :math:`O_t` of products on
    operands of type `t` (six times where the precision ``"highest"`` was asked for), the bytes `M`
    of memory that are read and written, and the collectives. A step then takes

    .. math:: \max\Big(\sum_t \frac{O_t}{P_t}, \frac{M}{W}\Big)
       + \sum_{c} \Big(\frac{r_c B_c}{R} + h_c\, \ell\Big)

    with the chip's operations `P` and bytes of memory `W` a second, and for each collective of
    `B` bytes the share :math:`r_c` that a device of a ring sends (see :func:`collectives`), the
    bytes `R` that it sends in a second, the number :math:`h_c` of messages that follow each other,
    and the time :math:`\ell` of one. Exchange is not overlapped with anything, so a real program
    may be faster; it may be slower, as no program reaches what a chip is sold for. The figures
    `P`, `W`, `R`, :math:`\ell` of the chips are those of :func:`chips`.

    Args:
      fn: function of `(params, *args)`; compressed parameters go through
        :func:`jaxopt_models.accelerate`.
      params: its parameters, compressed or not, or their shapes: ``jax.eval_shape`` of
        :func:`jaxopt_models.compress` makes those of a compressed tree without any memory.
      *args: the other arguments, or their shapes; numbers, strings and flags are part of the
        program.
      on: name of a :func:`topology`, such as ``"v5e:4x4"`` or ``"h100:8"``, or one, or a mesh of
        devices that are there.
      layouts: how all is divided; a list of them to compare. ``None``: the first axis of every
        argument over the first axis of the mesh, parameters on every device.
      others: further trees of parameters by name, to compare.
      chip: what to reckon with for a mesh: a :class:`Chip`, or ``"v5e"`` or ``"h100"``; default:
        what its devices are.
      donate: whether the parameters' memory is used for the results.

    Returns:
      A :class:`Plan`, an :class:`Estimate` for each tree and layout: ``plan.best`` is the fastest
      that fits into the memory of a device; printed it is a table.

    Raises:
      TypeError: for a function, layouts or other trees that are none.
      ValueError: for an unknown topology or chip, axes that do not make up its devices, a rule
        that decides no parameter, or an axis that does not divide (also a group, or packed codes).
      ImportError: for a topology that needs what is not installed.
      RuntimeError: while another process has libtpu.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
      >>> rules = [jom.Rule("w", jom.quant.Int(bits=4))]
      >>> small = jax.eval_shape(lambda p: jom.compress(p, rules), params)
      >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
      >>> plan = parallel.estimate(
      ...     lambda p, x: x @ p["w"], params, x, on=mesh, chip="v5e", others={"int4": small})
      >>> [(e.tree, e.parameters, e.operations) for e in plan]
      [('dense', 8192.0, 32768.0), ('int4', 1152.0, 32768.0)]

    References:
      Williams, Waterman and Patterson, `Roofline <https://doi.org/10.1145/1498765.1498785>`_, 2009
      Figures of the chips: `TPU v5e <https://docs.cloud.google.com/tpu/docs/v5e>`_, time of a hop
      `How to Scale Your Model <https://jax-ml.github.io/scaling-book/tpus>`_, 2025; `H100
      <https://www.nvidia.com/en-us/data-center/h100>`_ (SXM), time of a hop from NCCL's `tuning.cc
      <https://github.com/NVIDIA/nccl>`_
    """
    who = "estimate"
    check_function(fn, who)
    place = topology(on) if isinstance(on, str) else on
    axes = None
    if isinstance(place, Mesh):
        axes, place = dict(place.shape), of_mesh(place, chip, who)
    elif not isinstance(place, Topology):
        raise TypeError(f"{who}: on is {type(on).__name__}; give 'v5e:4x4', 'h100:8' or a Mesh")
    elif chip is not None:
        raise ValueError(f"{who}: chip={chip!r} is for a mesh; {place.name} has chips of its own")
    found = []
    if others is not None and not isinstance(others, Mapping):
        raise TypeError(f"{who}: others is {type(others).__name__}; give {{name: tree}}")
    if _name(params) in (others or {}):
        raise ValueError(f"{who}: others names a tree {_name(params)!r}, as params is called")
    trees = {_name(params): params, **(others or {})}
    if layouts is None or isinstance(layouts, Layout):
        layouts = [layouts or Layout()]
    if not layouts:
        raise ValueError(f"{who}: layouts is empty; give parallel.Layout(...), or None")
    if wrong := [type(x).__name__ for x in layouts if not isinstance(x, Layout)]:
        raise TypeError(f"{who}: layouts hold {wrong[0]}; give parallel.Layout(...) of it")
    for layout in layouts:
        sizes = layout.axes or axes or {"data": -1}
        mesh = place.mesh(sizes)
        for name, tree in trees.items():
            found.append(_one(fn, name, tree, args, place, mesh, layout, donate))
    return Plan(tuple(found))


def _name(params: Any) -> str:
    some = any(map(is_encoded, jax.tree.leaves(params, is_leaf=is_encoded)))
    return "compressed" if some else "dense"


def _one(
    fn: Callable[..., Any],
    name: str,
    tree: Any,
    args: Sequence[Any],
    place: Topology,
    mesh: Mesh,
    layout: Layout,
    donate: bool,
) -> Estimate:
    params = place_params(tree, mesh, layout.rules, "estimate")
    inputs = place_inputs(args, mesh, layout, "estimate")
    run = accelerate(fn)
    if layout.gather:
        run = as_stored(run, params, layout.over(mesh))
    frame, weights = take_apart(params, (), {})
    others, arrays = take_apart(None, inputs, {})

    def program(weights: list[Any], arrays: list[Any]) -> Any:
        return run(frame.restore(weights)[0], *others.restore(arrays)[1])

    here, whole = shard_bytes(params)
    base = Estimate(
        tree=name,
        layout=layout.called(mesh),
        topology=place,
        parameters=here,
        whole=whole,
        once=_operations(fn, tree, args),
    )
    lowered = jax.jit(program, donate_argnums=0 if donate else ()).lower(weights, arrays)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return dataclasses.replace(base, why="more than the memory of a device")
    return of_program(base, compiled)


def of_program(base: Estimate, compiled: Any) -> Estimate:
    """Returns an estimate with what a compiled program says.

    Args:
      base: what is known without it.
      compiled: what `jax.jit(fn).lower(...).compile()` returns.
    """
    module = as_module(compiled)
    place, chip = base.topology, base.topology.chip
    done, found, memory = work(module), collectives(module), compiled.memory_analysis()
    operations = dict(done.operations)
    hidden = base.once / len(place.devices) - sum(operations.values())
    if done.opaque and hidden > 0:
        # Kernels do not tell what they compute: what the function asks for, less what was seen.
        operations["kernels"] = hidden
    return dataclasses.replace(
        base,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        collectives=found,
        by_type=tuple(operations.items()),
        traffic=done.traffic,
        opaque=tuple(done.opaque.items()),
        compute=sum(n / chip.rate(t) for t, n in operations.items()),
        moving=done.traffic / chip.bandwidth,
        exchange=sum(seconds_of(c, place) for c in launches(found)),
    )


def launches(found: Sequence[Collective]) -> list[list[Collective]]:
    """Returns collectives in groups that are sent at once."""
    return [list(group) for _, group in itertools.groupby(found, key=lambda c: c.name)]


def seconds_of(launch: Sequence[Collective], place: Topology) -> float:
    """Returns how long arrays take that are sent at once, all times together."""
    first, chip = launch[0], place.chip
    late = first.times * messages(first.kind, place.hops(first.devices)) * chip.hop
    return sum(c.sent for c in launch) / chip.ring + late


def _operations(fn: Callable[..., Any], tree: Any, args: Sequence[Any]) -> float:
    """Returns the operations of products that a function asks for, on all devices together."""

    def dense(x: Any) -> Any:
        return jax.eval_shape(lambda leaf: leaf.materialize(), x) if is_encoded(x) else x

    frame, arrays = take_apart(jax.tree.map(dense, tree, is_leaf=is_encoded), args, {})

    def run(arrays: list[Any]) -> Any:
        params, args, _ = frame.restore(arrays)
        return fn(params, *args)

    return 2.0 * _multiply_adds(jax.make_jaxpr(run)(arrays).jaxpr)


def _multiply_adds(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        inside = [_multiply_adds(body) for body in bodies(eqn)]
        name = eqn.primitive.name
        if name == "cond":
            inside = [max(inside)]
        times = eqn.params["length"] if name == "scan" else 1
        times *= eqn.params["mesh"].size if name == "shard_map" else 1
        total += multiply_adds(eqn) + times * sum(inside)
    return total
