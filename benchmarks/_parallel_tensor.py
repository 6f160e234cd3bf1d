"""MiniLM and Lite0 over two by four CPU devices: ``python -m benchmarks._parallel_tensor``.

Programs are compiled in a process of its own, which has eight CPU devices: how many there are is
fixed when JAX starts.
"""

from __future__ import annotations

import collections
import json
import math
import re
import subprocess
import sys
from typing import Any

from ._rows import Row

_WIDTH = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
STEPS = ("dense", "int8", "int4")


def rows(*, quick: bool) -> list[Row]:
    """Compiles each model, dense and compressed, with two layouts."""
    command = [sys.executable, "-m", "benchmarks._parallel_tensor", *["--quick"][: int(quick)]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks._parallel_tensor failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [row for case in found for row in _rows(case)]


def _rows(case: dict[str, Any]) -> list[Row]:
    name, layout = f"{case['model']} {case['step']}", case["layout"]
    claim = f"{name}, {layout}"
    note = f"{case['bytes']:,} of {case['total']:,} bytes on each of 2 x 4 devices"
    off = abs(case["bytes"] / case["expected"] - 1)
    sent = "; ".join(f"{n} {kind} of {size:,} B" for kind, n, size in case["transfers"])
    found = [
        Row(f"{claim}: bytes a device off what the axes promise", off, "<= 0.05", note=note),
        Row(f"{claim}: share of the parameters on a device", case["bytes"] / case["total"]),
        Row(f"{claim}: transfers beside those foretold", case["beside"], "<= 0", note=sent),
    ]
    if "sent" in case:
        found.append(Row(f"{claim}: bytes of weights gathered a step", case["sent"]))
    if "wide" in case:
        most = "<= 0.26" if case["step"] == "int8" else "<= 0.15" if case["step"] == "int4" else ""
        claim += ": weights gathered, of the dense ones"
        found.append(Row(claim, case["wide"], most))
    return found


# ------------------------------------------------------------------ in the child process


def _spread(tree: Any, mesh: Any, rules: Any) -> tuple[Any, int]:
    """Returns shapes with shardings for every part of a tree, and the bytes of one device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxopt_models._bits import dtype_bits
    from jaxopt_models._encoded import is_encoded
    from jaxopt_models._paths import flatten

    leaves, unflatten = flatten(tree)
    total = [0]

    def put(a: Any, spec: Any) -> Any:
        there = NamedSharding(mesh, spec)
        total[0] += math.prod(there.shard_shape(a.shape)) * dtype_bits(a.dtype) // 8
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there)

    new = []
    for p in leaves:
        spec = next((s for r, s in rules if re.fullmatch(r, p.path)), PartitionSpec())
        if not is_encoded(p.value):
            new.append(put(p.value, spec))
            continue
        spec = PartitionSpec(*spec, *[None] * (p.value.ndim - len(spec)))
        local = NamedSharding(mesh, spec).shard_shape(p.value.shape)
        parts = p.value.specs(spec, local) if any(spec) else None
        if parts is None:
            parts = jax.tree.map(lambda _: PartitionSpec(), p.value)
        new.append(jax.tree.map(put, p.value, parts))
    return unflatten(new), total[0]


def _transfers(text: str) -> list[tuple[str, str, int]]:
    """Returns kind, type and bytes of every transfer of a compiled program."""
    found = []
    for line in text.splitlines():
        if m := re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", m[1]):
                size = math.prod(int(n) for n in shape.split(",") if n)
                found.append((m[2], dtype, size * _WIDTH[dtype]))
    return found


def _models(quick: bool) -> dict[str, Any]:
    import jax

    from jaxopt_models import Axes, Rule, models, quant

    tokens = jax.ShapeDtypeStruct((8, 64), "int32")
    side = 64 if quick else 224
    photos = jax.ShapeDtypeStruct((8, side, side, 3), "float32")
    by_word = Axes.torch()
    of = {
        "MiniLM": (models.MiniLM(layers=1 if quick else 6), (tokens, tokens)),
        "Lite0": (models.EfficientNetLite0(), (photos,)),
    }
    recipes = {
        "MiniLM": {
            "int8": [
                Rule(".*embedding", quant.Int(bits=8), axes=by_word),
                Rule(".*kernel", quant.Int(bits=8)),
            ],
            "int4": [
                Rule(".*embedding", quant.Int(bits=4, group=32), axes=by_word),
                Rule(".*kernel", quant.Int(bits=4, group=32)),
            ],
        },
        "Lite0": {f"int{b}": [Rule(".*kernel", quant.Int(bits=b))] for b in (8, 4)},
    }
    return {name: (*of[name], recipes[name]) for name in of}


def _case(model: str, step: str, fn: Any, params: Any, args: Any, mesh: Any) -> list[Any]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxopt_models import accelerate, parallel

    tensor = parallel.tensor(fn, params, *args, mesh=mesh)
    both = parallel.fsdp(params, mesh=mesh, rules=tensor)
    there = NamedSharding(mesh, PartitionSpec("data"))
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in args]
    placed = parallel.constrain(fn, tensor.inside, mesh=mesh)
    runs = {
        "tensor": (tensor, accelerate(placed)),
        "tensor and fsdp": (both, parallel.gathered(placed, both, mesh=mesh)),
    }
    found = []
    foretold = collections.Counter(r["kind"] for r in tensor.collectives)
    for layout, (rules, run) in runs.items():
        shapes, size = _spread(params, mesh, rules)
        sent = _transfers(jax.jit(run).lower(shapes, *inputs).compile().as_text())
        kinds = collections.Counter(kind for kind, _, _ in sent)
        table = rules.table.data
        case = {"model": model, "step": step, "layout": layout, "bytes": size}
        case |= {"total": table["total"], "expected": table["each"]}
        # Of fsdp's gathers of parts only those of activations were foretold.
        beside = {
            k: n - foretold[k] for k, n in kinds.items() if layout == "tensor" or k != "all-gather"
        }
        case["beside"] = sum(max(0, n) for n in beside.values())
        case["transfers"] = [
            (k, n, sum(b for kind, _, b in sent if kind == k)) for k, n in sorted(kinds.items())
        ]
        if layout != "tensor":
            rows = {r["bytes"] for r in tensor.collectives if r["kind"] == "all-gather"}
            # Of a lookup of positions all, of others that of one slice of the data.
            batch = {n for b in rows for n in (b, b // 2)}
            case["sent"] = sum(b for kind, _, b in sent if kind == "all-gather" and b not in batch)
        found.append(case)
    return found


def main(*, quick: bool) -> None:
    """Compiles everything and prints what was found as JSON."""
    import jax
    from jax.sharding import AxisType

    from jaxopt_models import compress

    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    found = []
    for name, (module, args, recipes) in _models(quick).items():
        variables = jax.eval_shape(module.init, jax.random.key(0), *args)
        params = variables if "batch_stats" in variables else variables["params"]

        def fn(p: Any, *args: Any, module: Any = module) -> Any:
            return module.apply(p if "batch_stats" in p else {"params": p}, *args)

        for step in STEPS[: 2 if quick else 3]:
            recipe = recipes.get(step, [])
            small = jax.eval_shape(lambda p, recipe=recipe: compress(p, recipe), params)
            found += _case(name, step, fn, small, args, mesh)
        dense = next(c["sent"] for c in found if c["model"] == name and "sent" in c)
        for case in found:
            if case["model"] == name and "sent" in case:
                case["wide"] = case["sent"] / dense
    print(json.dumps(found))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
