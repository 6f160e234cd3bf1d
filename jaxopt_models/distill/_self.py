"""Networks that teach themselves: by their own moving average, or by their last layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .._options import portion
from .._partition import combine
from ._classification import check_reader, second
from ._core import Loss, compiled, pairs, side_by_side
from ._heads import project, projection
from ._labels import cross_entropy
from ._network import Network, Seen, as_network
from ._place import Place
from ._reduce import positive
from ._soft import kd
from ._state import Scheme, State


def self_taught(
    student: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    decay: float | None = None,
    teacher: Any = None,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains a network without a teacher but itself.

    With ``decay`` its teacher is the exponential moving average of its own parameters,

    .. math:: \bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta,

    taken after each step of what is trained. Without, the loss gets ``None`` for a teacher and
    looks at the network's own inside: see :func:`deep_supervision`.

    Args:
      student: function `(params, x) -> out`, or a :class:`Network`.
      loss: `(student, teacher, batch) -> value`.
      optimizer: any optax transformation.
      decay: `d`, in [0, 1); ``None`` for no averaged teacher.
      teacher: how the average is run, if otherwise than the student: another view of the batch,
        or without dropout.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(params, *, heads=None, memory=None, key=None)``. The averaged
      parameters are ``averaged(state)``.

    Raises:
      TypeError, ValueError: as :func:`teacher_student`; for a decay out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda student, teacher, batch: jnp.mean((student.out - 1) ** 2)
      >>> scheme = distill.self_taught(fn, loss, optax.sgd(0.5), decay=0.5)
      >>> state, _ = scheme.step(scheme.init({"w": jnp.zeros((1, 1))}), jnp.ones((4, 1)))
      >>> float(state.student["w"][0, 0]), float(distill.averaged(state)["w"][0, 0])
      (1.0, 0.5)

    References:
      Tarvainen and Valpola, `Mean teachers are better role models
      <https://arxiv.org/abs/1703.01780>`_, 2017
    """
    who = "self_taught"
    network = as_network(student, who, "student")
    master = network if teacher is None else as_network(teacher, who, "teacher")
    decay = None if decay is None else portion(decay, "self_taught: decay")

    if teacher is not None and decay is None:
        raise ValueError("self_taught: teacher= is how the average is run; give decay=, too")

    def average(before: State, after: State) -> dict[str, Any]:
        if decay is None:
            return {}
        new = jax.tree.map(
            lambda a, b: a + (1 - decay) * (b.astype(a.dtype) - a),
            before.kept["average"],
            after.trained[0][0],
        )
        return {"average": new}

    def others(i: int, shown: Any, fixed: Any) -> Any:
        return fixed[0] if fixed else None

    place = Place(mesh, axis, who)
    begin, advance = side_by_side(
        [network],
        [] if decay is None else [master],
        [loss],
        others,
        pairs(optimizer, heads_optimizer, 1, who),
        place=place,
        taught_by=None if decay is None else lambda state: [averaged(state)],
        after=average,
    )

    def init(params: Any, *, heads: Any = None, memory: Any = None, key: Any = None) -> State:
        state = begin([params], heads=[heads], memories=[memory], key=key)
        if decay is None:
            return state
        # In float32: an average of narrower numbers stands still when its steps are small.
        average = jax.tree.map(_wide, state.trained[0][0])
        return dataclasses.replace(state, kept={"average": average})

    return Scheme(init, compiled(advance, place))


def _wide(x: jax.Array) -> jax.Array:
    return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32))


def averaged(state: State) -> Any:
    """Returns the moving average that :func:`self_taught` keeps, as a tree of parameters.

    Args:
      state: of a scheme with ``decay``.

    Returns:
      Parameters in the form and the dtypes of the student's; what is not trained is the student's.

    Raises:
      ValueError: if the state holds none.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> loss = lambda student, teacher, batch: jnp.mean(student.out)
      >>> init, _ = distill.self_taught(lambda p, x: x @ p, loss, optax.sgd(0.1), decay=0.9)
      >>> distill.averaged(init(jnp.ones((2, 1)))).tolist()
      [[1.0], [1.0]]
    """
    if "average" not in state.kept:
        raise ValueError("averaged: this state keeps no average; self_taught(..., decay=0.999)")
    average = jax.tree.map(
        lambda a, b: a.astype(b.dtype), state.kept["average"], state.trained[0][0]
    )
    return combine(average, state.rest[0])


