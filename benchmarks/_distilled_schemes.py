"""Schemes beside plain training: a judge, peers, and three students at once."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import jax
import optax

from jaxopt_models import distill

from ._distilled import Task, adam, apply, task
from ._distilled_classes import STEPS, TEMPERATURE, taught
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
# Chosen on validation images with seeds 100 to 103.
WEIGHT, JUDGE_RATE, KIND = 0.3, 1e-3, "logistic"
HIDDEN = (64,)
PEER_STEPS, PEER_RATE, PEER_WEIGHT = 6000, 1e-3, 10.0
# Alone, a network is best after half as many steps.
SOLO_STEPS = (3000, 6000)


def judged(case: Task, steps: int, **options: Any) -> tuple[Any, float]:
    """Returns a student taught against a judge, and the judge's mean accuracy at the end."""
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


def peers(case: Task, count: int, steps: int) -> Any:
    """Returns networks that taught each other."""
    loss = distill.classification(hard=1, soft=PEER_WEIGHT, temperature=1)
    scheme = distill.mutual([apply] * count, loss, adam(steps, PEER_RATE))
    state = scheme.init([case.student(i) for i in range(count)])
    done = distill.fit(scheme.step, state, case.batches(), steps=steps, progress=False)
    return done.state.students


def solo(case: Task, index: int, steps: int) -> Any:
    """Returns the network that begins as a peer does, trained alone."""
    scheme = distill.self_taught(
        apply, distill.classification(hard=1, soft=0), adam(steps, PEER_RATE)
    )
    state = scheme.init(case.student(index))
    done = distill.fit(scheme.step, state, case.batches(), steps=steps, progress=False)
    return done.state.student


def one_seed(seed: int, *, quick: bool) -> dict[str, float]:
    """Trains a student by each scheme."""
    case = task(seed, quick=quick)
    steps, peer_steps = (100, 100) if quick else (STEPS["kd"], PEER_STEPS)
    soft = distill.classification(hard=0, soft=1, temperature=TEMPERATURE)
    found = {"kd": case.test(taught(case, soft, case.batches(), steps))}
    student, found["judge"] = judged(case, steps)
    found["judged"] = case.test(student)
    if seed < 3:
        for name, count in zip(("solo", "solo_long"), SOLO_STEPS, strict=True):
            count = peer_steps if quick else count
            found[name] = statistics.fmean(case.test(solo(case, i, count)) for i in range(4))
        for count in (2, 4):
            found[f"peers{count}"] = statistics.fmean(
                map(case.test, peers(case, count, peer_steps))
            )
    logger.info("schemes, seed %s: %s", seed, {k: round(v, 3) for k, v in found.items()})
    return found


def rows(*, quick: bool) -> list[Row]:
    """Measures five seeds with a judge, three with peers."""
    seeds = [one_seed(seed, quick=quick) for seed in ((0,) if quick else range(5))]
    gaps = [s["judged"] - s["kd"] for s in seeds]
    few = "784-64-10, 2,000 images"

    def gain(name: str, other: str = "solo") -> list[float]:
        return [s[name] - s[other] for s in seeds if name in s]

    return [
        mean_row(f"{few}, KD and a judge, points above KD", gaps, ">= -0.1"),
        # A judge that runs away leaves a student far below the one without it.
        Row(
            f"{few}, KD and a judge: seeds within half a point of KD, or above",
            sum(gap >= -0.5 for gap in gaps),
            f">= {len(seeds)}",
        ),
        mean_row("accuracy of the judge at the end", [s["judge"] for s in seeds]),
        mean_row(f"{few}, alone, accuracy in %", [s["solo"] for s in seeds if "solo" in s]),
        *(
            mean_row(f"{few}, {count} peers, mean points above {what}", gain(name, other), bar)
            for count, name in (("two", "peers2"), ("four", "peers4"))
            for what, other, bar in (
                ("alone", "solo", ">= 0.2"),
                ("alone for as many steps", "solo_long", ""),
            )
        ),
    ]
