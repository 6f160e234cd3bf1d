"""Multiply-adds of a batch of one, by hand, for each weight of each reference model.

`HAND[name]` is `(build, args, macs)`: `build()` gives `(fn, params)` with shapes in place of
arrays, `args` are the shapes of the other arguments of `fn`, `macs` has an entry for each weight
that something is multiplied with. Looking up a row of an embedding multiplies nothing, biases and
normalizations are not counted, and no weight has a part in the products of queries, keys and
values. Zeros of a padding count as pixels.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxopt_models import functional, models


def conv(out_h, out_w, kernel_h, kernel_w, channels, features):
    return out_h * out_w * kernel_h * kernel_w * channels * features


def dense(rows, inputs, outputs):
    return rows * inputs * outputs


LENET5 = {
    "conv1/kernel": conv(24, 24, 5, 5, 1, 20),
    "conv2/kernel": conv(8, 8, 5, 5, 20, 50),
    "ip1/kernel": dense(1, 800, 500),
    "ip2/kernel": dense(1, 500, 10),
}

RESNET18 = {
    "conv1/kernel": conv(112, 112, 7, 7, 3, 64),
    "stage1_block1/conv1/kernel": conv(56, 56, 3, 3, 64, 64),
    "stage1_block1/conv2/kernel": conv(56, 56, 3, 3, 64, 64),
    "stage1_block2/conv1/kernel": conv(56, 56, 3, 3, 64, 64),
    "stage1_block2/conv2/kernel": conv(56, 56, 3, 3, 64, 64),
    "stage2_block1/conv1/kernel": conv(28, 28, 3, 3, 64, 128),
    "stage2_block1/conv2/kernel": conv(28, 28, 3, 3, 128, 128),
    "stage2_block1/conv_shortcut/kernel": conv(28, 28, 1, 1, 64, 128),
    "stage2_block2/conv1/kernel": conv(28, 28, 3, 3, 128, 128),
    "stage2_block2/conv2/kernel": conv(28, 28, 3, 3, 128, 128),
    "stage3_block1/conv1/kernel": conv(14, 14, 3, 3, 128, 256),
    "stage3_block1/conv2/kernel": conv(14, 14, 3, 3, 256, 256),
    "stage3_block1/conv_shortcut/kernel": conv(14, 14, 1, 1, 128, 256),
    "stage3_block2/conv1/kernel": conv(14, 14, 3, 3, 256, 256),
    "stage3_block2/conv2/kernel": conv(14, 14, 3, 3, 256, 256),
    "stage4_block1/conv1/kernel": conv(7, 7, 3, 3, 256, 512),
    "stage4_block1/conv2/kernel": conv(7, 7, 3, 3, 512, 512),
    "stage4_block1/conv_shortcut/kernel": conv(7, 7, 1, 1, 256, 512),
    "stage4_block2/conv1/kernel": conv(7, 7, 3, 3, 512, 512),
    "stage4_block2/conv2/kernel": conv(7, 7, 3, 3, 512, 512),
    "head/kernel": dense(1, 512, 1000),
}

# The encoder of Vaswani et al. with their vocabulary.
BASE = {"vocab": 37000, "width": 512, "heads": 8, "layers": 6, "length": 512}

LAYER = {
    "attention/query/kernel": dense(128, 512, 8 * 64),
    "attention/key/kernel": dense(128, 512, 8 * 64),
    "attention/value/kernel": dense(128, 512, 8 * 64),
    "attention/out/kernel": dense(128, 8 * 64, 512),
    "up/kernel": dense(128, 512, 2048),
    "down/kernel": dense(128, 2048, 512),
}
TRANSFORMER = {f"layer{i}/{path}": macs for i in range(1, 7) for path, macs in LAYER.items()}
SCANNED = {f"layers/{path}": 6 * macs for path, macs in LAYER.items()}
TIED = {"tokens/embedding": dense(128, 512, 37000)}

LSTM = {
    "rnn/cell/ii/kernel": dense(28, 28, 128),
    "rnn/cell/if/kernel": dense(28, 28, 128),
    "rnn/cell/ig/kernel": dense(28, 28, 128),
    "rnn/cell/io/kernel": dense(28, 28, 128),
    "rnn/cell/hi/kernel": dense(28, 128, 128),
    "rnn/cell/hf/kernel": dense(28, 128, 128),
    "rnn/cell/hg/kernel": dense(28, 128, 128),
    "rnn/cell/ho/kernel": dense(28, 128, 128),
    "head/kernel": dense(1, 128, 10),
}


def build_linen(model, args, options):
    module = model(**options)
    return functional((module, jax.eval_shape(module.init, jax.random.key(0), *args)))


def build_nnx(twin, args, options):
    return functional(nnx.eval_shape(lambda: twin(**options, rngs=nnx.Rngs(0))))


def both(name, model, args, macs, **options):
    linen = functools.partial(build_linen, getattr(models, model), args, options)
    twin = functools.partial(build_nnx, getattr(models.nnx, model), args, options)
    return {name: (linen, args, macs), f"{name} nnx": (twin, args, macs)}


DIGIT = (jax.ShapeDtypeStruct((1, 28, 28), jnp.uint8),)
PHOTO = (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),)
TOKENS = (jax.ShapeDtypeStruct((1, 128), jnp.int32),)
ROWS = (jax.ShapeDtypeStruct((1, 28, 28), jnp.float32),)

HAND = {
    **both("LeNet5", "LeNet5", DIGIT, LENET5),
    **both("ResNet18", "ResNet18", PHOTO, RESNET18),
    **both("Transformer", "Transformer", TOKENS, TRANSFORMER, **BASE),
    **both("Transformer tied", "Transformer", TOKENS, TRANSFORMER | TIED, **BASE, tied=True),
    **both("Transformer scanned", "Transformer", TOKENS, SCANNED, **BASE, scan=True),
    **both("LSTM", "LSTM", ROWS, LSTM, features=28, width=128, classes=10),
}
