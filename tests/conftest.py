"""Strict by default: rank promotion raises, warnings are errors, eight CPU devices."""

import os

# The first import of JAX in a process fixes these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
