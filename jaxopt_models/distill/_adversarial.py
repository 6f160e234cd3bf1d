"""Generative adversarial teaching: a judge learns to tell the student from the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .._options import number
from .._partition import combine
from ._classification import second
from ._core import Loss, compiled, descend, pairs, split_loss
from ._judges import judged
from ._network import Seen, as_network
from ._place import Place
from ._scores import fool_loss, judge_accuracy, judge_loss
from ._state import Scheme, State, begin, taken_over


def adversarial(
    student: Any,
    teacher: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    judge: Callable[..., jax.Array] = judged,
    judge_optimizer: optax.GradientTransformation | None = None,
    weight: float = 0.1,
    kind: str = "logistic",
    view: Callable[[Seen], jax.Array] = lambda seen: seen.out,
    condition: Callable[[Any], Any] | None = second,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains a student by a teacher, and against a judge that tells the two apart.

    The judge `D` sees what ``view`` takes of a network, logits or features, and a condition `c`
    of the batch, its labels or its inputs. In each step the judge descends first, then the
    student with the new judge:

    .. math::
       \min_D\; \mathbb{E}\,\ell(D(t, c), 1) + \mathbb{E}\,\ell(D(s, c), 0), \qquad
       \min_s\; L(s, t) + \lambda\, \mathbb{E}\,\ell(D(s, c), 1).

    So the student is asked to be likely among the teacher's outputs, beyond being near to each
    of them.

    Args:
      student: function `(params, x) -> out`, or a :class:`Network`.
      teacher: the same.
      loss: `L`, `(student, teacher, batch) -> value`.
      optimizer: any optax transformation, of the student.
      judge: `(judge_params, view, condition) -> scores [B]`; default: the network whose
        parameters :func:`judge` makes.
      judge_optimizer: of the judge; default `optax.adam(1e-3, b1=0.5)`.
      weight: `lambda`.
      kind: the losses of both sides: ``"logistic"``, ``"hinge"`` or ``"squares"``.
      view: what the judge sees of a network. Where student and teacher differ in width, project
        the student's with ``seen.heads``.
      condition: from a batch to what the judge is told besides; ``None`` for nothing.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(student_params, teacher_params, judge_params, *, heads=None,
      memory=None, key=None)``. Metrics are those of the loss, ``fool``, ``judge`` (its loss) and
      ``judge_accuracy``, the share of scores on the right side before its step: 0.5 is a judge
      that can tell nothing. The judge's parameters are in ``state.kept["judge"]``.

    Raises:
      TypeError, ValueError: as :func:`teacher_student`; for a negative weight or another kind.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> scheme = distill.adversarial(fn, fn, distill.classification(), optax.sgd(0.1))
      >>> judge = distill.judge(jax.random.key(0), 3, hidden=(8,), classes=3)
      >>> state = scheme.init({"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}, judge)
      >>> state, metrics = scheme.step(state, (jnp.eye(2), jnp.array([0, 2])))
      >>> sorted(metrics)
      ['fool', 'hard', 'judge', 'judge_accuracy', 'loss', 'soft']

    References:
      Goodfellow et al., `Generative Adversarial Networks <https://arxiv.org/abs/1406.2661>`_,
      2014
      Mirza and Osindero, `Conditional Generative Adversarial Nets
      <https://arxiv.org/abs/1411.1784>`_, 2014
      Xu, Hsu and Huang, `Training Shallow and Thin Networks for Acceleration via Knowledge
      Distillation with Conditional Adversarial Networks <https://arxiv.org/abs/1709.00513>`_, 2017
    """
    who = "adversarial"
    network, master = as_network(student, who, "student"), as_network(teacher, who, "teacher")
    weight = number(weight, "adversarial: weight")
    if weight < 0:
        raise ValueError(f"adversarial: weight={weight}; give at least 0")
    judge_loss(jnp.zeros(1), jnp.zeros(1), kind=kind)  # another kind is refused now
    place = Place(mesh, axis, who)
    optimizers = pairs(optimizer, heads_optimizer, 1, who)
    judge_tx = optax.adam(1e-3, b1=0.5) if judge_optimizer is None else judge_optimizer
    judge_txs = pairs(judge_tx, None, 1, who)[0]

    def taught(judge_params: Any, judge_opt: Any, real: Any, fake: Any, given: Any) -> Any:
        def of(params: Any) -> Any:
            a, b = judge(params, real, given), judge(params, fake, given)
            return judge_loss(a, b, kind=kind), judge_accuracy(a, b, kind=kind)

        (value, accuracy), grads = jax.value_and_grad(of, has_aux=True)(judge_params)
        new, opt = descend(judge_txs[:1], (grads,), (judge_opt,), (judge_params,))
        return new[0], opt[0], {"judge": value, "judge_accuracy": accuracy}

    def advance(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        shown = master.look(state.teachers[0], batch)
        given = None if condition is None else condition(batch)
        real = view(shown)

        def total(trained: Any) -> Any:
            t, heads = trained
            seen = network.look(combine(t, state.rest[0]), batch, learn=True)
            seen = dataclasses.replace(
                seen, heads=heads, memory=state.memory, step=state.step, key=key
            )
            fake = view(seen)
            # Inside, so that the student runs once for both: the judge learns from its value.
            judge_params, judge_opt, metrics = taught(
                state.kept["judge"],
                state.kept["judge_opt"],
                real,
                jax.lax.stop_gradient(fake),
                given,
            )
            value, found, memory = split_loss(loss(seen, shown, batch), who)
            fooled = fool_loss(judge(jax.lax.stop_gradient(judge_params), fake, given), kind=kind)
            metrics = {"loss": value, "fool": fooled, **metrics, **found}
            memory = state.memory if memory is None else memory
            kept = {"judge": judge_params, "judge_opt": judge_opt}
            return value + weight * fooled, (metrics, kept, seen.new, memory)

        grads, (metrics, kept, new, memory) = jax.grad(total, has_aux=True)(state.trained[0])
        trained, opt = descend(optimizers[0], grads, state.opt[0], state.trained[0])
        after = dataclasses.replace(
            state,
            trained=(trained,),
            rest=(taken_over(trained[0], state.rest[0], new),),
            opt=(opt,),
            memories=(memory,),
            kept=kept,
            step=state.step + 1,
        )
        return after, metrics

    def init(
        student: Any,
        teacher: Any,
        judge: Any,
        *,
        heads: Any = None,
        memory: Any = None,
        key: Any = None,
    ) -> State:
        kept = {"judge": judge, "judge_opt": judge_txs[0].init(judge)}
        state = begin(
            [student],
            [teacher],
            optimizers,
            heads=[heads],
            memories=[memory],
            kept=kept,
            key=key,
            who=who,
        )
        return place.state(state)

    return Scheme(init, compiled(advance, place))