def deep_supervision(
    *,
    hard: float = 1.0,
    soft: float = 1.0,
    temperature: float = 3.0,
    labels: Callable[[Any], Any] = second,
) -> Loss:
    r"""Returns the loss by which a network's last layer teaches its earlier ones.

    For each head, a linear classifier `z_i` on the mean over the inner axes of a tap,

    .. math:: L = \mathrm{CE}(y, z) + \sum_i \big( h\, \mathrm{CE}(y, z_i)
        + w\, T^2\, \mathrm{KL}(z \| z_i) \big),

    no derivative passing to `z` from the second term. Heads are made by
    :func:`deep_supervision_heads`, one for each tap of the network, and dropped afterwards.

    Args:
      hard: weight `h` of the labels.
      soft: weight `w` of the last layer.
      temperature: `T` of :func:`kd`.
      labels: from a batch to whole numbers `[B]`.

    Returns:
      The loss, for :func:`self_taught`; metrics ``last`` and ``early``.

    Raises:
      TypeError: for weights or a temperature that are no numbers, or labels that are no function.
      ValueError: for a negative weight, or a temperature that is not positive; from a step, if
        heads and taps are not of the same names.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> net = distill.Network(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], taps=["a"])
      >>> params = {"a": jnp.ones((2, 5)), "b": jnp.ones((5, 3))}
      >>> batch = jnp.ones((4, 2)), jnp.array([0, 1, 2, 0])
      >>> heads = distill.deep_supervision_heads(jax.random.key(0), net, params, batch)
      >>> init, step = distill.self_taught(net, distill.deep_supervision(), optax.sgd(0.1))
      >>> sorted(step(init(params, heads=heads), batch)[1])
      ['early', 'last', 'loss']

    References:
      Zhang et al., `Be Your Own Teacher <https://arxiv.org/abs/1905.08094>`_, 2019
    """
    who = "deep_supervision"
    hard, soft = positive(hard, who, "hard", zero=True), positive(soft, who, "soft", zero=True)
    temperature = positive(temperature, who, "temperature")
    check_reader(labels, "deep_supervision: labels")

    def loss(student: Seen, teacher: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        del teacher
        if not student.heads or set(student.heads) != set(student.taps):
            raise ValueError(
                f"deep_supervision: taps are {sorted(student.taps)}, heads "
                f"{sorted(student.heads or {})}; give init(heads=deep_supervision_heads(...)) one "
                "for each tap"
            )
        y, last = labels(batch), jax.lax.stop_gradient(student.out)
        early = jnp.float32(0)
        for name, head in student.heads.items():
            logits = project(head, _pooled(student.taps[name]))
            early += hard * cross_entropy(logits, y) + soft * kd(
                logits, last, temperature=temperature
            )
        value = cross_entropy(student.out, y)
        return value + early, {"last": value, "early": early}

    return loss


def deep_supervision_heads(
    key: jax.Array, network: Network, params: Any, batch: Any
) -> Mapping[str, Any]:
    """Returns linear classifiers on all taps of a network; shapes of a batch are enough.

    Args:
      key: random key.
      network: with taps.
      params: its parameters.
      batch: a batch.

    Returns:
      ``{tap: head}``, each of as many classes as the network has.

    Raises:
      ValueError: for a network without taps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> net = distill.Network(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], taps=["a"])
      >>> params = {"a": jnp.ones((2, 5)), "b": jnp.ones((5, 3))}
      >>> heads = distill.deep_supervision_heads(jax.random.key(0), net, params, jnp.ones((1, 2)))
      >>> heads["a"]["kernel"].shape
      (5, 3)
    """
    if not isinstance(network, Network) or not network.taps:
        raise ValueError(
            "deep_supervision_heads: the network has no taps; name the layers that get a head: "
            "distill.Network(fn, taps=['stage1'])"
        )
    seen = jax.eval_shape(network.look, params, batch)
    keys = jax.random.split(key, len(seen.taps))
    classes = seen.out.shape[-1]
    return {
        name: projection(k, x.shape[-1], classes)
        for k, (name, x) in zip(keys, seen.taps.items(), strict=True)
    }


def _pooled(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
