"""Memory that is kept is not faulted in anew in every call."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from jaxopt_models import kernels

if sys.argv[1] == "keep":
    assert kernels.keep_memory()
run = jax.jit(lambda x, w: jnp.sum(jnp.sin(x @ w) @ w.T, axis=-1))
x, w = jnp.ones((1 << 14, 16)), jnp.ones((16, 1 << 10))  # sines of 64 MiB
for _ in range(3):
    run(x, w).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    run(x, w).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def faults(how):
    command = [sys.executable, "-c", PROGRAM, how]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # as programs are compiled
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_temporary_arrays_stay():
    anew = faults("")
    if anew < 10_000:
        pytest.skip("the system maps large pages, or another library gives memory out")
    assert faults("keep") < 0.75 * anew
