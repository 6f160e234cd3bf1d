"""What the models of both frameworks do to images."""

import jax
import jax.numpy as jnp

from ..data import normalize


def pixels(images: jax.Array) -> jax.Array:
    """Gives `float[B, 28, 28, 1]`; bytes are divided by 255, floats are taken to be so already."""
    images = jnp.asarray(images)
    if images.shape[1:] not in ((28, 28), (28, 28, 1)):
        raise ValueError(f"images have shape {images.shape}; give [B, 28, 28] or [B, 28, 28, 1].")
    if images.dtype == jnp.uint8:
        images = normalize(images)
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images have dtype {images.dtype}; give uint8 pixels 0 to 255, or floats in [0, 1]."
        )
    return images.reshape(-1, 28, 28, 1)


def halve(x: jax.Array) -> jax.Array:
    """Takes the largest of each 2 x 2 pixels, `[B, H, W, C]` to `[B, H / 2, W / 2, C]`.

    The same values as max pooling; its gradient trains twice as fast on a CPU, where XLA
    scatters that of a pooling window entry by entry.
    """
    b, h, w, c = x.shape
    return jnp.max(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def colors(images: jax.Array) -> jax.Array:
    """Checks that images are floats `[B, H, W, 3]`, normalized by the caller."""
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images have shape {images.shape}; give [B, H, W, 3].")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images have dtype {images.dtype}; give normalized floats.")
    return images
