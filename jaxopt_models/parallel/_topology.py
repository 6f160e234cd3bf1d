"""Machines by name, whether they are there or not, and what their chips can do."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from .._table import Table


@dataclasses.dataclass(frozen=True)
class Chip:
    """What bounds a program on one device.

    Args:
      name: of the chip.
      operations: in a second, by type of the operands of a product, ``"bfloat16"`` and ``"int8"``
        at least; a multiply-add is two.
      memory: bytes it holds.
      bandwidth: bytes of memory that it reads or writes in a second.
      ring: bytes that it sends in a second to the next device of a ring.
      hop: seconds until a message has reached the next device.
      source: where the figures are published.
    """

    name: str
    operations: tuple[tuple[str, float], ...]
    memory: float
    bandwidth: float
    ring: float
    hop: float
    source: str = ""

    def rate(self, dtype: str) -> float:
        """Returns the operations in a second on a type, or on a known one of its width."""
        known = dict(self.operations)
        narrow = re.match(r"(u?int|float)([248])(_|$)", dtype)
        return known.get(dtype, known["int8" if narrow else "bfloat16"])


#: Products of `float32` are of rounded operands in JAX: to `bfloat16` on a TPU, to TF32 on an H100.
CHIPS = {
    "v5e": Chip(
        name="v5e",
        operations=(("bfloat16", 197e12), ("float32", 197e12), ("int8", 393e12)),
        memory=16e9,
        bandwidth=819e9,
        ring=50e9,  # 400 GB/s over four ports, both ways: one port, one way
        hop=1e-6,
        source="cloud.google.com/tpu/docs/v5e; hop: jax-ml.github.io/scaling-book/tpus",
    ),
    "h100": Chip(
        name="h100",
        operations=(("bfloat16", 989e12), ("float32", 494e12), ("int8", 1979e12)),
        memory=80e9,
        bandwidth=3350e9,
        ring=450e9,  # 900 GB/s, both ways
        hop=3.4e-6,
        source="nvidia.com/en-us/data-center/h100 (SXM, without sparsity); hop: NCCL's tuning.cc",
    ),
}

#: What XLA has to know of an H100 SXM to compile for it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_FORMS = "'v5e:1x1', 'v5e:2x2', 'v5e:4x4' ... 'v5e:16x16', 'h100:1' ... 'h100:8'"
_SIDES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program can be compiled for.

    Args:
      name: such as ``"v5e:4x4"``.
      devices: in the order in which a mesh takes them.
      chip: what each of them can do.
      sides: of the grid that they stand in; one for a ring.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip
    sides: tuple[int, ...]

    def mesh(self, axes: Mapping[str, int]) -> Mesh:
        """Returns a mesh of these devices whose axes XLA divides as it sees fit.

        Args:
          axes: sizes by name, the last being neighbours; one may be -1, for all that are left.

        Raises:
          ValueError: if the sizes do not multiply to the number of devices.
        """
        sizes = dict(axes)
        rest = [name for name, n in sizes.items() if n == -1]
        known = math.prod(n for n in sizes.values() if n != -1)
        count = len(self.devices)
        if len(rest) == 1 and known > 0 and count % known == 0:
            sizes[rest[0]] = count // known
        if not sizes or any(n < 1 for n in sizes.values()) or math.prod(sizes.values()) != count:
            raise ValueError(
                f"{self.name} has {count} devices, which axes {dict(axes)} do not make up; give "
                "sizes whose product is that, one of them -1 for all that are left"
            )
        grid = np.array(self.devices, dtype=object).reshape(tuple(sizes.values()))
        return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def hops(self, n: int) -> int:
        """Returns how many messages follow each other when ``n`` devices pass all round once.

        Of a grid more devices than a side has go along one side first, then along the other.
        """
        side = max(self.sides)
        if n <= side or n % side:
            return n - 1
        return (side - 1) + (n // side - 1)


def topology(name: str) -> Topology:
    """Describes devices that need not be there, to compile for.

    Nothing is run on them. TPUs need the extra ``aot`` (libtpu), GPUs too (the CUDA plugin), best
    in an environment of its own, with ``JAX_PLATFORMS=cpu`` and ``TPU_SKIP_MDS_QUERY=1`` set where
    there is neither; libtpu takes a lock, so one process at a time.

    Args:
      name: ``"v5e:RxC"`` for a slice of R x C chips, up to ``"v5e:16x16"``, or ``"h100:N"`` for N
        GPUs of one host, up to 8.

    Returns:
      The devices and what their chips can do; the figures are those of :func:`chips`.

    Raises:
      ValueError: for a name that says no such machine.
      ImportError: if what compiles for it is not installed.
      RuntimeError: while another process has libtpu.

    Example:
      >>> from jaxopt_models import parallel
      >>> parallel.topology("v5e:3x5")
      Traceback (most recent call last):
        ...
      ValueError: topology 'v5e:3x5': give one of 'v5e:1x1', 'v5e:2x2', 'v5e:4x4' ... \
