"""The nnx twin of the transformer encoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from ._sequences import indices


class _Block(nnx.Module):
    """Attention and two dense layers, each normalized before and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """An encoder with normalization before each part, learned positions and GELU.

    The twin of the linen :class:`jaxopt_models.models.Transformer`. Every position sees every
    other. Layers `tokens` and `positions`, then `layer1`, `layer2` and so on with `norm1`,
    `attention`, `norm2`, `up` and `down` inside, then `norm`. With `scan` the layers are one,
    `layers`, whose parameters have a leading axis of `layers`.

    Args:
      vocab: number of tokens.
      width: length of the vector of each position.
      heads: number of heads that share the width.
      layers: number of layers.
      length: number of positions that are learned.
      hidden: length between `up` and `down`; `4 * width` if not given.
      tied: whether the output is multiplied with the embedding of each token.
      scan: whether the layers are run in a loop, which compiles faster.
      rngs: keys for the initial parameters.

    Example:
      >>> model = Transformer(
      ...     vocab=11, width=8, heads=2, layers=3, length=7, scan=True, rngs=nnx.Rngs(0)
      ... )
      >>> model.layers.up.kernel.shape
      (3, 8, 32)
      >>> model(jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 8)

    References:
      Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, 2017
      Xiong et al., `On Layer Normalization in the Transformer Architecture
      <https://arxiv.org/abs/2002.04745>`_, 2020
      Hendrycks and Gimpel, `Gaussian Error Linear Units
      <https://arxiv.org/abs/1606.08415>`_, 2016
      Press and Wolf, `Using the Output Embedding to Improve Language Models
      <https://arxiv.org/abs/1608.05859>`_, 2016
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        heads: int,
        layers: int,
        length: int,
        hidden: int | None = None,
        tied: bool = False,
        scan: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.length, self.tied, self.depth, self.scan = length, tied, layers, scan
        self.tokens = nnx.Embed(vocab, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)

        def block(rngs: nnx.Rngs) -> _Block:
            return _Block(width, heads, hidden or 4 * width, rngs=rngs)

        if scan:
            self.layers = nnx.vmap(block)(rngs.split(layers))
        else:
            for i in range(layers):
                setattr(self, f"layer{i + 1}", block(rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[B, T]` to `[B, T, width]`, or to logits `[B, T, vocab]` if `tied`."""
        tokens = indices(tokens, self.length)
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        if self.scan:
            axes = (0, nnx.Carry)
            x = nnx.scan(lambda block, x: block(x), in_axes=axes, out_axes=nnx.Carry)(
                self.layers, x
            )
        else:
            for i in range(self.depth):
                x = getattr(self, f"layer{i + 1}")(x)
        x = self.norm(x)
        return self.tokens.attend(x) if self.tied else x
