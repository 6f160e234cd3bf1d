"""The models in linen."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Axes(nn.Module):
    """A general layer to two output axes and one from two input axes."""

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.DenseGeneral((5, 4), name="up")(x))
        return nn.DenseGeneral(7, axis=(-2, -1), name="down")(h)


class Layer(nn.Module):
    """A layer as ``nn.scan`` wants it."""

    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(h.shape[-1], name="dense")(h)), None


class Scanned(nn.Module):
    """Three layers in a scan."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer: Any = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


class Rematted(nn.Module):
    """A rematerialised layer and one more."""

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.remat(nn.Dense)(10, name="first")(x))
        return nn.Dense(6, name="second")(h)


class Tied(nn.Module):
    """A tiny language model whose embedding is its head too."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(10, 6, name="embed")
        h = jnp.tanh(nn.Dense(8, name="up")(embed(ids)))
        return embed.attend(nn.Dense(6, name="down")(h))


class Normed(nn.Module):
    """A dense layer and batch norm with the averages."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(10, name="dense")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(h)


MODELS = {
    "dense": lambda: nn.Dense(10),
    "dense general": Axes,
    "attention": lambda: nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12),
    "einsum": lambda: nn.Einsum((5, 4, 3), "nta,hab->nthb", use_bias=False),
    "einsum stacked": lambda: nn.Einsum((3, 4, 6), "ebi,eio->ebo", use_bias=False),
    "conv 1d": lambda: nn.Conv(6, (3,), strides=(2,)),
    "conv 2d dilated": lambda: nn.Conv(6, (3, 2), kernel_dilation=(2, 1), padding="VALID"),
    "conv 3d": lambda: nn.Conv(6, (2, 3, 2), padding="VALID"),
    "conv transpose": lambda: nn.ConvTranspose(5, (3, 2), strides=(2, 2)),
    "conv transpose 1d": lambda: nn.ConvTranspose(6, (3,), strides=(2,), padding="VALID"),
    "conv grouped": lambda: nn.Conv(6, (3, 2), feature_group_count=2),
    "conv depthwise": lambda: nn.Conv(8, (2, 3), feature_group_count=4, padding="VALID"),
    "conv 1x1": lambda: nn.Conv(6, (1, 1)),
    "scan": Scanned,
    "remat": Rematted,
    "remat scan": functools.partial(Scanned, remat=True),
    "tied embedding": Tied,
    "embedding": lambda: nn.Embed(10, 6),
    "lstm": lambda: nn.RNN(nn.LSTMCell(6)),
    "optimized lstm": lambda: nn.RNN(nn.OptimizedLSTMCell(6)),
    "batch norm": Normed,
}
