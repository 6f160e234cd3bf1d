"""The models in nnx."""

import functools

import jax.numpy as jnp
from flax import nnx


class Axes(nnx.Module):
    """A general layer to two output axes and one from two input axes."""

    def __init__(self, rngs):
        self.up = nnx.LinearGeneral(6, (5, 4), rngs=rngs)
        self.down = nnx.LinearGeneral((5, 4), 7, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class Layer(nnx.Module):
    """A layer of a stack."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, h):
        return jnp.tanh(self.dense(h))


class Scanned(nnx.Module):
    """Three layers in a scan."""

    def __init__(self, rngs, remat=False):
        self.remat = remat

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return Layer(rngs)

        self.layers = layers(rngs)

    def __call__(self, x):
        def step(layer, h):
            return layer(h)

        step = nnx.remat(step, prevent_cse=False) if self.remat else step
        return nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


class Rematted(nnx.Module):
    """A rematerialised layer and one more."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 10, rngs=rngs)
        self.second = nnx.Linear(10, 6, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.remat(lambda layer, h: jnp.tanh(layer(h)))(self.first, x))


class Tied(nnx.Module):
    """A tiny language model whose embedding is its head too."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.down(jnp.tanh(self.up(self.embed(ids)))))


class Normed(nnx.Module):
    """A dense layer and batch norm with the averages."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 10, rngs=rngs)
        self.norm = nnx.BatchNorm(10, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def _attention(rngs):
    return nnx.MultiHeadAttention(
        num_heads=3, in_features=6, qkv_features=12, decode=False, rngs=rngs
    )


def _einsum(form, shape):
    return lambda rngs: nnx.Einsum(form, shape, rngs=rngs)


def _conv(ins, outs, kernel, layer=nnx.Conv, **options):
    return lambda rngs: layer(ins, outs, kernel, rngs=rngs, **options)


_transposed = functools.partial(_conv, layer=nnx.ConvTranspose)

MODELS = {
    "dense": lambda rngs: nnx.Linear(8, 10, rngs=rngs),
    "dense general": Axes,
    "attention": _attention,
    "einsum": _einsum("nta,hab->nthb", (5, 4, 3)),
    "einsum stacked": _einsum("ebi,eio->ebo", (3, 4, 6)),
    "conv 1d": _conv(4, 6, (3,), strides=(2,)),
    "conv 2d dilated": _conv(2, 6, (3, 2), kernel_dilation=(2, 1), padding="VALID"),
    "conv 3d": _conv(2, 6, (2, 3, 2), padding="VALID"),
    "conv transpose": _transposed(2, 5, (3, 2), strides=(2, 2)),
    "conv transpose 1d": _transposed(4, 6, (3,), strides=(2,), padding="VALID"),
    "conv grouped": _conv(4, 6, (3, 2), feature_group_count=2),
    "conv depthwise": _conv(4, 8, (2, 3), feature_group_count=4, padding="VALID"),
    "conv 1x1": _conv(4, 6, (1, 1)),
    "scan": Scanned,
    "remat": Rematted,
    "remat scan": functools.partial(Scanned, remat=True),
    "tied embedding": Tied,
    "embedding": lambda rngs: nnx.Embed(10, 6, rngs=rngs),
    "lstm": lambda rngs: nnx.RNN(nnx.LSTMCell(4, 6, rngs=rngs)),
    "optimized lstm": lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(4, 6, rngs=rngs)),
    "batch norm": Normed,
}