'v5e:16x16', 'h100:1' ... 'h100:8'
    """
    tpu = re.fullmatch(r"v5e:(\d+)x(\d+)", str(name))
    gpu = re.fullmatch(r"h100:([1-8])", str(name))
    if tpu and (int(tpu[1]), int(tpu[2])) in _SIDES:
        rows, columns = int(tpu[1]), int(tpu[2])
        small = {"chips_per_host_bounds": (1, 1, 1)} if rows == 1 else {}
        found = _described(name, "tpu", "libtpu", topology_name=name, **small)
        return Topology(name, found, CHIPS["v5e"], (rows, columns))
    if gpu:
        n = int(gpu[1])
        options = {"target_config": H100, "topology": f"1x1x{n}"}
        return Topology(
            name, _described(name, "cuda", "jax_cuda12_plugin", **options), CHIPS["h100"], (n,)
        )
    raise ValueError(f"topology {name!r}: give one of {_FORMS}")


def _described(name: str, platform: str, needs: str, **options: Any) -> tuple[Any, ...]:
    from jax.experimental import topologies

    if importlib.util.find_spec(needs) is None:
        raise ImportError(
            f"topology {name!r} needs {needs}, which compiles for devices that are not there: "
            "pip install 'jaxopt_models[aot]', best into an environment of its own"
        )
    try:
        return tuple(topologies.get_topology_desc(platform=platform, **options).devices)
    except jax.errors.JaxRuntimeError as e:
        if "lockfile" not in str(e):
            raise
        raise RuntimeError(
            f"topology {name!r}: another process has libtpu, which one at a time can use; wait for "
            f"it, or end it ({e!s:.200})"
        ) from None


def of_mesh(mesh: Mesh, chip: Chip | str | None, who: str) -> Topology:
    """Returns the devices of a mesh as a topology; all of them make one ring.

    Args:
      mesh: the devices.
      chip: what each can do, or its name; ``None``: by what the devices say they are.
      who: the public function, for messages.

    Raises:
      ValueError: if that is not known.
    """
    devices = tuple(mesh.devices.flat)
    kind = devices[0].device_kind
    if chip is None:
        words = kind.lower()
        chip = "h100" if "h100" in words else "v5e" if re.search("v5 ?(e|lite)", words) else None
        if chip is None:
            raise ValueError(
                f"{who}: nothing is known of devices of kind {kind!r}; say what to reckon with: "
                f"chip={' or '.join(map(repr, CHIPS))}, or a parallel.Chip"
            )
    if isinstance(chip, str):
        if chip not in CHIPS:
            raise ValueError(f"{who}: chip={chip!r} is none of {', '.join(CHIPS)}; give a Chip")
        chip = CHIPS[chip]
    return Topology(f"{len(devices)} x {kind}", devices, chip, (len(devices),))


def chips() -> Table:
    """Returns the figures of the chips that are known, and where they are published.

    Example:
      >>> from jaxopt_models import parallel
      >>> parallel.chips()[0]["memory GB"]
      16.0
    """
    rows = [
        (
            c.name,
            *(c.rate(t) / 1e12 for t in ("bfloat16", "float32", "int8")),
            *(c.memory / 1e9, c.bandwidth / 1e9, c.ring / 1e9, 1e6 * c.hop),
            c.source,
        )
        for c in CHIPS.values()
    ]
    columns = (
        *("chip", "bfloat16 T/s", "float32 T/s", "int8 T/s"),
        *("memory GB", "memory GB/s", "ring GB/s", "us a hop", "source"),
    )
    return Table(columns, rows, title="chips")
