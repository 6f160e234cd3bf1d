"""Bits: what an array really occupies, and how masks and codes are packed.

Everything is packed along the *last* axis, so that every other axis of a packed
array is an axis of the tensor it stands for and can be sliced, mapped or sharded.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# XLA stores these widths packed; every other width is held as bit planes.
_NATIVE = {
    (2, True): jnp.int2,
    (4, True): jnp.int4,
    (8, True): jnp.int8,
    (8, False): jnp.uint8,
    # Orbax cannot store `uint2` and `uint4`: their bits are held as two's complement.
    (2, False): jnp.int2,
    (4, False): jnp.int4,
}


def dtype_bits(dtype: Any) -> int:
    """Returns the bits one element of ``dtype`` occupies (`.itemsize` is wrong below 8)."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * dtype.itemsize
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return int(ml_dtypes.iinfo(dtype).bits)
    if jnp.issubdtype(dtype, jnp.floating):
        return int(ml_dtypes.finfo(dtype).bits)
    return 8 * dtype.itemsize


def wide_dtype(dtype: Any) -> jnp.dtype:
    """Returns the type to compute in: `float32`, or ``dtype`` itself where that is wider."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def array_bits(x: Any) -> int:
    """Returns the bits an array, tracer or shape-dtype struct occupies."""
    return math.prod(x.shape) * dtype_bits(x.dtype)


def packed_length(n: int) -> int:
    """Returns the number of bytes that hold ``n`` bits."""
    return -(-n // 8)


def pack_bits(x: jax.Array) -> jax.Array:
    """Packs booleans along the last axis, first element in the lowest bit.

    Args:
      x: booleans, shape `[..., n]`.

    Returns:
      `uint8` of shape `[..., ceil(n / 8)]`; the bits beyond `n` are zero.

    Example:
      >>> pack_bits(jnp.array([True, False, True, False, False, False, False, False, True]))
      Array([5, 1], dtype=uint8)
    """
    return jnp.packbits(x, axis=-1, bitorder="little")


def unpack_bits(packed: jax.Array, n: int) -> jax.Array:
    """Undoes :func:`pack_bits`.

    Args:
      packed: `uint8` of shape `[..., ceil(n / 8)]`.
      n: length of the last axis of the booleans.

    Returns:
      Booleans, shape `[..., n]`.

    Example:
      >>> unpack_bits(jnp.array([5], jnp.uint8), 3)
      Array([ True, False,  True], dtype=bool)
    """
    return jnp.unpackbits(packed, axis=-1, count=n, bitorder="little").astype(bool)


def has_planes(bits: int) -> bool:
    """Says whether codes of this width are held as bit planes instead of a JAX integer type."""
    return (bits, True) not in _NATIVE


def pack_codes(codes: jax.Array, *, bits: int, signed: bool) -> jax.Array:
    """Packs integer codes to ``bits`` bits each.

    Widths 2, 4 and 8 become `jnp.int2/int4/int8`, which XLA packs; unsigned codes are the
    same bits of `int2` and `int4`, or `uint8`. Other widths become bit planes: plane `b`
    holds bit `b` of two's complement.

    Args:
      codes: integers in the range of the width, shape `[..., n]`.
      bits: width of a code, 1 to 8.
      signed: whether codes are two's complement.

    Returns:
      `[..., n]` of a packed integer type, or `uint8` planes `[..., bits, ceil(n / 8)]`.

    Example:
      >>> pack_codes(jnp.array([0, 1, 2, 3]), bits=3, signed=False)
      Array([[10],
             [12],
             [ 0]], dtype=uint8)
    """
    if not has_planes(bits):
        if not signed and bits < 8:
            codes = codes.astype(jnp.int32)
            codes = codes - ((codes >> (bits - 1)) << bits)
        return codes.astype(_NATIVE[bits, signed])
    wide = codes.astype(jnp.int32)
    return pack_bits(jnp.stack([(wide >> b) & 1 for b in range(bits)], axis=-2).astype(bool))


def unpack_codes(packed: jax.Array, n: int, *, bits: int, signed: bool) -> jax.Array:
    """Undoes :func:`pack_codes`.

    Args:
      packed: what :func:`pack_codes` returned.
      n: length of the last axis of the codes.
      bits: width of a code.
      signed: whether codes are two's complement.

    Returns:
      `int32` codes, shape `[..., n]`.

    Example:
      >>> unpack_codes(jnp.array([[10], [12], [0]], jnp.uint8), 4, bits=3, signed=False)
      Array([0, 1, 2, 3], dtype=int32)
    """
    if not has_planes(bits):
        codes = packed.astype(jnp.int32)
        return codes if signed else codes & ((1 << bits) - 1)
    planes = unpack_bits(packed, n).astype(jnp.int32)
    codes = sum(planes[..., b, :] << b for b in range(bits))
    return codes - ((codes >> (bits - 1)) << bits) if signed else codes


def packed_layout(
    core: tuple[int, ...], *, bits: int, signed: bool
) -> tuple[tuple[int, ...], jnp.dtype]:
    """Returns the shape and type that :func:`pack_codes` gives codes of shape ``core``.

    The codes of a single number, `()`, are packed as `[1]`.
    """
    core = tuple(core) or (1,)
    if has_planes(bits):
        return (*core[:-1], bits, packed_length(core[-1])), jnp.dtype(jnp.uint8)
    return core, jnp.dtype(_NATIVE[bits, signed])


def is_concrete(x: Any) -> bool:
    """Says whether ``x`` holds values now (not a tracer, not a shape-dtype struct)."""
    return isinstance(x, (np.ndarray, jax.Array)) and not isinstance(x, jax.core.Tracer)
