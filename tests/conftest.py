"""Strict by default: rank promotion raises, warnings are errors, eight CPU devices."""

import os
import sys

# The first import of JAX in a process fixes these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the time goes into compiling thousands of tiny programs, a third of it into making
# them fast. CI runs the suite a second time on the newest JAX with TESTS_OPTIMIZED=1.
if not os.environ.get("TESTS_OPTIMIZED") and "--full" not in sys.argv:
    level = "--xla_backend_optimization_level=0"
    if level not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {level}".strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the full products too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    kept = [item for item in items if "full" not in item.keywords]
    dropped = [item for item in items if "full" in item.keywords]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def key():
    """A fresh random key."""
    return jax.random.key(0)
