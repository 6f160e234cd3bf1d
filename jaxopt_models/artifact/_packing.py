"""Codes and masks in NumPy, packed exactly as `jaxopt_models._bits` packs them in JAX.

Decoded files stay in NumPy until everything is checked; nothing is compiled on the way,
and nothing is wider than a byte an entry.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np

from .._bits import has_planes


def pack_mask(keep: np.ndarray, core: tuple[int, ...]) -> np.ndarray:
    """Packs booleans `[*stack, *core]` along the last axis of the core, as one if it has none."""
    return np.packbits(keep if core else keep[..., None], axis=-1, bitorder="little")


def unpack_mask(packed: Any, core: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Undoes :func:`pack_mask`: booleans of ``shape``."""
    n = core[-1] if core else 1
    bits = np.unpackbits(np.asarray(packed), axis=-1, count=n, bitorder="little")
    return bits.view(bool).reshape(shape)


def pack_codes(codes: np.ndarray, core: tuple[int, ...], *, bits: int, signed: bool) -> np.ndarray:
    """Packs codes, `int8` or `uint8` `[*stack, *core]`, to ``bits`` bits each."""
    if not has_planes(bits):
        codes = (codes if core else codes[..., None]).view(np.int8)
        if bits == 8:
            return codes if signed else codes.view(np.uint8)
        # Also unsigned codes have the bits of two's complement.
        spare = 8 - bits
        return (codes << spare >> spare).astype(getattr(ml_dtypes, f"int{bits}"))
    return np.stack([pack_mask(codes >> b & 1, core) for b in range(bits)], axis=-2)


def unpack_codes(
    packed: Any, core: tuple[int, ...], shape: tuple[int, ...], *, bits: int, signed: bool
) -> np.ndarray:
    """Undoes :func:`pack_codes`: `int8` or `uint8` of ``shape``."""
    packed = np.asarray(packed)
    dtype = np.dtype(np.int8 if signed else np.uint8)
    if not has_planes(bits):
        codes = packed.astype(np.uint8 if bits == 8 and not signed else np.int8).view(dtype)
        return (codes if signed else codes & np.uint8((1 << bits) - 1)).reshape(shape)
    codes = np.zeros(shape, np.uint8)
    for b in range(bits):
        plane = unpack_mask(packed[..., b, :], core, shape).view(np.uint8)
        # The highest bit of two's complement also fills the bits above it.
        codes |= plane * np.uint8(256 - (1 << b) if signed and b == bits - 1 else 1 << b)
    return codes.view(dtype)


def to_jax(x: np.ndarray) -> Any:
    """Returns a JAX array, or ``x`` itself where JAX would change or not take its type."""
    if x.dtype.name.startswith("float6_") or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x
    # Unlike `jnp.asarray`, this compiles nothing for a new shape.
    return jax.device_put(x)
