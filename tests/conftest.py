"""Strict by default: rank promotion raises, warnings are errors, eight CPU devices."""

import collections
import gc
import os
import sys
import zlib

import jaxlib

# The first import of JAX in a process fixes these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the time goes into compiling thousands of tiny programs, a third of it into making
# them fast. CI runs the suite a second time on the newest JAX with TESTS_OPTIMIZED=1.
if not os.environ.get("TESTS_OPTIMIZED") and "--full" not in sys.argv:
    quick = ["--xla_backend_optimization_level=0"]
    if jaxlib.__version__.startswith("0.10."):
        # Halves what is left. Later versions have no other emitters, and an unknown flag ends all.
        quick += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flags + [flag for flag in quick if flag not in flags])

import jax
import numpy as np
import optax
import pytest

# The collector would look at all that was imported again and again, for a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 100)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    """What a test draws from the `RNG` of a module depends on its name, not on those before it."""
    seed = zlib.crc32(item.nodeid.encode())
    for module in list(sys.modules.values()):
        rng = vars(module).get("RNG")
        if isinstance(rng, np.random.Generator):
            rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


@pytest.fixture
def descend():
    """Trains `trainable` by a loss of `(trainable, x)` for each of `xs`, as one program."""

    def run(loss, tx, trainable, xs):
        def step(carry, x):
            trainable, state = carry
            value, grads = jax.value_and_grad(loss)(trainable, x)
            updates, state = tx.update(grads, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        def train(trainable, xs):
            (trained, _), values = jax.lax.scan(step, (trainable, tx.init(trainable)), xs)
            return trained, values

        return jax.jit(train)(trainable, xs)

    return run


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the full products too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    kept, dropped, seen = [], [], collections.Counter()
    for item in items:
        every = item.get_closest_marker("every")
        test = item.nodeid.partition("[")[0]
        left_out = every is not None and seen[test] % every.args[0]
        seen[test] += 1
        (dropped if left_out or "full" in item.keywords else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def key():
    """A fresh random key."""
    return jax.random.key(0)
