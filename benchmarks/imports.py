"""What ``import jaxopt_models`` costs beyond JAX's own, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from ._rows import Row

_CODE = """
import time
t = time.perf_counter(); import jax, jax.numpy; a = time.perf_counter()
import jaxopt_models; print(a - t, time.perf_counter() - a)
"""


def run(*, quick: bool) -> list[Row]:
    """Imports several times; the first one, which may read from disk, is not counted."""
    found = []
    for _ in range(3 if quick else 8):
        child = subprocess.run(
            [sys.executable, "-c", _CODE], capture_output=True, text=True, check=True
        )
        found.append([float(x) for x in child.stdout.split()])
    jax, ours = (statistics.median(x) for x in zip(*found[1:], strict=True))
    return [
        Row("import, seconds beyond JAX's own", ours, "<= 1"),
        Row("import of JAX, seconds", jax),
    ]
