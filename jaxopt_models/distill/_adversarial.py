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
from ._classification import second
from ._core import RESERVED, Loss, check_loss, descend, pairs, split_loss
from ._judges import judged
from ._network import Seen
from ._scores import fool_loss, judge_accuracy, judge_loss
from ._state import Scheme, State, check_floating
from ._teach import one_student


def _shown(seen: Any) -> jax.Array:
    if isinstance(seen, list):
        raise TypeError(
            "adversarial: there are several teachers, and a judge sees one; give view=, from the "
            "list of what they show, and from what the student shows, to an array"
        )
    return seen.out


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
    view: Callable[[Seen], jax.Array] = _shown,
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
      view: what the judge sees of a network, student and teacher. Where these differ in width,
        project the student's, which alone has heads: ``lambda seen: seen.out if seen.heads is
        None else distill.project(seen.heads, seen.out)``.
      condition: from a batch to what the judge is told besides: labels, of a judge with
        ``classes``; ``None`` for nothing.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(student_params, teacher_params, judge_params, *, heads=None,
      memory=None, key=None)``. Metrics are those of ``loss``, its value ``taught``, ``fool``,
      ``judge`` (the judge's loss) and ``judge_accuracy``, the share of scores on the right side
      before its step: 0.5 is a judge that can tell nothing. The judge's parameters are
      ``state.memory["judge"]``, what the loss keeps ``state.memory["loss"]``.

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
      ['fool', 'hard', 'judge', 'judge_accuracy', 'loss', 'soft', 'taught']

    References:
      Goodfellow et al., `Generative Adversarial Networks <https://arxiv.org/abs/1406.2661>`_,
      2014
      Mirza and Osindero, `Conditional Generative Adversarial Nets
      <https://arxiv.org/abs/1411.1784>`_, 2014
      Xu, Hsu and Huang, `Training Shallow and Thin Networks for Acceleration via Knowledge
      Distillation with Conditional Adversarial Networks <https://arxiv.org/abs/1709.00513>`_, 2017
    """
    who = "adversarial"
    check_loss(loss, who)
    weight = number(weight, "adversarial: weight")
    if weight < 0:
        raise ValueError(f"adversarial: weight={weight}; give at least 0")
    judge_loss(jnp.zeros(1), jnp.zeros(1), kind=kind)  # another kind is refused now
    judge_tx = optax.adam(1e-3, b1=0.5) if judge_optimizer is None else judge_optimizer
    judge_txs = pairs(judge_tx, None, 1, who)[0][:1]

    def taught(kept: dict[str, Any], real: Any, fake: Any, given: Any) -> tuple[Any, Any]:
        def of(params: Any) -> Any:
            a, b = judge(params, real, given), judge(params, fake, given)
            return judge_loss(a, b, kind=kind), judge_accuracy(a, b, kind=kind)

        (value, accuracy), grads = jax.value_and_grad(of, has_aux=True)(kept["judge"])
        new, opt = descend(judge_txs, (grads,), (kept["judge_opt"],), (kept["judge"],), value)
        metrics = {"judge": value, "judge_accuracy": accuracy}
        return {"judge": new[0], "judge_opt": opt[0]}, metrics

    def both(student: Seen, teacher: Seen, batch: Any) -> Any:
        given = None if condition is None else condition(batch)
        own = dataclasses.replace(student, memory=student.memory["loss"])
        real, fake = view(teacher), view(own)
        # The judge learns from the student's value, so that the student is run once for both.
        kept, told = taught(student.memory, real, jax.lax.stop_gradient(fake), given)
        reserved = (*RESERVED, "taught", "fool", *told)
        value, metrics, memory = split_loss(
            loss(own, teacher, batch), who, own.memory, reserved=reserved
        )
        scores = judge(jax.lax.stop_gradient(kept["judge"]), fake, given)
        fooled = fool_loss(scores, kind=kind)
        metrics = {"taught": value, "fool": fooled, **told, **metrics}
        return value + weight * fooled, metrics, {**kept, "loss": memory}

    scheme = one_student(
        student,
        teacher,
        both,
        optimizer,
        heads_optimizer=heads_optimizer,
        mesh=mesh,
        axis=axis,
        who=who,
    )

    def init(
        student: Any,
        teacher: Any,
        judge: Any,
        *,
        heads: Any = None,
        memory: Any = None,
        key: Any = None,
    ) -> State:
        check_floating(judge, f"{who}: judge_params")
        kept = {"judge": judge, "judge_opt": judge_txs[0].init(judge), "loss": memory}
        return scheme.init(student, teacher, heads=heads, memory=kept, key=key)

    return Scheme(init, scheme.step)
