"""A recurrent classifier, as a linen module."""

import flax.linen as nn
import jax

from ._sequences import vectors


class LSTM(nn.Module):
    """One LSTM layer and a dense layer on its last state.

    Layers `rnn/cell` with a kernel for each gate from the input (`ii`, `if`, `ig`, `io`) and
    from the state (`hi`, `hf`, `hg`, `ho`, with bias), then `head`. The state starts at zero.

    Args:
      features: length of the vector at each step.
      width: length of the state.
      classes: number of logits.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((2, 7, 3))
      >>> model = LSTM(features=3, width=8, classes=5)
      >>> variables = model.init(jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      429
      >>> model.apply(variables, x).shape
      (2, 5)

    References:
      Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997
      Gers, Schmidhuber and Cummins, Learning to Forget, Neural Computation 12(10), 2000
    """

    features: int
    width: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps sequences `[B, T, features]` to logits `[B, classes]`."""
        x = vectors(x, self.features)
        # Without a parent here, the cell becomes a child of the layer that runs it.
        cell = nn.LSTMCell(self.width, parent=None)
        (_, h), _ = nn.RNN(cell, return_carry=True, name="rnn")(x)
        return nn.Dense(self.classes, name="head")(h)
