"""What the device at hand can do: bytes it reads and operations it computes in a second."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._timing import interleaved
from .kernels import binary, matmul, status
from .kernels._layout import PANEL, Packed, shape_of
from .kernels.binary import layout as signs
from .quant import WithInput
from .quant._xnor import WithSign

#: Bytes that are read first; twice as many until reading them takes :data:`LEAST` seconds.
SMALLEST, LARGEST = 1 << 28, 1 << 30
LEAST = 4e-3
#: Rows, inputs and outputs of the product that is computed first, and of the largest.
FEWEST, MOST = 512, 1 << 14


@dataclasses.dataclass(frozen=True)
class Limits:
    """What bounds a program on a device; a multiply-add counts as two operations.

    Args:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      device: its name.
      bandwidth: bytes of memory that are read in a second, of more than caches hold.
      flops: operations on `float32` in a second, of a product of matrices.
      integer_ops: operations on bytes in a second, of a compiled kernel that rounds its input to
        bytes, too; 0 where there are no kernels.
      sign_ops: operations on signs in a second, likewise.
    """

    platform: str
    device: str
    bandwidth: float
    flops: float
    integer_ops: float = 0.0
    sign_ops: float = 0.0

    def __str__(self) -> str:
        figures = [f"{self.bandwidth / 1e9:.3g} GB/s", f"{self.flops / 1e9:.3g} GFLOP/s (float32)"]
        if self.integer_ops:
            figures.append(f"{self.integer_ops / 1e9:.3g} GOP/s (bytes)")
        return f"{self.device}: {', '.join(figures)}"


def limits() -> Limits:
    """Measures the default device, once in a process; that takes a fraction of a second.

    Returns:
      The best of a few tries of simple programs; where these do not reach what the device can do,
      a program may be somewhat faster.
    """
    device = next(iter(jnp.zeros(()).devices()))
    kernels = status().path if device.platform == "cpu" else ""
    return _measured(device.platform, device.device_kind, kernels)


@functools.cache
def _measured(platform: str, device: str, kernels: str) -> Limits:
    integer_ops = sign_ops = 0.0
    if kernels:
        integer_ops = _operations(matmul.matmul, _bytes)
        sign_ops = _operations(binary.matmul, _signs)
    flops = _operations(jnp.matmul, lambda n: jnp.zeros((n, n), jnp.float32))
    return Limits(platform, device, _bandwidth(), flops, integer_ops, sign_ops)


def _bandwidth() -> float:
    size = SMALLEST
    while True:
        read, words = jax.jit(jnp.max), jnp.zeros(size // 4, jnp.float32)
        seconds = _seconds(lambda: read(words))  # noqa: B023
        if seconds >= LEAST or size >= LARGEST:
            return size / seconds
        size *= 2


def _operations(product: Callable[..., jax.Array], weight: Callable[[int], Any]) -> float:
    n = FEWEST
    while True:
        run, x, w = jax.jit(product), jnp.ones((n, n), jnp.float32), weight(n)
        seconds = _seconds(lambda: run(x, w))  # noqa: B023
        if seconds >= LEAST or n >= MOST:
            return 2 * n**3 / seconds
        n *= 2


def _seconds(run: Callable[[], jax.Array]) -> float:
    return min(interleaved({"": lambda: run().block_until_ready()}, rounds=7, least=0)[""])


def _bytes(n: int) -> WithInput:
    codes = jnp.zeros(shape_of(n, n, 8), jnp.uint8)
    scale = jnp.ones((codes.shape[0], 1, PANEL), jnp.float32)
    packed = Packed(codes, scale, None, None, None, (n, n), (1,), 8, "float32")
    return WithInput(packed, None, None, (n, n), 8, "row", True)


def _signs(n: int) -> WithSign:
    lead = n // signs.PANEL, n // signs.WORD
    words = jnp.zeros((*lead, signs.PANEL), jnp.uint32)
    scale = jnp.ones((lead[0], signs.PANEL), jnp.float32)
    return WithSign(signs.PackedSigns(words, scale, (n, n), (1,), "float32"), (n, n), False)
