"""What the machine can do: bytes it reads and products of bytes it computes in a second."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import pathlib
import shlex
import subprocess
import tempfile

import numpy as np

from jaxopt_models.kernels import _build

from ._contest import Run

_SOURCE = """
#include <cstddef>
#include <cstdint>
#include "_native/isa.h"
extern "C" uint64_t read_all(const uint64_t* p, size_t n) {
  // Lanes enough for eight vectors of any width.
  uint64_t s[64] = {};
  for (size_t i = 0; i + 64 <= n; i += 64) for (int j = 0; j < 64; j++) s[j] ^= p[i + j];
  for (int j = 1; j < 64; j++) s[0] ^= s[j];
  return s[0];
}
extern "C" float multiply(size_t n) {
  jom::Ints acc[12];
  for (int i = 0; i < 12; i++) acc[i] = jom::ints(i);
  uint8_t bytes[64] = {1, 2, 3};
  jom::Bytes w = jom::load_bytes(bytes);
  for (size_t i = 0; i < n; i++) {
    JOM_UNROLL
    for (int j = 0; j < 12; j++) acc[j] = jom::dot4(acc[j], w, 16909060);
  }
  jom::Floats sum = jom::to_floats(acc[0]);
  for (int i = 1; i < 12; i++) sum = sum + jom::to_floats(acc[i]);
  float out[16];
  jom::store(out, sum);
  return out[0];
}
"""
THREADS = os.cpu_count() or 1
PRODUCTS = 1 << 31


class Machine:
    """Compiled loops that read memory and multiply bytes, on all cores at once."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, out = pathlib.Path(folder, "m.cc"), pathlib.Path(folder, "m.so")
            source.write_text(_SOURCE)
            flags = [*_build.FLAGS, *_build.ISAS["native"], "-fvisibility=default", "-shared"]
            command = [*shlex.split(_build.compiler()), *flags, f"-I{_build.HERE}", str(source)]
            subprocess.run([*command, "-o", str(out)], check=True)
            self._lib = ctypes.CDLL(str(out))
        self._lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._lib.read_all.restype = ctypes.c_uint64
        self._lib.multiply.argtypes = [ctypes.c_size_t]
        self._lib.multiply.restype = ctypes.c_float
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)

    def reader(self, size: int) -> Run:
        """Returns a function that reads ``size`` bytes once, a part on each core."""
        data = np.ones(size // 8, np.uint64)
        each = len(data) // THREADS
        starts = [data.ctypes.data + 8 * each * i for i in range(THREADS)]

        def run() -> None:
            list(self._pool.map(lambda p: self._lib.read_all(p, each), starts))
            assert len(data)  # keeps it alive

        return run

    def multiplier(self) -> Run:
        """Returns a function that computes :data:`PRODUCTS` products of bytes on each core."""

        def run() -> None:
            list(self._pool.map(self._lib.multiply, [PRODUCTS // (12 * 64)] * THREADS))

        return run


def reading(size: int) -> Run:
    """Reads ``size`` bytes once."""
    return Machine().reader(size)


def multiplying() -> Run:
    """Multiplies bytes in registers as fast as the cores can."""
    return Machine().multiplier()
