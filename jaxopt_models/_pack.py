"""Compressed parameters laid out once for the kernels of a target."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ._axes import Axes, Matrix
from ._encoded import Encoded, Masked, is_encoded
from ._moved import MOVED, is_moved
from .codebook import Clustered
from .kernels._layout import CHUNK, WIDTHS, Packed, to_panels
from .kernels._layout import pack as lay_out
from .kernels.binary import layout as signs
from .kernels.sparse import masks
from .quant import Quantized, Tabulated, WithInput
from .quant._tables import table_of
from .quant._xnor import WithSign


def pack(tree: Any, *, target: Literal["cpu"] | None = None) -> Any:
    """Lays out codes for the kernels of a target, once.

    What is laid out computes the same and rebuilds to the same bits, but is no longer trained,
    encoded again or divided along any axis: pack last. Parameters for which there is no layout
    stay as they are; ``accelerate(fn).explain(tree, ...)`` says why for each.

    Of a pruned parameter only what is kept is stored where that is faster: runs of 4, 8 or 16
    inputs that are kept or dropped together (:class:`jaxopt_models.prune.Block`), of `float32` and
    `bfloat16` up to half of them, of codes up to a 32nd for each bit; and of `float32` and
    `bfloat16` at most two of every four inputs.

    Args:
      tree: compressed parameters, or one leaf.
      target: ``"cpu"``, or ``None`` for the platform of JAX's default backend. On others nothing
        changes: kernels of a GPU, and XLA on a TPU, read a compressed parameter as it is stored.

    Returns:
      The same tree with other leaves.

    Raises:
      ValueError: for a target that is not known.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"w": jnp.eye(64)}, [jom.Rule("w", jom.quant.Int(bits=4))])
      >>> jom.pack(small, target="cpu")["w"].kind()
      'Packed'

    """
    if target is None:
        target = jax.default_backend()  # type: ignore[assignment]
    elif target not in ("cpu", "gpu", "cuda", "tpu"):
        raise ValueError(f"pack: target={target!r} is none of 'cpu', 'gpu', 'tpu' or None")
    if target != "cpu":
        return tree
    return jax.tree.map(lambda x: _packed(x) if is_encoded(x) else x, tree, is_leaf=is_encoded)


def _packed(leaf: Encoded) -> Encoded:
    if why_not(leaf):
        return leaf
    if isinstance(leaf, WithSign):
        return signs.laid_out(leaf)
    if isinstance(leaf, Masked) and not masks.why_not(leaf):
        return masks.laid_out(leaf)
    if is_moved(leaf):
        return dataclasses.replace(leaf, values=_packed(leaf.values))
    if isinstance(leaf, WithInput):
        shifted = not leaf.symmetric
        return dataclasses.replace(leaf, values=_laid_out(leaf.values, shifted))
    return _laid_out(leaf, False)


def why_not(leaf: Any) -> str:
    """Says why a leaf has no layout, ``""`` if it has one."""
    if isinstance(leaf, WithSign):
        return signs.why_not(leaf)
    if isinstance(leaf, Masked) and (
        not (why := masks.why_not(leaf)) or not isinstance(leaf.values, Quantized)
    ):
        return why
    if is_moved(leaf):
        if leaf.dtype not in (jnp.float32, jnp.bfloat16):
            return f"there is no layout for tensors of {leaf.dtype}"
        if isinstance(leaf, MOVED) and isinstance(leaf.values, Masked):
            return "there is no layout for a mask inside of it"
        return why_not(leaf.values)
    inner = leaf.values if isinstance(leaf, WithInput) else leaf
    if isinstance(inner, Packed):
        return "it is packed"
    if isinstance(inner, Masked):
        inner = inner.values
        if not isinstance(inner, Quantized) or not inner.signed:
            return "there is no layout for a mask around it; symmetric quant.Int has one"
    if not isinstance(inner, (Quantized, Tabulated, Clustered)):
        return f"there is no layout for {type(inner).__name__}" if is_encoded(inner) else "dense"
    if isinstance(inner, Clustered) and inner.out:
        return "there is no layout for outputs with codebooks of their own"
    if _needs_table(inner):
        if inner.bits > 4:
            return "there is no layout for tables of more than 16 values"
        if isinstance(leaf, WithInput) and not leaf.symmetric:
            return "there is no layout for tables whose input has a zero point"
    if is_encoded(inner.meaning) and inner.meaning.stack != inner.stack:
        return "its scales are stacked otherwise"
    if inner.dtype not in (jnp.float32, jnp.bfloat16):
        return f"there is no layout for tensors of {inner.dtype}"
    m = Matrix(inner.core, inner.out)
    groups = 1 if isinstance(inner, Clustered) else inner.scale.shape[-1]
    if not m.rows or not m.columns:
        return "it has no entry"
    if groups > 1 and m.rows // groups % CHUNK:
        return f"groups of {m.rows // groups} are no multiple of {CHUNK}"
    return ""


def _needs_table(leaf: Any) -> bool:
    """Says whether codes stand for values that are no uniform steps."""
    return isinstance(leaf, Clustered) or (isinstance(leaf, Tabulated) and _line(leaf) is None)


def _line(leaf: Tabulated) -> tuple[float, float] | None:
    """Returns start and step of evenly spaced values whose products are exact, or ``None``."""
    values = np.asarray(table_of(leaf.table).values, np.float64)
    if len(values) < 2:
        return None
    step = values[1] - values[0]
    even = np.array_equal(values, values[0] + step * np.arange(len(values)))
    exact = np.frexp(abs(step))[0] == 0.5 and (2 * values[0] / step).is_integer()
    return (float(values[0]), float(step)) if even and exact else None


def _laid_out(leaf: Any, shifted: bool) -> Packed:
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    run = _one
    for _ in inner.stack:
        run = jax.vmap(run, in_axes=(0, None))
    return run(inner, shifted)


def _one(leaf: Any, shifted: bool) -> Packed:
    """Lays out one core tensor."""
    # What all outputs share says nothing of which axes these are: by default the last.
    alone = not leaf.out and (isinstance(leaf, Clustered) or leaf.scale.shape[-1] == 1)
    m = Matrix(leaf.core, Axes().resolve(len(leaf.core)).out if alone else leaf.out)
    bits = 4 if _needs_table(leaf) else next(b for b in WIDTHS if b >= leaf.bits)
    offset = 1 << (bits - 1)
    q = m.view(leaf.integers())

    def by_column(x: jax.Array) -> jax.Array:
        if alone:
            return jnp.broadcast_to(x.reshape(1, 1), (1, m.columns))
        if leaf.block > 1:
            x = jnp.repeat(x, leaf.block, axis=-2)
        return x.reshape(m.columns, -1).T

    table = zero = None
    if isinstance(leaf, Clustered):
        scale, table = jnp.ones((1, m.columns), jnp.float32), leaf.codebook
    else:
        scale = by_column(leaf.scales())
    if isinstance(leaf, Tabulated) and _needs_table(leaf):
        table = jnp.asarray(table_of(leaf.table).values)
    if table is not None:
        table = jnp.pad(table.astype(jnp.float32), (0, 16 - table.shape[0]))
    elif isinstance(leaf, Tabulated):
        start, step = _line(leaf)  # type: ignore[misc]
        scale, zero = scale * step, jnp.full(scale.shape, -start / step - offset, jnp.float32)
    elif leaf.zero_point is not None:
        zero = by_column(leaf.zero_point.astype(jnp.float32)) - offset
    else:
        q = q + offset
    sums = None
    if shifted:
        runs = (q - offset).reshape(scale.shape[0], -1, m.columns)
        sums = jnp.sum(runs, axis=1).astype(jnp.float32)
        if zero is not None:
            sums = sums - runs.shape[1] * zero
    return Packed(
        lay_out(q, bits),
        to_panels(scale),
        None if zero is None else to_panels(zero),
        None if sums is None else to_panels(sums),
        table,
        tuple(leaf.core),
        m.out,
        bits,
        leaf.dtype_name,
    )
