"""MiniLM and Lite0 over two by four devices of this CPU: what each holds, and what travels."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_models import Axes, Rule, accelerate, compress, models, parallel, quant
from jaxopt_models._bits import dtype_bits
from jaxopt_models._divided import counts_of

from ._rows import Row, worst

STEPS = ("dense", "int8", "int4")
#: What is measured of every case, and its bar.
OFF = "bytes a device off what the axes promise"
BESIDE = "transfers beside those foretold"
#: What travels is what is stored, but for the parameters that stay whole.
WIDE = "share of the dense bytes that is gathered, over the share that is stored"
BARS = {OFF: "<= 0.05", BESIDE: "<= 0", WIDE: "<= 1.04"}


def rows(*, quick: bool) -> list[Row]:
    """Compiles each model, dense and compressed, with two layouts."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    found = []
    for name, (module, args, recipes) in _models(quick).items():
        variables = jax.eval_shape(module.init, jax.random.key(0), *args)
        params = variables if "batch_stats" in variables else variables["params"]

        def fn(p: Any, *args: Any, module: Any = module) -> Any:
            return module.apply(p if "batch_stats" in p else {"params": p}, *args)

        cases = []
        for step in STEPS[: 2 if quick else 3]:
            recipe = recipes.get(step, [])
            small = jax.eval_shape(lambda p, recipe=recipe: compress(p, recipe), params)
            cases += _case(name, step, fn, small, args, mesh)
        dense = next(c["sent"] for c in cases if "sent" in c)
        for case in cases:
            if "sent" in case:
                case["wide"] = case["sent"] / dense
                case["stored"] = case["total"] / cases[0]["total"]
            found += _rows(case)
    what = "MiniLM and Lite0, dense, int8, int4, two layouts on 2 x 4 devices"
    return found + [worst(what, found, ending, bar) for ending, bar in BARS.items()]


def _rows(case: dict[str, Any]) -> list[Row]:
    name, layout = f"{case['model']} {case['step']}", case["layout"]
    claim = f"{name}, {layout}"
    note = f"{case['bytes']:,} of {case['total']:,} bytes on each of 2 x 4 devices"
    off = abs(case["bytes"] / case["expected"] - 1)
    sent = "; ".join(f"{n} {kind} of {size:,} B" for kind, n, size in case["transfers"])
    found = [
        Row(f"{claim}: {OFF}", off, note=note),
        Row(f"{claim}: share of the parameters on a device", case["bytes"] / case["total"]),
        Row(f"{claim}: {BESIDE}", case["beside"], note=sent),
    ]
    if "sent" in case:
        found.append(Row(f"{claim}: bytes of weights gathered a step", case["sent"]))
    if "wide" in case:
        found.append(Row(f"{claim}: {WIDE}", case["wide"] / case["stored"]))
    return found


def _spread(tree: Any, mesh: Any, rules: Any) -> tuple[Any, int]:
    """Returns shapes with shardings for every part of a tree, and the bytes of one device."""
    shardings = parallel.shardings(tree, mesh, rules)
    shapes = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )
    bits = [
        math.prod(a.sharding.shard_shape(a.shape)) * dtype_bits(a.dtype)
        for a in jax.tree.leaves(shapes)
    ]
    return shapes, sum(n // 8 for n in bits)


def _promised(rules: parallel.Rules, mesh: Any) -> int:
    """Returns the bytes of one device if all that is stored were divided as the tensors are."""
    promised = 0
    for row in rules.table:
        spec = rules.spec(row["path"])
        promised += row["bytes"] // math.prod(counts_of(spec, len(spec), mesh.shape))
    return promised


def _models(quick: bool) -> dict[str, Any]:
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
        sent = parallel.collectives(jax.jit(run).lower(shapes, *inputs).compile())
        kinds = collections.Counter(c.kind for c in sent)
        case = {"model": model, "step": step, "layout": layout, "bytes": size}
        case |= {"total": rules.table.data["total"], "expected": _promised(rules, mesh)}
        # Of fsdp's gathers of parts only those of activations were foretold.
        beside = {
            k: n - foretold[k] for k, n in kinds.items() if layout == "tensor" or k != "all-gather"
        }
        case["beside"] = sum(max(0, n) for n in beside.values())
        case["transfers"] = [
            (k, n, sum(c.bytes for c in sent if c.kind == k)) for k, n in sorted(kinds.items())
        ]
        if layout != "tensor":
            rows = {r["bytes"] for r in tensor.collectives if r["kind"] == "all-gather"}
            # Of a lookup of positions all, of others that of one slice of the data.
            batch = {n for b in rows for n in (b, b // 2)}
            case["sent"] = sum(
                c.bytes for c in sent if c.kind == "all-gather" and c.bytes not in batch
            )
        found.append(case)
    return found
