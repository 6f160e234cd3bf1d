"""Programs for machines that are not there: ``python -m benchmarks._aot v5e | h100``.

Prints a line of JSON for each program. Run it with a Python that has the extra ``aot``, in a
process of its own: libtpu takes a lock, and the CUDA plugin complains that there is no GPU.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

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


def main(target: str) -> None:
    """Compiles every program and prints what memory it takes."""
    import jax
    import jax.numpy as jnp

    import jaxopt_models as jom
    from jaxopt_models import codebook, parallel, quant

    device = parallel.topology({"v5e": "v5e:2x2", "h100": "h100:1"}[target]).devices[0]
    there = jax.sharding.SingleDeviceSharding(device)

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
