"""Networks that teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from ._core import Loss, compiled, pairs, side_by_side
from ._network import as_network
from ._place import Place
from ._state import Scheme, State
from ._teach import listed


def mutual(
    peers: Sequence[Any],
    loss: Loss,
    optimizer: Any,
    *,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains `N` networks that teach each other; there is no teacher.

    .. math:: L_i = \mathrm{CE}(y, p_i) + \frac{1}{N-1} \sum_{j \ne i} \mathrm{KL}(p_j \| p_i)

    with ``loss=classification(hard=1, soft=1, temperature=1)``, the published setting. All peers
    step at once, from the same predictions, in one program; no derivative passes from one to
    another. (The paper lets them step in turn.)

    Args:
      peers: at least two functions or networks, of any sizes.
      loss: `(peer, others, batch) -> value`, ``others`` a list of :class:`Seen` with ``out`` and
        ``taps`` alone; a list for one each.
      optimizer: any optax transformation, each peer having its own state; a list for one each.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(list_of_params, *, heads=None, memory=None, key=None)``, heads and
      memories as lists; metrics are arrays `[N]`, and ``state.students`` all peers.

    Raises:
      TypeError: as :func:`teacher_student`.
      ValueError: for fewer than two peers, or lists of other lengths.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda peer, others, batch: distill.hint(peer.out, others[0].out)
      >>> scheme = distill.mutual([fn, fn], loss, optax.sgd(0.5))
      >>> state = scheme.init([{"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}])
      >>> state, _ = scheme.step(state, jnp.eye(2))
      >>> [params["w"].ravel().tolist() for params in state.students]
      [[0.5, 0.5], [0.5, 0.5]]

    References:
      Zhang et al., `Deep Mutual Learning <https://arxiv.org/abs/1706.00384>`_, 2017
    """
    who = "mutual"
    networks = [as_network(p, who, f"peer {i}") for i, p in enumerate(peers)]
    count = len(networks)
    if count < 2:
        raise ValueError(f"mutual: {count} peers; give at least two that learn from each other")
    place = Place(mesh, axis, who)
    begin, advance = side_by_side(
        networks,
        [],
        listed(loss, count, "losses", who) if isinstance(loss, list) else [loss] * count,
        lambda i, shown, fixed: [s for j, s in enumerate(shown) if j != i],
        pairs(optimizer, heads_optimizer, count, who),
        place=place,
    )

    def init(peers: Any, *, heads: Any = None, memory: Any = None, key: Any = None) -> State:
        heads, memory = (
            [None] * count if given is None else listed(given, count, name, who)
            for name, given in (("heads", heads), ("memory", memory))
        )
        peers = listed(peers, count, "params", who)
        return begin(peers, heads=heads, memories=memory, key=key)

    return Scheme(init, compiled(advance, place))
