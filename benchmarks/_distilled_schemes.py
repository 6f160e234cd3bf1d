"""Schemes beside plain training: a judge, peers, and three students at once."""

from __future__ import annotations

import logging
from typing import Any

import jax

from jaxopt_models import distill

from ._distilled import Task, adam, apply
from ._distilled_classes import TEMPERATURE

logger = logging.getLogger(__name__)
# Chosen on validation images with seeds 100 and 101.
WEIGHT, JUDGE_RATE, KIND = 0.1, 1e-3, "logistic"
HIDDEN = (64,)
PEER_STEPS = 2000


def judged(case: Task, steps: int, **options: Any) -> tuple[Any, float]:
    """Returns a student taught against a judge, and the judge's mean accuracy at the end."""
    import optax

    soft = distill.classification(hard=0, soft=1, temperature=TEMPERATURE)
    options = {"weight": WEIGHT, "kind": KIND, "rate": JUDGE_RATE} | options
    judge_tx = optax.adam(options.pop("rate"), b1=0.5)
    scheme = distill.adversarial(
        apply, apply, soft, adam(steps), judge_optimizer=judge_tx, **options
    )
    judge = distill.judge(jax.random.key(case.seed), 10, hidden=HIDDEN, classes=10)
    state = scheme.init(case.student(), case.teacher, judge)
    done = distill.fit(scheme.step, state, case.batches(), steps=steps, progress=False)
    return done.state.student, done.history.column("judge_accuracy")[-1]


def peers(case: Task, count: int, steps: int) -> list[Any]:
    """Returns networks that taught each other."""
    loss = distill.classification(hard=1, soft=1, temperature=1)
    scheme = distill.mutual([apply] * count, loss, adam(steps))
    state = scheme.init([case.student(i) for i in range(count)])
    done = distill.fit(scheme.step, state, case.batches(), steps=steps, progress=False)
    return list(done.state.students)


def solo(case: Task, index: int, steps: int) -> Any:
    """Returns the network that begins as a peer does, trained alone."""
    scheme = distill.self_taught(apply, distill.classification(hard=1, soft=0), adam(steps))
    state = scheme.init(case.student(index))
    done = distill.fit(scheme.step, state, case.batches(), steps=steps, progress=False)
    return done.state.student
