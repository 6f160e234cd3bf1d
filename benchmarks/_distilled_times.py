"""Seconds of a distillation step: beside its parts, and beside the same step in PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import distill

from . import _distilled_torch
from ._contest import Contest, Run, ratio
from ._distilled import STUDENT, TEACHER, apply, mlp
from ._distilled_resnet import ResNet20
from ._rows import Row

logger = logging.getLogger(__name__)
# 30 rounds, as six medians of one function spread twofold on two cores.
ROUNDS = 30
SIZES = {"mlp": 100, "resnet": 128}
LOSS = distill.classification(hard=0.1, soft=0.9, temperature=4.0)
RATE = 1e-3


def _batch(pair: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    size = SIZES[pair]
    return rng.integers(0, 256, (size, 28, 28), np.uint8), rng.integers(0, 10, size)


def _networks(pair: str) -> tuple[Any, Any, Any, Any]:
    """Returns student, its parameters, teacher and its parameters."""
    if pair == "mlp":
        student, teacher = (mlp(s, jax.random.key(0)) for s in (STUDENT, TEACHER))
        return apply, student, apply, teacher
    found = []
    for width, train in ((8, True), (16, False)):
        model = ResNet20(width)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))
        fn, params = jom.functional((model, variables), mutable=train)
        if train:
            train_fn = functools.partial(fn, train=True)
            found += [distill.Network(train_fn, stateful=True), params]
        else:
            found += [fn, params]
    return tuple(found)


def _stepping(scheme: Any, state: Any, batch: Any) -> Run:
    box = [state]

    def run() -> object:
        box[0], metrics = scheme.step(box[0], batch)
        return jax.block_until_ready((box[0].moving(), metrics))

    return run


def whole(pair: str) -> Run:
    """Teacher and student in one program."""
    student, params, teacher, fixed = _networks(pair)
    scheme = distill.teacher_student(student, teacher, LOSS, optax.adam(RATE))
    return _stepping(scheme, scheme.init(params, fixed), _batch(pair))


def teacher(pair: str) -> Run:
    """The teacher alone."""
    _, _, fn, params = _networks(pair)
    x = _batch(pair)[0]
    run = jax.jit(fn)
    return lambda: run(params, x).block_until_ready()


def update(pair: str) -> Run:
    """The student's update alone, the teacher's logits given."""
    student, params, fn, fixed = _networks(pair)
    x, y = _batch(pair)
    logits = jax.jit(fn)(fixed, x)
    scheme = distill.teacher_student(student, distill.stored(), LOSS, optax.adam(RATE))
    return _stepping(scheme, scheme.init(params, ()), (x, y, logits))


def three() -> Run:
    """Three students and their teacher in one program."""
    fn, params, master, fixed = _networks("mlp")
    scheme = distill.joint([fn] * 3, master, LOSS, optax.adam(RATE))
    return _stepping(scheme, scheme.init([params] * 3, fixed), _batch("mlp"))


def _interval(values: list[float]) -> tuple[float, float]:
    """Returns the 95 % interval of a median by resampling."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def _ratio_row(claim: str, values: list[float], bar: str) -> Row:
    low, high = _interval(values)
    note = f"median of {len(values)} ratios, 95 % interval {low:.3f} to {high:.3f}"
    return Row(claim, statistics.median(values), bar, note=note)


def _parts(times: Mapping[str, list[float]], whole: str, *parts: tuple[str, int]) -> list[float]:
    rounds = zip(*(times[name] for name in (whole, *(p for p, _ in parts))), strict=True)
    counts = [count for _, count in parts]
    return [a / sum(c * b for c, b in zip(counts, rest, strict=True)) for a, *rest in rounds]


def rows(*, quick: bool) -> list[Row]:
    """Times both pairs."""
    rounds = 5 if quick else ROUNDS
    found = []
    names = {"mlp": "784-64-10 by 784-500-300-10", "resnet": "ResNet-20 width 1/2 by width 1"}
    with Contest() as contest:
        for pair, name in names.items():
            makes: dict[str, Callable[[], Run]] = {
                part: functools.partial(make, pair)
                for part, make in (("whole", whole), ("teacher", teacher), ("update", update))
            }
            if pair == "mlp":
                makes["three"] = three
            if importlib.util.find_spec("torch"):
                makes["torch"] = functools.partial(_distilled_torch.step, pair, SIZES[pair])
            times = contest.times(makes, rounds=rounds)
            logger.info(
                "%s: %s",
                name,
                {k: f"{1e3 * statistics.median(v):.3f} ms" for k, v in times.items()},
            )
            found.append(
                _ratio_row(
                    f"{name}: one step over teacher forward + student update",
                    _parts(times, "whole", ("teacher", 1), ("update", 1)),
                    "<= 1.1",
                )
            )
            if "three" in times:
                found.append(
                    _ratio_row(
                        f"{name}: three students in one step over three updates + one forward",
                        _parts(times, "three", ("teacher", 1), ("update", 3)),
                        "<= 1.15",
                    )
                )
            if "torch" in times:
                faster = ratio(times, "torch", "whole")
                found.append(Row(f"{name}: times faster than PyTorch", faster, ">= 1"))
    return found
