"""Students taught by teachers that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from ._core import Loss, compiled, pairs, side_by_side
from ._network import Network, as_network
from ._place import Place
from ._state import Scheme, State


def teacher_student(
    student: Any,
    teacher: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains a student on what one teacher, or several of them, show.

    Each step runs all networks on the batch and descends

    .. math:: L(s(x), t(x), \text{batch})

    by the student's parameters and heads. The parameters may be compressed, or prepared for
    learned quantizers: what is trained then is what :func:`jaxopt_models.partition` says (scales,
    centroids, kept values, latents), masks and codes stay, and the network runs as
    :func:`jaxopt_models.simulate` defines it. A teacher may be compressed, too.

    Args:
      student: function `(params, x) -> out`, or a :class:`Network`.
      teacher: the same; a list of them for several teachers; :func:`stored` for one whose
        outputs are in the batch.
      loss: `(student, teacher, batch) -> value`, or `(value, metrics)`, or `(value, metrics,
        memory)`; the first two arguments are what networks show, as :class:`Seen`, the second a
        list for a list of teachers. :func:`classification` makes the usual one.
      optimizer: any optax transformation; it gets the loss as ``value=`` (those that call the
        loss again, such as `optax.lbfgs`, cannot be used).
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which batches are divided; those of several processes, too, which then
        all give the same batch, or each its part of a global array.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(student_params, teacher_params, *, heads=None, memory=None,
      key=None)``, where ``teacher_params`` is a list for a list of teachers, and ``step(state,
      batch)``. ``state.student`` is the trained tree.

    Raises:
      TypeError: for what is neither function nor network, or no optimizer; from a step, if the
        loss returns no number.
      ValueError: for an axis that the mesh has not, or batches that do not divide over it.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda student, teacher, batch: distill.hint(student.out, teacher.out)
      >>> scheme = distill.teacher_student(fn, fn, loss, optax.sgd(0.5))
      >>> state = scheme.init({"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))})
      >>> for _ in range(8):
      ...     state, metrics = scheme.step(state, jnp.eye(2))
      >>> print(f"{float(metrics['loss']):.5f}", state.student["w"].ravel().round(2))
      0.00006 [1. 1.]

    References:
      Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015
    """
    return one_student(
        student,
        teacher,
        loss,
        optimizer,
        heads_optimizer=heads_optimizer,
        mesh=mesh,
        axis=axis,
        who="teacher_student",
    )


def one_student(
    student: Any,
    teacher: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    heads_optimizer: optax.GradientTransformation | None,
    mesh: Mesh | None,
    axis: str | None,
    who: str,
) -> Scheme:
    """Returns :func:`teacher_student` under another name for messages."""
    several = isinstance(teacher, (list, tuple))
    teachers = [as_network(t, who, "teacher") for t in (teacher if several else [teacher])]
    if not teachers:
        raise ValueError(f"{who}: teacher is an empty list; give at least one, or self_taught")
    place = Place(mesh, axis, who)
    begin, advance = side_by_side(
        [as_network(student, who, "student")],
        teachers,
        [loss],
        lambda i, students, fixed: fixed if several else fixed[0],
        pairs(optimizer, heads_optimizer, 1, who),
        place=place,
    )

    def init(
        student: Any, teacher: Any, *, heads: Any = None, memory: Any = None, key: Any = None
    ) -> State:
        params = listed(teacher, len(teachers), "teacher_params", who) if several else [teacher]
        return begin([student], params, heads=[heads], memories=[memory], key=key)

    return Scheme(init, compiled(advance, place))


def last(batch: Any) -> Any:
    """Returns the last part of a batch, where a stored teacher's outputs are.

    Raises:
      TypeError: for a batch that has no parts in order.
    """
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"a batch is {type(batch).__name__}, no tuple that ends in the teacher's outputs; say "
            "where they are: distill.stored(lambda batch: batch['logits'])"
        )
    return batch[-1]


