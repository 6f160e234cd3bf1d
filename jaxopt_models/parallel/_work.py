"""What one device computes and moves in a compiled program."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._hlo import Array, Computation, Instruction, Module
from ._program import KINDS, as_module, results

#: Instructions that move nothing by themselves, or whose bodies are counted.
_VIEWS = (
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "async-start", "after-all", "add-dependency"),
    *("partition-id", "replica-id"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
#: Passes over the operands of a product by the precision that is asked for.
_PASSES = {"highest": 6, "high": 3}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a run of a program.

    Args:
      operations: of products and convolutions by type of their operands; a multiply-add is two.
        Those asked for in the precision ``"highest"`` count six times, in ``"high"`` three times.
      traffic: bytes of its large memory that are read and written, by what stands between the
        instructions that XLA fused; what it keeps in a nearer memory is not counted.
      opaque: calls of kernels whose operations the program does not tell, by name.
    """

    operations: dict[str, float]
    traffic: float
    opaque: dict[str, int]


def work(program: Any) -> Work:
    """Counts what one device computes and moves in a compiled program.

    Args:
      program: what `jax.jit(fn).lower(...).compile()` returns, or the text of it.

    Returns:
      The counts, loops of known length as often as they run.

    Example:
      >>> from jaxopt_models.parallel import _work
      >>> text = '''HloModule product
      ... ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
      ...   %x = f32[8,4]{1,0} parameter(0)
      ...   %w = f32[4,2]{1,0} parameter(1)
      ...   ROOT %y = f32[8,2]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ... }'''
      >>> _work.work(text)
      Work(operations={'float32': 128.0}, traffic=224.0, opaque={})
    """
    module = as_module(program)
    operations: dict[str, float] = {}
    opaque: dict[str, int] = {}
    traffic = 0.0
    for run in module.runs():
        one, here = run.instruction, run.computation
        found = _product(one, here)
        if found is not None:
            dtype, count = found
            operations[dtype] = operations.get(dtype, 0.0) + run.times * count
        elif one.kind == "custom-call" and _is_kernel(one):
            name = one.word("custom_call_target")
            opaque[name] = opaque.get(name, 0) + run.times
        if run.inside is None:
            traffic += run.times * _moved(one, here, module)
    return Work(operations, traffic, opaque)


def _is_kernel(one: Instruction) -> bool:
    # What XLA asks of itself has names of its own kind.
    return not re.fullmatch(r"[A-Z]\w*|\$.*|annotate.*", one.word("custom_call_target"))


# ------------------------------------------------------------------ operations


def _product(one: Instruction, here: Computation) -> tuple[str, float] | None:
    """Returns type and operations of a product, ``None`` for anything else."""
    target = one.word("custom_call_target") if one.kind == "custom-call" else ""
    matrix = one.kind == "dot" or target.startswith(("__cublas", "__onednn$matmul"))
    if not matrix and one.kind != "convolution" and not target.startswith("__cudnn$conv"):
        return None
    sides = [here[name].arrays[0] for name in one.operands[:2]]
    out = one.arrays[0]
    passes = max(
        (n for p, n in _PASSES.items() if re.search(rf"precision=\{{[^}}]*{p}\b", one.attributes)),
        default=1,
    )
    if matrix:
        axes = one.integers("lhs_contracting_dims") or _in_config(one, "lhs_contracting_dimensions")
        count = math.prod(out.shape) * math.prod(sides[0].shape[a] for a in axes)
    else:
        # Of cuDNN's gradients, shapes and windows are those of the convolution itself.
        a, b = sides
        forward = {"Input": (out, b, a), "Filter": (a, out, b)}
        way = re.search(r"convBackward(Input|Filter)", target)
        count = _taps(one, *(forward[way[1]] if way else (a, b, out)))
    return sides[0].dtype, 2.0 * passes * count


def _in_config(one: Instruction, name: str) -> tuple[int, ...]:
    found = re.search(rf'"{name}":(\[[^\]]*\])', one.attributes)
    return tuple(map(int, json.loads(found[1]))) if found else ()


