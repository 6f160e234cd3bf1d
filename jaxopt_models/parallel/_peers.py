"""Networks that teach each other, one a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from .._partition import combine
from ..distill._core import Loss, check_loss, descend, pairs, split_loss, stacked
from ..distill._network import Network, Seen
from ..distill._state import Scheme, begin, taken_over
from ..distill._teach import listed
from ._apart import Apart, place
from ._arrangement import Arrangement, by_dtype
from ._knowledge import networks_of
from ._slices import Slices, no_mesh, one_of
from ._steps import check_given


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PeersState:
    """What peers apart hand from step to step, each one's part on its own devices.

    Args:
      trained: for each peer ``(parameters, heads)``, of the parameters what may be trained.
      rest: the rest of the parameters.
      opt: the optimizers' states.
      memories: what each peer's loss keeps.
      key: the random key of the whole training.
      step: number of steps done.
    """

    trained: Apart
    rest: Apart
    opt: Apart
    memories: Apart
    key: jax.Array
    step: jax.Array

    @property
    def students(self) -> tuple[Any, ...]:
        """The parameters of all peers, in the form they came in, each on its own device."""
        halves = zip(self.trained.members(), self.rest.members(), strict=True)
        return tuple(combine(t, r) for (t, _), r in halves)


def mutual(
    peers: Any | Sequence[Any],
    loss: Loss,
    optimizer: Any,
    *,
    mesh: Mesh,
    axis: str = "peer",
    heads_optimizer: optax.GradientTransformation | None = None,
) -> Scheme:
    r"""Trains networks that teach each other, one on each device.

    It computes what :func:`jaxopt_models.distill.mutual` does,

    .. math:: L_i = \mathrm{CE}(y, p_i) + \frac{1}{N-1} \sum_{j \ne i} \mathrm{KL}(p_j \| p_i),

    in one program in which each device holds one peer, its optimizer's state and its derivatives;
    of all this, what peers show (outputs, and values that are tapped) alone travels, once a step.
    A peer is computed a second time to be differentiated, unless all are one function of one
    structure: what the others show is not known before.

    Args:
      peers: functions or networks, one for each device along ``axis``, at least two; a single one
        if they differ by their parameters alone.
      loss: `(peer, others, batch) -> value`, ``others`` a list of
        :class:`~jaxopt_models.distill.Seen`; a list for one each.
      optimizer: any optax transformation, each peer having its own state; a list for one each.
      mesh: the devices; along other axes than ``axis`` everything is repeated.
      axis: the mesh axis with a peer on each of its devices.
      heads_optimizer: another one for heads; default: the same.

    Returns:
      ``(init, step)``: ``init(list_of_params, *, heads=None, memory=None, key=None)``, heads and
      memories as lists; ``step(state, batch)``; metrics are arrays `[N]`, and ``state.students``
      all peers, each on its own device.

    Raises:
      TypeError: as :func:`jaxopt_models.distill.mutual`.
      ValueError: for peers fewer than two, or fewer or more than devices.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill, parallel
      >>> if jax.device_count() > 1:
      ...     mesh = jax.make_mesh((2,), ("peer",), devices=jax.devices()[:2])
      ...     fn = lambda params, x: x @ params["w"]
      ...     loss = lambda peer, others, batch: distill.hint(peer.out, others[0].out)
      ...     scheme = parallel.mutual(fn, loss, optax.sgd(0.5), mesh=mesh)
      ...     state = scheme.init([{"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}])
      ...     state, _ = scheme.step(state, jnp.eye(2))
      ...     assert [p["w"].ravel().tolist() for p in state.students] == [[0.5, 0.5]] * 2

    References:
      Zhang et al., `Deep Mutual Learning <https://arxiv.org/abs/1706.00384>`_, 2017
    """
    who = "parallel.mutual"
    slices = Slices(mesh, axis, None, who)
    count = slices.count
    if count < 2:
        raise ValueError(f"{who}: axis {axis!r} has one device; give a peer and a device to two")
    networks = networks_of(peers, slices, "peer")
    losses = listed(loss, count, "losses", who) if isinstance(loss, list) else [loss] * count
    for one in losses:
        check_loss(one, who)
    txs = pairs(optimizer, heads_optimizer, count, who)
    alike = one_of(networks) and one_of(losses) and not isinstance(optimizer, list)

    def init(params: Any, *, heads: Any = None, memory: Any = None, key: Any = None) -> PeersState:
        heads, memory = (
            [None] * count if given is None else listed(given, count, name, who)
            for name, given in (("heads", heads), ("memory", memory))
        )
        params = params.members() if isinstance(params, Apart) else params
        params = slices.listed(params, "peers' parameters")
        with no_mesh():
            state = begin(
                networks,
                params,
                (),
                txs,
                heads=heads,
                memories=memory,
                kept=None,
                key=key,
                who=who,
            )
        apart = [
            place(list(t), slices) for t in (state.trained, state.rest, state.opt, state.memories)
        ]
        key, step = slices.everywhere((state.key, state.step))
        return PeersState(*apart, key=key, step=step)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: PeersState, batch: Any) -> tuple[PeersState, dict[str, jax.Array]]:
        parts = state.trained, state.rest, state.opt, state.memories
        arrangements = [p.arrangement for p in parts]
        metrics: list[Arrangement] = []

        def local(trained: Apart, rest: Apart, opt: Apart, memories: Apart, *more: Any) -> Any:
            held = [a.held() for a in (trained, rest, opt, memories)]
            step = _Step(networks, losses, txs, slices, arrangements, alike)
            new, found = step.run(held, *more)
            metrics.append(found)
            return jax.tree.map(lambda x: x[None], new)

        spec = slices.apart.spec
        specs = (*[spec] * 4, *[PartitionSpec()] * 3)
        *new, values = slices.mapped(local, specs, spec)(*parts, batch, state.key, state.step)
        apart = [Apart(b, arrangement) for b, arrangement in zip(new, arrangements, strict=True)]
        done = PeersState(*apart, key=state.key, step=state.step + 1)
        if metrics[0].uniform:  # as they are: the numbers of each device stay there
            return done, metrics[0].unpack_all(values)
        return done, stacked([metrics[0].unpack([v[i] for v in values], i) for i in range(count)])

    def step(state: PeersState, batch: Any) -> tuple[PeersState, dict[str, jax.Array]]:
        check_given(state, PeersState, who)
        return advance(state, batch)

    step.program = advance  # type: ignore[attr-defined]
    return Scheme(init, step)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one device does in a step, while its program is traced."""

    networks: Sequence[Network]
    losses: Sequence[Loss]
    txs: Sequence[tuple[Any, Any]]
    slices: Slices
    arrangements: Sequence[Arrangement]
    alike: bool

    def run(
        self, held: Any, batch: Any, key: jax.Array, step: jax.Array
    ) -> tuple[Any, Arrangement]:
        """Returns the new buffers and metrics, and the arrangement of metrics."""
        count = self.slices.count
        same = self.alike and all(arrangement.uniform for arrangement in self.arrangements)

        def show(i: int, held: Any) -> Seen:
            (params, _), rest = (self.arrangements[n].unpack(held[n], i) for n in (0, 1))
            seen = self.networks[i].look(combine(params, rest), batch, learn=True)
            return Seen(*jax.lax.stop_gradient((seen.out, seen.taps)))

        shapes = [jax.eval_shape(functools.partial(show, i), held) for i in range(count)]
        shown = Arrangement.of(shapes, roles=by_dtype)
        mine = self.slices.branch(lambda i, h: shown.pack(show(i, h), i), held, same=same)
        whole = [jax.lax.all_gather(b, self.slices.axis) for b in mine]
        here = jax.lax.axis_index(self.slices.axis)

        def others(i: int) -> list[Seen]:
            if not same:
                return [shown.unpack([b[j] for b in whole], j) for j in range(count) if j != i]
            turns = [j + (j >= here) for j in range(count - 1)]
            return [shown.unpack([b[j] for b in whole], 0) for j in turns]

        def learn(i: int, held: Any) -> Any:
            trained, rest, opt, memory = (
                arrangement.unpack(h, i)
                for arrangement, h in zip(self.arrangements, held, strict=True)
            )
            number = here if same else i

            def total(trained: Any) -> Any:
                params, heads = trained
                look = self.networks[i].look(combine(params, rest), batch, learn=True)
                mine = dataclasses.replace(
                    look,
                    heads=heads,
                    memory=memory,
                    step=step,
                    key=jax.random.fold_in(jax.random.fold_in(key, step), number),
                )
                found = self.losses[i](mine, others(i), batch)
                value, told, kept = split_loss(found, self.slices.who, memory)
                return value, (told, kept, mine.new)

            (value, (told, kept, new)), grads = jax.value_and_grad(total, has_aux=True)(trained)
            moved, states = descend(self.txs[i], grads, opt, trained, value)
            left = taken_over(self.networks[i], trained[0], rest, new)
            return (moved, left, states, kept), {"loss": value, **told}

        told = [jax.eval_shape(functools.partial(learn, i), held)[1] for i in range(count)]
        metrics = Arrangement.of(told, roles=by_dtype)

        def packed(i: int, held: Any) -> Any:
            new, told = learn(i, held)
            parts = [
                arrangement.pack(t, i)
                for arrangement, t in zip(self.arrangements, new, strict=True)
            ]
            return *parts, metrics.pack(told, i)

        return self.slices.branch(packed, held, same=same), metrics
