"""A transformer encoder, as a linen module."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._sequences import indices


class _Block(nn.Module):
    """Attention and two dense layers, each normalized before and added to what came in."""

    width: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(y))
        return x + nn.Dense(self.width, name="down")(y)


class Transformer(nn.Module):
    """An encoder with normalization before each part, learned positions and GELU.

    Every position sees every other. Layers `tokens` and `positions`, then `layer1`, `layer2`
    and so on with `norm1`, `attention`, `norm2`, `up` and `down` inside, then `norm`. With
    `scan` the layers are one, `layers`, whose parameters have a leading axis of `layers`.

    Args:
      vocab: number of tokens.
      width: length of the vector of each position.
      heads: number of heads that share the width.
      layers: number of layers.
      length: number of positions that are learned.
      hidden: length between `up` and `down`; `4 * width` if not given.
      tied: whether the output is multiplied with the embedding of each token.
      scan: whether the layers are run in a loop, which compiles faster.

    Example:
      >>> tokens = jnp.zeros((2, 5), jnp.int32)
      >>> model = Transformer(vocab=11, width=8, heads=2, layers=3, length=7, scan=True)
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> variables["params"]["layers"]["up"]["kernel"].shape
      (3, 8, 32)
      >>> model.apply(variables, tokens).shape
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

    vocab: int
    width: int
    heads: int
    layers: int
    length: int
    hidden: int | None = None
    tied: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[B, T]` to `[B, T, width]`, or to logits `[B, T, vocab]` if `tied`."""
        tokens = indices(tokens, self.length)
        embed = nn.Embed(self.vocab, self.width, name="tokens")
        place = nn.Embed(self.length, self.width, name="positions")
        x = embed(tokens) + place(jnp.arange(tokens.shape[1])[None])
        sizes = (self.width, self.heads, self.hidden or 4 * self.width)
        if self.scan:
            run = nn.scan(
                lambda block, x: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = run(_Block(*sizes, name="layers"), x)
        else:
            for i in range(self.layers):
                x = _Block(*sizes, name=f"layer{i + 1}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return embed.attend(x) if self.tied else x