def _taps(one: Instruction, source: Array, kernel: Array, out: Array) -> int:
    """Returns the multiply-adds of a convolution whose operands are no zeros put in."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0
    lhs, rhs, res = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    options = dict(re.findall(r"(\w+)=([\d_x\-]+)", window[1])) if window else {}
    count = out.shape[res.index("b")] * out.shape[res.index("f")] * kernel.shape[rhs.index("i")]
    for d in range(len(lhs) - 2):
        n, k, m = (a.shape[s.index(str(d))] for a, s in ((source, lhs), (kernel, rhs), (out, res)))
        stride, into, by = (
            int(_at(options, o, d, "1")) for o in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(_at(options, "pad", d, "0_0").split("_")[0])
        place = np.arange(m)[:, None] * stride + np.arange(k)[None] * by - low
        count *= int(np.sum((place >= 0) & (place < (n - 1) * into + 1) & (place % into == 0)))
    return count


def _at(options: dict[str, str], name: str, axis: int, default: str) -> str:
    return options[name].split("x")[axis] if name in options else default


# ------------------------------------------------------------------ bytes


def _moved(one: Instruction, here: Computation, module: Module) -> float:
    if one.kind in _VIEWS or one.kind.endswith(("-done", "-update")):
        return 0.0
    read = [here[name] for name in one.operands if name in here]
    if one.kind in _SLICES:
        return _far(one.arrays) + _far(one.arrays if _lies_far(read[0]) else ())
    if one.kind in ("dynamic-update-slice", "scatter"):
        update = read[1 if one.kind == "dynamic-update-slice" else -1].arrays
        return 2.0 * _far(update) if _far(one.arrays) else _far(update)
    if one.kind == "copy-start":
        return _far(one.arrays[:1]) + _far(read[0].arrays)
    if one.kind.removesuffix("-start") in KINDS:
        return _far(results(one)) + sum(_far(r.arrays) for r in read)
    if one.kind == "fusion":
        return _fused(one, read, module)
    return _far(one.arrays) + sum(_far(r.arrays) for r in read)


def _far(arrays: Sequence[Array]) -> float:
    """Returns the bytes of arrays that lie in the large memory."""
    return float(sum(a.bytes for a in arrays if a.space == 0))


def _lies_far(one: Instruction) -> bool:
    return any(a.space == 0 for a in one.arrays)


def _fused(one: Instruction, read: list[Instruction], module: Module) -> float:
    """Returns what a fusion reads and writes; of what it only slices, the slices."""
    callee = dict(module.called(one)).get("calls", "")
    inside = module.computations.get(callee, {})
    given = {int(p.text): p for p in inside.values() if p.kind == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for line in inside.values():
        for name in line.operands:
            users.setdefault(name, []).append(line)
    total, written = 0.0, _far(one.arrays)
    for i, operand in enumerate(read):
        if not _lies_far(operand) or i not in given:
            continue
        name = given[i].name
        uses = _through(name, users)
        if uses and all(u.kind in _SLICES and origin == u.operands[0] for u, origin in uses):
            total += sum(a.bytes for u, _ in uses for a in u.arrays)
        elif uses and all(u.kind == "dynamic-update-slice" and o == u.operands[0] for u, o in uses):
            # Written in place: only the update moves.
            updates = [inside[u.operands[1]] for u, _ in uses]
            total += sum(a.bytes for u in updates for a in u.arrays)
            written = min(written, float(sum(a.bytes for u in updates for a in u.arrays)))
        else:
            total += _far(operand.arrays)
    return total + written


def _through(name: str, users: dict[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
    """Returns who uses a value, or a view of it, and under what name."""
    found = []
    for u in users.get(name, []):
        if u.kind in ("bitcast", "copy", "get-tuple-element"):
            found += _through(u.name, users)
        else:
            found.append((u, name))
    return found
