"""What of a mask the kernels can skip, and the leaf of what is left."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._axes import Matrix
from ..._bits import is_concrete
from ..._encoded import Encoded, Masked, is_encoded
from ...quant import Quantized
from .._layout import WIDTHS
from .layout import PANEL, RUNS, UNITS, PackedBlocks, PackedPairs

#: Share of kept floats up to which they are faster than all of them; for codes it is the share of
#: the bits of a `float32` that a code has, as all of them together are faster, too.
MOST = 0.5


def why_not(leaf: Masked) -> str:
    """Says why what a mask keeps has no layout of its own, ``""`` if it has one."""
    found = _found(leaf)
    return found if isinstance(found, str) else ""


def laid_out(leaf: Masked) -> Encoded:
    """Lays out what is kept of a leaf for which :func:`why_not` has no reason."""
    m, unit = _found(leaf)  # type: ignore[misc]
    codes = isinstance(leaf.values, Quantized)
    values = leaf.values.integers() if codes else leaf.values
    flat = np.asarray(values.astype(jnp.int8) if codes else values).reshape(-1, *leaf.core)
    dense, keep = _matrices(flat, m), _keep(leaf, m)
    if not unit:
        parts = [_pairs(w, k) for w, k in zip(dense, keep, strict=True)]
        return PackedPairs(*_stacked(parts, leaf.stack), tuple(leaf.core), m.out)
    parts = [_blocks(w, k, unit) for w, k in zip(dense, keep, strict=True)]
    most = max(len(index) for _, index, _ in parts)
    parts = [
        (np.pad(v, ((0, most - len(v)), (0, 0))), np.pad(i, (0, most - len(i))), s)
        for v, i, s in parts
    ]
    scale = leaf.values.scales().astype(jnp.float32) if codes else None
    if scale is not None:
        scale = scale.reshape(*leaf.stack, m.columns)
    name = str(leaf.dtype)
    return PackedBlocks(*_stacked(parts, leaf.stack), scale, tuple(leaf.core), m.out, name)


def _found(leaf: Masked) -> tuple[Matrix, int] | str:
    """Returns the matrix and the inputs of a unit, 0 for pairs; or why there are none."""
    values, ndim = leaf.values, len(leaf.core)
    codes = isinstance(values, Quantized)
    if is_encoded(values) and not codes:
        return f"there is no layout for a mask around {values.kind()}"
    if codes and (not values.signed or values.scale.shape[-1] > 1 or values.block > 1):
        return "there is a layout for a mask around symmetric codes with a scale for each output"
    if codes and is_encoded(values.scale):
        return "there is no layout for scales that are encoded"
    if leaf.dtype not in (jnp.float32, jnp.bfloat16):
        return f"there is no layout for tensors of {leaf.dtype}"
    if not all(map(is_concrete, jax.tree.leaves(leaf))):
        return "it is not laid out, as pack does where inputs are kept or dropped together"
    if not leaf.size or ndim < 2:
        return "it is no matrix with entries"
    most = next(b for b in WIDTHS if b >= values.bits) / 32 if codes else MOST
    # A mask alone does not say which axes are outputs: the last as a rule, or the first.
    outs = [values.out] if codes else [(ndim - 1,), (0,)]
    views = [Matrix(tuple(leaf.core), tuple(out)) for out in outs]
    reasons = []
    for m in views:
        why = _unit(_keep(leaf, m), most)
        if not isinstance(why, str):
            return m, why
        reasons.append(why)
    pairs = [m for m in views if not codes and _in_pairs(_keep(leaf, m))]
    return (pairs[0], 0) if pairs else reasons[0]


def _keep(leaf: Masked, m: Matrix) -> np.ndarray:
    """Returns the masks `[stack, rows, columns]`."""
    n = leaf.core[-1]
    bits = np.unpackbits(np.asarray(leaf.mask), axis=-1, count=n, bitorder="little").astype(bool)
    return _matrices(bits.reshape(-1, *leaf.core), m)


def _matrices(x: np.ndarray, m: Matrix) -> np.ndarray:
    """Views `[stack, *core]` as `[stack, rows, columns]`."""
    order = (0, *(1 + a for a in (*m.inner, *m.out)))
    return x.transpose(order).reshape(-1, m.rows, m.columns)


def _unit(keep: np.ndarray, most: float) -> int | str:
    """Returns how many neighbouring inputs are kept or dropped together, or why none are."""
    rows, share = keep.shape[1], float(keep.mean())
    for unit in UNITS:
        if rows % unit or rows // unit > 1 << 16:
            continue
        runs = keep.reshape(len(keep), rows // unit, unit, -1)
        if np.array_equal(runs.all(axis=2), runs.any(axis=2)):
            if share <= most:
                return unit
            return f"{share:.0%} are kept, and up to {most:.0%} would be faster alone"
    return "runs of inputs are not kept or dropped together"


def _in_pairs(keep: np.ndarray) -> bool:
    """Says whether at most two of every four inputs are kept."""
    rows = keep.shape[1]
    if rows % 4:
        return False
    return int(keep.reshape(len(keep), rows // 4, 4, -1).sum(axis=2).max()) <= 2


def _stacked(parts: list[tuple[Any, ...]], stack: tuple[int, ...]) -> list[jax.Array]:
    """Puts the parts of all tensors of a stack together."""
    found = [np.stack(p) for p in zip(*parts, strict=True)]
    return [jnp.asarray(p.reshape(*stack, *p.shape[1:])) for p in found]


def _blocks(w: np.ndarray, keep: np.ndarray, unit: int) -> tuple[np.ndarray, ...]:
    """Returns values, indices and starts of one matrix."""
    runs = w.reshape(len(w) // unit, unit, -1)
    alive = keep[::unit]
    column, index = np.nonzero(alive.T)
    starts = np.concatenate([[0], np.cumsum(alive.sum(axis=0))]).astype(np.int32)
    return runs[index, :, column], index.astype(np.uint16), starts


def _pairs(w: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns values and places of one matrix."""
    rows, columns = w.shape
    four, kept = w.reshape(-1, 4, columns), keep.reshape(-1, 4, columns)
    place = np.argsort(~kept, axis=1, kind="stable")[:, :2]
    values = np.where(
        np.take_along_axis(kept, place, axis=1), np.take_along_axis(four, place, axis=1), 0
    ).astype(w.dtype)
    chunks, panels = -(-rows // (4 * RUNS)), -(-columns // PANEL)
    width = ((0, chunks * RUNS - rows // 4), (0, 0), (0, panels * PANEL - columns))

    def turned(a: np.ndarray) -> np.ndarray:
        a = np.pad(a, width).reshape(chunks, RUNS, 2, panels, PANEL)
        return a.transpose(3, 0, 1, 2, 4)

    bits = turned(place.astype(np.uint32)).reshape(panels, chunks, 2 * RUNS, PANEL)
    shift = (2 * np.arange(2 * RUNS, dtype=np.uint32))[:, None]
    return turned(values), (bits << shift).sum(axis=2, dtype=np.uint32)
