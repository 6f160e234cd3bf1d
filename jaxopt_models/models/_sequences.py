"""What the models of both frameworks ask of sequences."""

import jax
import jax.numpy as jnp


def indices(tokens: jax.Array, length: int) -> jax.Array:
    """Checks that tokens are integers `[B, T]` with `T` at most `length`."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] > length:
        raise ValueError(f"tokens have shape {tokens.shape}; give [B, T] with T up to {length}.")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens have dtype {tokens.dtype}; give integers.")
    return tokens


def vectors(x: jax.Array, features: int) -> jax.Array:
    """Checks that a sequence is `[B, T, features]` with at least one step."""
    x = jnp.asarray(x)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != features:
        raise ValueError(f"the sequence has shape {x.shape}; give [B, T, {features}], T not 0.")
    return x