def stored(inputs: Callable[[Any], Any] = last) -> Network:
    """Returns a teacher whose outputs are in the batch, computed once and kept.

    Its parameters are ``()``; its ``out`` is the last part of the batch, or what ``inputs`` takes.

    Args:
      inputs: from a batch to the teacher's output: logits, or :class:`TopK` of them.

    Returns:
      The network, for :func:`teacher_student` and every other scheme.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> images, labels, logits = jnp.ones((2, 4)), jnp.array([0, 1]), jnp.zeros((2, 3))
      >>> distill.stored().look((), (images, labels, logits)).out.shape
      (2, 3)
    """

    def show(params: Any, out: Any) -> Any:
        del params
        return out.logits() if hasattr(out, "logits") else out

    return Network(show, inputs=lambda batch: (inputs(batch),))


def joint(
    students: Sequence[Any],
    teacher: Any,
    loss: Loss,
    optimizer: Any,
    *,
    teacher_loss: Loss | None = None,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains `K` students with one teacher, in one program that runs the teacher once.

    .. math:: L = \sum_{k=1}^{K} \big( \mathrm{CE}(y, s_k) + \beta T^2\, \mathrm{KL}(t \| s_k) \big)

    with ``loss=classification(hard=1, soft=beta, temperature=T)``; any other loss of
    `(student, teacher, batch)` is summed in the same way. With ``teacher_loss`` the teacher is
    trained beside its students, by its own loss alone: no derivative reaches it through them.

    Args:
      students: `K` functions or networks, of any sizes.
      teacher: a function or network.
      loss: of each student; a list for one each.
      optimizer: any optax transformation, each student having its own state; a list for one
        each (the teacher's last, if it is trained).
      teacher_loss: `(teacher, None, batch) -> value` to train the teacher, of which students then
        see ``out`` and ``taps`` alone; ``None``: it stays.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(list_of_student_params, teacher_params, *, heads=None,
      memory=None, key=None)``, heads and memories as lists for the students; metrics are arrays
      `[K]`. A trained teacher is the last of ``state.students``.

    Raises:
      TypeError: as :func:`teacher_student`.
      ValueError: for no students, or lists of other lengths.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda student, teacher, batch: distill.hint(student.out, teacher.out)
      >>> scheme = distill.joint([fn, fn], fn, loss, optax.sgd(0.5))
      >>> zero, one = {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}
      >>> state = scheme.init([zero, one], one)
      >>> state, metrics = scheme.step(state, jnp.eye(2))
      >>> metrics["loss"]
      Array([1., 0.], dtype=float32)
    """
    who = "joint"
    networks = [as_network(s, who, f"student {i}") for i, s in enumerate(students)]
    if not networks:
        raise ValueError("joint: no students; give a list of functions or networks")
    count, master = len(networks), as_network(teacher, who, "teacher")
    losses = listed(loss, count, "losses", who) if isinstance(loss, list) else [loss] * count
    learns = teacher_loss is not None
    trained = [*networks, master] if learns else networks

    def others(i: int, shown: Any, fixed: Any) -> Any:
        if not learns:
            return fixed[0]
        return None if i == count else shown[count]

    place = Place(mesh, axis, who)
    begin, advance = side_by_side(
        trained,
        [] if learns else [master],
        [*losses, teacher_loss] if learns else losses,  # type: ignore[list-item]
        others,
        pairs(optimizer, heads_optimizer, len(trained), who),
        place=place,
    )

    def init(
        students: Any, teacher: Any, *, heads: Any = None, memory: Any = None, key: Any = None
    ) -> State:
        students = listed(students, count, "student_params", who)
        heads, memory = (
            [None] * count if given is None else listed(given, count, name, who)
            for name, given in (("heads", heads), ("memory", memory))
        )
        fixed = [teacher]
        if learns:
            students, heads, memory = [*students, teacher], [*heads, None], [*memory, None]
            fixed = []
        return begin(students, fixed, heads=heads, memories=memory, key=key)

    return Scheme(init, compiled(advance, place))


def listed(given: Any, count: int, name: str, who: str) -> list[Any]:
    """Returns a list of a given length, or raises a `ValueError`."""
    if not isinstance(given, (list, tuple)) or len(given) != count:
        got = f"{len(given)} of them" if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(f"{who}: {name} must be a list of {count}; got {got}")
    return list(given)
