"""Plans of programs: ``python -m benchmarks._parallel_aot layouts | scaling TOPOLOGY [--quick]``.

Prints a line of JSON for each program. Run it with a Python that has the extra ``aot``, in a
process of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxopt_models import parallel

from . import _parallel_programs as programs

#: Examples a chip: few where layouts are compared, as many as training would use for scaling.
FEW = {"MiniLM": 16, "Lite0": 8}
MANY = {"calibration": 512, "distillation": 512}
#: Devices that share the heads of a layer, and those that share what is left of a weight.
HEADS, SHARDS = 4, 4


def facts(e: parallel.Estimate) -> dict[str, Any]:
    """Returns what an estimate says, as JSON data."""
    names = ("tree", "layout", "parameters", "whole", "once", "memory", "fits", "why")
    times = ("compute", "moving", "exchange", "seconds", "operations", "traffic", "temporaries")
    sends = [
        {"kind": c.kind, "dtype": c.dtype, "shape": c.shape, "devices": c.devices}
        | {"times": c.times, "sent": c.sent, "bytes": c.bytes, "name": c.name, "where": c.where}
        for c in e.collectives
    ]
    found = {n: getattr(e, n) for n in (*names, *times)}
    found["late"] = e.exchange - sum(c.sent for c in e.collectives) / e.topology.chip.ring
    return found | {"devices": len(e.topology.devices), "topology": e.topology.name, "sends": sends}


def layouts(place: parallel.Topology, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Plans the forward pass of both models, dense and compressed, in each layout."""
    count = len(place.devices)
    shards = math.gcd(count // HEADS, SHARDS)
    axes = {"data": -1, "shard": shards, "model": HEADS}
    for name, make in programs.MODELS.items():
        model = make(2) if quick else make()
        trees = {f"int{bits}": model.compressed(bits) for bits in (8, 4)}
        kinds = {"replicated": model.rules(("model",), None)}
        if shards > 1:
            kinds["sharded"] = model.rules(("model", "shard"), "shard")
        for kind, rules in kinds.items():
            layout = parallel.Layout(axes, rules, batch=("data", "shard"), name=kind)
            inputs = model.inputs(FEW[name] * count)
            plan = parallel.estimate(
                model.fn, model.params, *inputs, on=place, layouts=layout, others=trees
            )
            for e in plan:
                tree = model.params if e.tree == "dense" else trees[e.tree]
                row = facts(e) | programs.divided(tree, rules, axes | {"data": 1})
                row |= {"model": name, "sums": programs.sums(model)}
                yield row | {"batch": inputs[0].shape[0] // (count // HEADS)}


def scaling(place: parallel.Topology, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Plans steps whose batch grows with the chips, on all of which the parameters are."""
    count = len(place.devices)
    for name, each in MANY.items():
        step = programs.STEPS[name](1) if quick else programs.STEPS[name]()
        layout = parallel.Layout({"data": -1}, inputs=(P(), P("data")), name=name)
        plan = parallel.estimate(
            step.fn,
            step.state,
            step.fixed,
            step.batch((8 if quick else each) * count),
            on=place,
            layouts=layout,
            donate=True,
        )
        yield facts(plan[0]) | {"step": name, "batch": each}


if __name__ == "__main__":
    part = {"layouts": layouts, "scaling": scaling}[sys.argv[1]]
    for row in part(parallel.topology(sys.argv[2]), quick="--quick" in sys.argv):
        print(json.dumps(row), flush=True)
