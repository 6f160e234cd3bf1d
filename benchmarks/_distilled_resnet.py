"""A small residual network for images of 28 x 28, in the widths of teacher and student."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxopt_models.models._images import pixels
from jaxopt_models.models._resnet import _Block, _convolve, blocks


class ResNet20(nn.Module):
    """ResNet-20 of He et al. for small images: a 3x3 stem, three stages of three basic blocks.

    Args:
      width: channels of the first stage; 16 in the paper.
    """

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps bytes `[B, 28, 28]` to logits `[B, 10]`; `embedding` names what the head sees."""
        x = pixels(images)
        x = nn.relu(_convolve(x, "1", 3, self.width, 1, train=train))
        for name, convolutions in blocks((3, 3, 3), "basic", self.width):
            x = _Block(convolutions, name=name)(x, train=train)
        x = checkpoint_name(jnp.mean(x, axis=(1, 2)), "embedding")
        return nn.Dense(10, name="head")(x)
