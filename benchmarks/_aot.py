"""Programs for machines that are not there: ``python -m benchmarks._aot v5e | h100``.

Prints a line of JSON for each program. Run it with a Python that has the extra ``aot``, in a
process of its own: libtpu takes a lock, and the CUDA plugin complains that there is no GPU.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

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
SIZE = 4096
ROWS = (1, 16, 256)
#: Bits of a code, and how a leaf of these is made, by name.
LEAVES: dict[str, dict[str, tuple[int, str]]] = {
    "v5e": {
        "int8": (8, "quant.Int(bits=8)"),
        "int4": (4, "quant.Int(bits=4)"),
        "int4 in groups of 128": (4, "quant.Int(bits=4, group=128)"),
        "int4 in groups of 32, zero points": (4, "quant.Int(bits=4, group=32, symmetric=False)"),
        "int3 in groups of 32": (3, "quant.Int(bits=3, group=32)"),
        "int2": (2, "quant.Int(bits=2)"),
        "fp8": (8, "quant.Float('e4m3')"),
        "NF4": (4, "quant.NF4(group=64)"),
        "codebook of 16": (4, "codebook.KMeans(bits=4)"),
        "codebook of 256": (8, "codebook.KMeans(bits=8)"),
    },
    "h100": {
        "int8": (8, "quant.Int(bits=8)"),
        "int4": (4, "quant.Int(bits=4)"),
        "fp8": (8, "quant.Float('e4m3')"),
        "int8 in groups of 128": (8, "quant.Int(bits=8, group=128)"),
        "int4 in groups of 128": (4, "quant.Int(bits=4, group=128)"),
        "int4 in groups of 32, zero points": (4, "quant.Int(bits=4, group=32, symmetric=False)"),
        "int3 in groups of 32": (3, "quant.Int(bits=3, group=32)"),
        "int2": (2, "quant.Int(bits=2)"),
        "NF4": (4, "quant.NF4(group=64)"),
        "codebook of 16": (4, "codebook.KMeans(bits=4)"),
        "codebook of 256": (8, "codebook.KMeans(bits=8)"),
    },
}


def python() -> str | None:
    """Returns a Python with the extra ``aot``: ``JAXOPT_MODELS_AOT_PYTHON``, or ``None``."""
    return os.environ.get("JAXOPT_MODELS_AOT_PYTHON") or None


def compiled(target: str, *, timeout: float = 600) -> list[dict[str, Any]]:
    """Compiles all programs for a target in a child process; returns what it prints."""
    root = pathlib.Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [python() or sys.executable, "-m", "benchmarks._aot", target],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


_WIDTH = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}
_LINE = re.compile(r"^ +(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([a-z-]+)\(")
_VIEWS = ("parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional")


def dense_bytes(text: str, size: int) -> int:
    """Returns the bytes of floating arrays of at least ``size`` entries that a program writes.

    Args:
      text: of the compiled program.
      size: number of entries.
    """
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    total, inside = 0, False
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = head[1] not in fused
        found = _LINE.match(line)
        if not inside or found is None or found[2] in _VIEWS:
            continue
        for kind, sides in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", found[1]):
            entries = math.prod(int(n) for n in sides.split(",") if n)
            if kind in _WIDTH and entries >= size:
                total += _WIDTH[kind] * entries
    return total


def _device(target: str) -> Any:
    from jax.experimental import topologies

    if target == "v5e":
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return found.devices[0]


def main(target: str) -> None:
    """Compiles every program and prints what memory it takes."""
    import jax
    import jax.numpy as jnp

    import jaxopt_models as jom
    from jaxopt_models import codebook, quant

    there = jax.sharding.SingleDeviceSharding(_device(target))

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tree)

    def product(p: Any, x: Any) -> Any:
        return x @ p["w"]

    def loss(x: Any, p: Any) -> Any:
        return jnp.sum(jom.accelerate(product)(p, x).astype(jnp.float32) ** 2)

    def gradient(p: Any, x: Any) -> Any:
        return jax.grad(loss)(x, p)

    dense = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
    for name, (bits, encoder) in LEAVES[target].items():
        make = eval(encoder, {"quant": quant, "codebook": codebook})
        small = {"w": jax.eval_shape(make, dense)}
        uses = [("", jom.accelerate(product), m) for m in ROWS]
        if name in ("int8", "int4"):
            uses.append(("gradient by x", gradient, 16))
            uses.append(("rebuilt", jom.simulate(product), 16))
        for what, fn, m in uses:
            x = jax.ShapeDtypeStruct((m, SIZE), jnp.bfloat16)
            program = jax.jit(fn).lower(placed(small), placed(x)).compile()
            memory, text = program.memory_analysis(), program.as_text()
            row = {
                "leaf": name,
                "what": what,
                "rows": m,
                "runs": jom.accelerate(product).explain(small, x)[0]["runs"],
                "codes": bits * SIZE * SIZE // 8,
                "stored": small["w"].storage_bits() // 8 + 2 * m * SIZE,
                "arguments": memory.argument_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "dense": dense_bytes(text, SIZE * SIZE),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
