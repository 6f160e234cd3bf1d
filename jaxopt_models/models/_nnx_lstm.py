"""The nnx twin of the recurrent classifier."""

import jax
import jax.numpy as jnp
from flax import nnx

from ._sequences import vectors


class _Cell(nnx.LSTMCell):
    """The cell with a gate at the path `if`, as linen has it, where nnx says `if_`."""

    @property
    def if_(self) -> nnx.Linear:
        return vars(self)["if"]

    @if_.setter
    def if_(self, layer: nnx.Linear) -> None:
        setattr(self, "if", layer)


class LSTM(nnx.Module):
    """One LSTM layer and a dense layer on its last state.

    The twin of the linen :class:`jaxopt_models.models.LSTM`. Layers `rnn/cell` with a kernel
    for each gate from the input (`ii`, `if`, `ig`, `io`) and from the state (`hi`, `hf`, `hg`,
    `ho`, with bias), then `head`. The state starts at zero.

    Args:
      features: length of the vector at each step.
      width: length of the state.
      classes: number of logits.
      rngs: keys for the initial parameters.

    Example:
      >>> model = LSTM(features=3, width=8, classes=5, rngs=nnx.Rngs(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
      429
      >>> model(jnp.zeros((2, 7, 3))).shape
      (2, 5)

    References:
      Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997
      Gers, Schmidhuber and Cummins, Learning to Forget, Neural Computation 12(10), 2000
    """

    def __init__(self, features: int, width: int, classes: int, *, rngs: nnx.Rngs):
        self.features = features
        self.width = width
        cell = _Cell(features, width, rngs=rngs)
        # By default parameters are carried from step to step, as if a step could change them.
        shared = nnx.StateAxes({...: None})
        self.rnn = nnx.RNN(cell, return_carry=True, state_axes=shared, rngs=False)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps sequences `[B, T, features]` to logits `[B, classes]`."""
        x = vectors(x, self.features)
        # Given here, as the layer has no keys to draw it from.
        zero = jnp.zeros((x.shape[0], self.width), x.dtype)
        (_, h), _ = self.rnn(x, initial_carry=(zero, zero))
        return self.head(h)
