"""Arrays on the devices of all processes, from what each process has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding


def spread(x: Any, sharding: Sharding) -> jax.Array:
    """Returns an array with a sharding, whose devices may be those of other processes, too.

    Args:
      x: an array that is on these devices already, or one that every process has, whole; each
        takes its part of it.
      sharding: where its parts go.
    """
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else _moved(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(x))
        keys = jax.make_array_from_callback(data.shape, sharding, lambda at: data[at])
        return jax.random.wrap_key_data(keys, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def _moved(x: jax.Array, sharding: Sharding) -> jax.Array:
    return jax.jit(lambda x: x, out_shardings=sharding)(x)


def on_host(x: Any) -> np.ndarray:
    """Returns an array of any devices as a whole, in every process."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def together(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxopt_models {name}")
