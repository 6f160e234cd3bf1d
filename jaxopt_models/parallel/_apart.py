"""Several functions, each with its own parameters, each on its slice of a mesh axis."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .._accelerate import accelerate, simulate
from .._bits import dtype_bits
from ._arrangement import Arrangement, by_dtype, by_partition
from ._slices import Slices, no_mesh, one_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """Parameters of several functions, each member's on its own slice of a mesh axis alone.

    A pytree whose arrays have the shape `[members, ...]` and are divided over the axis, so that a
    program for all devices finds on each one the parameters of one member, whatever the others'
    structures are. Leaves that all members have (by role, data type and shape) are arrays of their
    own; the others of a member are laid end to end, a vector for each data type, as long as the
    longest member's. Compressed parameters and states of optimizers are members like any other.

    Args:
      buffers: the arrays; ``None`` where this is a half of :meth:`split`.
      arrangement: where the leaves of each member lie in them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("member",))
      >>> apart = parallel.Apart.of([{"w": jnp.ones(3)}], mesh, axis="member")
      >>> apart.buffers[0].shape, apart.members()[0]["w"].shape
      ((1, 3), (3,))
    """

    buffers: tuple[Any, ...]
    arrangement: Arrangement = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, members: Sequence[Any], mesh: jax.sharding.Mesh, *, axis: str) -> Apart:
        """Puts each member on its slice of a mesh axis.

        Each member's arrays travel to the devices of its slice and to no other.

        Args:
          members: trees of arrays, one for each device along the axis.
          mesh: the devices.
          axis: the axis along which members differ; along all others they are repeated.

        Returns:
          The members, apart.

        Raises:
          TypeError: if ``members`` is no list, or a leaf is no array.
          ValueError: for another number of members than the axis has devices.
        """
        return place(members, Slices(mesh, axis, None, "Apart.of"))

    def members(self) -> list[Any]:
        """Returns the trees of all members, bit for bit, each on the first device of its slice.

        Raises:
          ValueError: if another process holds one of them.
        """
        count = len(self.arrangement.members)
        held = [[_member(b, i) for b in self.buffers] for i in range(count)]
        traced = any(isinstance(b, jax.core.Tracer) for b in self.buffers)
        with contextlib.nullcontext() if traced else no_mesh():
            return [_taken_apart(self.arrangement, i, parts) for i, parts in enumerate(held)]

    def held(self) -> tuple[Any, ...]:
        """Returns what one device holds, inside of `jax.shard_map`: the buffers of its member."""
        return tuple(None if b is None else b[0] for b in self.buffers)

    def split(self) -> tuple[Apart, Apart]:
        """Returns what may be trained, and the rest, as :func:`jaxopt_models.partition` does.

        Roles are those of the members' leaves, not data types. `jax.grad` and optimizers that work
        entry by entry take the first half; :func:`jaxopt_models.combine` puts both together.
        """
        halves = [self.arrangement.half(self.buffers, trained=t) for t in (True, False)]
        return Apart(halves[0], self.arrangement), Apart(halves[1], self.arrangement)

    @property
    def bytes_each(self) -> int:
        """Bytes on each device, padding included."""
        held = zip(self.arrangement.buffers, self.buffers, strict=True)
        bits = [math.prod(b.shape) * dtype_bits(b.dtype) for b, v in held if v is not None]
        return sum(-(-n // 8) for n in bits)

    def __repr__(self) -> str:
        inside = ", ".join("None" if b is None else f"{b.dtype}{[*b.shape]}" for b in self.buffers)
        return f"Apart({len(self.arrangement.members)} members; {inside})"


def place(members: Any, slices: Slices, *, name: str = "members") -> Apart:
    """Returns members apart on the slices of a mesh; what is apart already stays as it is."""
    if isinstance(members, Apart):
        slices.listed(members.arrangement.members, name)
        return members
    trees = slices.listed(members, name)
    for i, tree in enumerate(trees):
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if not hasattr(x, "dtype") and not isinstance(x, (bool, int, float, complex)):
                raise TypeError(
                    f"{slices.who}: {name}[{i}]{jax.tree_util.keystr(path)} is "
                    f"{type(x).__name__}; members are trees of arrays: split a module first, "
                    "fn, params = jaxopt_models.functional(module)"
                )
    arrangement = Arrangement.of(trees, roles=by_partition)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees)):
        packed = [_put_together(arrangement, i, tree) for i, tree in enumerate(trees)]
        whole = [jnp.concatenate(parts) for parts in zip(*packed, strict=True)]
        held = [jax.lax.with_sharding_constraint(x, slices.apart) for x in whole]
        return Apart(tuple(held), arrangement)
    there: list[list[jax.Array]] = [[] for _ in arrangement.buffers]
    with no_mesh():
        for i, tree in enumerate(trees):
            for arrays, x in zip(there, _put_together(arrangement, i, tree), strict=True):
                arrays += [jax.device_put(x, device) for device in slices.devices(i)]
    found = [
        jax.make_array_from_single_device_arrays(
            (slices.count, *buffer.shape), slices.apart, arrays, dtype=buffer.dtype
        )
        for buffer, arrays in zip(arrangement.buffers, there, strict=True)
    ]
    return Apart(tuple(found), arrangement)


# One program for each member, as its leaves would be as many for each device.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _put_together(arrangement: Arrangement, i: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], arrangement.pack(tree, i))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _taken_apart(arrangement: Arrangement, i: int, rows: Any) -> Any:
    return arrangement.unpack([None if x is None else x[0] for x in rows], i)


def _member(buffer: Any, i: int) -> Any:
    """Returns the row of one member, `[1, ...]`, where it lies."""
    if buffer is None or isinstance(buffer, (jax.core.Tracer, np.ndarray)):
        return None if buffer is None else buffer[i : i + 1]
    for shard in buffer.addressable_shards:
        rows = shard.index[0].indices(buffer.shape[0])
        whole = shard.data.shape[1:] == buffer.shape[1:]
        if rows[0] <= i < rows[1] and whole:
            return shard.data if len(shard.data) == 1 else shard.data[i - rows[0] :][:1]
    if buffer.is_fully_addressable:
        return buffer[i : i + 1]
    raise ValueError(
        f"Apart.members: member {i} lies on another process's devices; save the Apart itself "
        "(Orbax writes the shards of each process), or use it inside of jax.jit"
    )


def apart(
    fns: Callable[..., Any] | Sequence[Callable[..., Any]],
    mesh: jax.sharding.Mesh,
    *,
    axis: str,
    data: str | None = None,
    combine: Callable[[list[Any]], Any] | None = None,
    learn: bool = False,
) -> Callable[..., Any]:
    r"""Returns a function that runs several, each where its own parameters are.

    .. math:: y_i = f_i(\theta_i, x), \qquad i = 1 \dots n,

    in one program for all devices of the mesh: device `i` along ``axis`` holds :math:`\theta_i`
    only, runs :math:`f_i` only (a branch of `lax.switch`; none where all are one function of
    parameters of one structure), and outputs alone travel, by one all-gather. Parameters may be
    compressed, and derivatives pass, to parameters and to arguments.

    Args:
      fns: one function `(params, *args) -> out` for all members, or a list, one for each. Outputs
        may differ in structure, shape and data type.
      mesh: the devices.
      axis: the mesh axis with a member on each of its devices.
      data: a mesh axis that divides the first axis of arguments and outputs; ``None``: all
        members see the whole batch.
      combine: from the list of outputs to what is returned, for instance :func:`mean`,
        :func:`weighted`, :func:`vote` or `jnp.stack`; default: the list.
      learn: whether the result is differentiated: no kernels are used then, and members that
        differ compute once more on the way back, so that no device keeps room for what the
        others' derivatives need.

    Returns:
      A function `(members, *args)`, compiled once: ``members`` an :class:`Apart`. An argument that
      is an :class:`Apart`, too, gives each member its own (``data`` does not divide it); all
      others are the same for all.

    Raises:
      TypeError: for a mesh that is none, functions that are none, or members that are not apart.
      ValueError: for an axis that the mesh has not, functions or members fewer or more than its
        devices, or rows that do not divide over ``data``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("member",))
      >>> run = parallel.apart([lambda p, x: x @ p["w"]], mesh, axis="member")
      >>> members = parallel.Apart.of([{"w": jnp.eye(2)}], mesh, axis="member")
      >>> run(members, jnp.arange(2.0))
      [Array([0., 1.], dtype=float32)]
    """
    slices = Slices(mesh, axis, data, "apart")
    given = slices.functions(fns, "function", "(params, x) -> out")
    return run_apart(wrapped(given, learn=learn), slices, combine=combine, learn=learn)


def wrapped(fns: Sequence[Callable[..., Any]], *, learn: bool) -> list[Callable[..., Any]]:
    """Returns functions of compressed parameters; the same one for the same function."""
    runs: dict[int, Callable[..., Any]] = {}
    for fn in fns:
        if id(fn) not in runs:
            runs[id(fn)] = (simulate if learn else accelerate)(fn)
    return [runs[id(fn)] for fn in fns]


def run_apart(
    runs: Sequence[Callable[..., Any]],
    slices: Slices,
    *,
    combine: Callable[[list[Any]], Any] | None,
    learn: bool,
) -> Callable[..., Any]:
    """Returns :func:`apart` of functions that take compressed parameters."""

    def shown(*args: Any) -> list[Any]:
        arrangements = [a.arrangement for a in args if isinstance(a, Apart)]
        same = one_of(runs) and all(arrangement.uniform for arrangement in arrangements)

        def run(i: int, *args: Any) -> Any:
            own = [a.arrangement.unpack(a.held(), i) if isinstance(a, Apart) else a for a in args]
            return runs[i](*own)

        outs = [jax.eval_shape(lambda *a, i=i: run(i, *a), *args) for i in range(slices.count)]
        _check_rows(outs, args, slices)
        arrangement = Arrangement.of(outs, roles=by_dtype)

        def packed(i: int, *args: Any) -> Any:
            return arrangement.pack(run(i, *args), i)

        # Derivatives of a switch keep room for what each of its branches keeps.
        go = jax.checkpoint(packed, static_argnums=0) if learn and not same else packed
        here = slices.branch(go, *args, same=same)
        whole = [jax.lax.all_gather(b, slices.axis) for b in here]
        return [arrangement.unpack([b[i] for b in whole], i) for i in range(slices.count)]

    @jax.jit
    def run(*args: Any) -> Any:
        specs = tuple(slices.apart.spec if isinstance(a, Apart) else slices.specs(a) for a in args)
        rows = PartitionSpec(slices.data) if slices.data else PartitionSpec()
        outs = slices.mapped(shown, specs, rows)(*args)
        return outs if combine is None else combine(outs)

    def checked(members: Any, *args: Any) -> Any:
        return run(held_apart(members, slices), *args)

    return checked


def _check_rows(outs: Sequence[Any], args: Sequence[Any], slices: Slices) -> None:
    """Raises a `ValueError` where batches are divided and outputs are not rows of them."""
    given = [x for a in args if not isinstance(a, Apart) for x in jax.tree.leaves(a) if x.ndim]
    if slices.data is None or not given:
        return
    rows = given[0].shape[0]
    for i, out in enumerate(outs):
        for x in jax.tree.leaves(out):
            if not x.shape or x.shape[0] != rows:
                raise ValueError(
                    f"{slices.who}: member {i} returns an array of shape {list(x.shape)}, not one "
                    f"of {rows} rows, as batches that {slices.data!r} divides; leave data= away"
                )


def held_apart(members: Any, slices: Slices) -> Apart:
    """Returns what is an :class:`Apart` with a member for each slice.

    Raises:
      TypeError: if it is none: in each call, every member would travel anew.
      ValueError: for another number of members.
    """
    if not isinstance(members, Apart):
        raise TypeError(
            f"{slices.who}: parameters are {type(members).__name__}; put them on their devices "
            f"once: parallel.Apart.of(list_of_params, mesh, axis={slices.axis!r})"
        )
    slices.listed(members.arrangement.members, "members")
    return members
