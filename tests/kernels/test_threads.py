"""Many threads call programs of several kernels, on fewer cores: none waits for ever."""

import os
import subprocess
import sys

import pytest

from jaxopt_models import kernels

if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("processes cannot be kept to a core here", allow_module_level=True)

PROGRAM = """
import os, sys, threading
before, after, calls = (int(a) for a in sys.argv[1:])
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[:before])
import jax, jax.numpy as jnp, numpy as np
import jaxopt_models as jom
from jaxopt_models import prune, quant

rng = np.random.default_rng(0)
shapes = {"conv": (3, 3, 32, 64), "eight": (64, 512), "four": (512, 512), "signs": (512, 512),
          "blocks": (512, 512), "pairs": (512, 64)}
block = prune.Magnitude(sparsity=0.75, structure=prune.Block(4, 1))
recipe = [
    jom.Rule("conv", quant.Int(bits=8)),
    jom.Rule("eight", jom.chain(quant.Int(bits=8), quant.Input(bits=8))),
    jom.Rule("four", quant.Int(bits=4, group=32)),
    jom.Rule("signs", quant.XNOR()),
    jom.Rule("blocks", block),
    jom.Rule("pairs", prune.Magnitude(structure=prune.NofM(2, 4))),
]

def fn(p, x):
    x = jax.lax.conv_general_dilated(
        x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = x.mean(1).reshape(-1, 64)
    for name in ("eight", "four", "signs", "blocks", "pairs"):
        x = jnp.tanh(x @ p[name])
    return x

params = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
small = jom.pack(jom.compress(params, recipe), target="cpu")
x = jnp.asarray(rng.standard_normal((3, 7, 7, 32), np.float32))
run = jom.accelerate(fn)
assert all(" on cpu" in row["runs"] for row in run.explain(small, x))
run = jax.jit(run)
want = np.asarray(run(small, x))
# The threads of XLA are those of the cores before; all of them move.
for task in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(task), cores[:after])
wrong = []

def work():
    for _ in range(calls):
        if not np.array_equal(run(small, x), want):
            wrong.append(1)

threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(wrong), "wrong of", 4 * calls)
"""


def hang(before, after, calls, limit):
    if len(os.sched_getaffinity(0)) < max(before, after):
        pytest.skip("there are not enough cores")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", PROGRAM, str(before), str(after), str(calls)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    assert done.stdout == f"0 wrong of {4 * calls}\n", done.stderr[-2000:]


def test_threads_that_share_one_core():
    hang(2, 1, 25, 120)


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1)])
def test_a_thousand_calls_of_each_thread(before, after):
    hang(before, after, 1000, 600)
