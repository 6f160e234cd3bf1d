"""What the machine can do: bytes it reads and products of bytes it computes in a second."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import pathlib
import shlex
import subprocess
import tempfile
import time

import numpy as np

from jaxopt_models.kernels import _build

_SOURCE = """
#include <cstddef>
#include <cstdint>
#include "_native/isa.h"
extern "C" uint64_t read_all(const uint64_t* p, size_t n) {
  uint64_t s[8] = {};
  for (size_t i = 0; i + 8 <= n; i += 8) for (int j = 0; j < 8; j++) s[j] ^= p[i + j];
  return s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
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

    def reader(self, size: int):
        """Returns a function that reads ``size`` bytes once, a part on each core."""
        data = np.ones(size // 8, np.uint64)
        each = len(data) // THREADS
        starts = [data.ctypes.data + 8 * each * i for i in range(THREADS)]

        def run() -> None:
            list(self._pool.map(lambda p: self._lib.read_all(p, each), starts))
            assert len(data)  # keeps it alive

        return run

    def multiply_adds(self, n: int = 3_000_000) -> float:
        """Returns the products of bytes in a second, the best of some tries."""
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            list(self._pool.map(self._lib.multiply, [n] * THREADS))
            best = max(best, THREADS * n * 12 * 64 / (time.perf_counter() - start))
        return best
