"""Deep Compression as one function: train, prune, share weights, tune centroids, code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import artifact
from ._compress import compress
from ._loop import Replay
from ._options import portion, whole
from ._paths import flatten
from ._recipe import Rule, check_recipe, decide, recipe_to_json
from ._resume import Checkpoints, digest
from ._table import Table
from ._training import Run
from .prune._gradual import cubic_schedule, find_magnitude, gradual


class Compressed(NamedTuple):
    """What :func:`deep_compression` returns.

    Args:
      params: the dense parameters after training and pruning.
      small: the compressed tree.
      stages: a table, a row for each stage: steps, bytes, ratio, error.
      path: the artifact, or ``None`` if none was asked for.
    """

    params: Any
    small: Any
    stages: Table
    path: str | None


@dataclasses.dataclass(frozen=True)
class Steps:
    """How many optimizer steps each stage of :func:`deep_compression` takes; 0 skips it.

    Args:
      train: dense training.
      prune: pruning and retraining; the sparsity rises over the first part.
      tune: training of centroids, scales and dense parameters, codes fixed.
      ramp: share of the pruning steps over which the sparsity rises.
      every: steps between two updates of the masks.

    Raises:
      TypeError: for numbers of steps that are not whole, or a ramp that is no number.
      ValueError: for numbers out of range.

    Example:
      >>> import jaxopt_models as jom
      >>> jom.Steps(train=100, prune=300, tune=50)
      Steps(train=100, prune=300, tune=50, ramp=0.6, every=25)
    """

    train: int = 0
    prune: int = 0
    tune: int = 0
    ramp: float = 0.6
    every: int = 25

    def __post_init__(self) -> None:
        for name in ("train", "prune", "tune", "every"):
            value = whole(getattr(self, name), f"Steps: {name}", least=int(name == "every"))
            object.__setattr__(self, name, value)
        object.__setattr__(self, "ramp", portion(self.ramp, "Steps: ramp", closed=True))
        if self.ramp == 0:
            raise ValueError("Steps: ramp=0.0 prunes at once; write a share above 0")


def adam(stage: str, steps: int) -> optax.GradientTransformation:
    """Returns the default optimizer of a stage: Adam with a cosine decay to zero.

    Args:
      stage: ``"train"``, ``"prune"`` or ``"tune"``.
      steps: number of steps of the stage.
    """
    rate = {"train": 1e-3, "prune": 1e-3, "tune": 3e-4}[stage]
    return optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1)))


def deep_compression(
    params: Any,
    loss_fn: Callable[..., Any],
    batches: Callable[[int], Any] | Iterable[Any],
    *,
    recipe: Sequence[Rule],
    steps: Steps,
    path: str | os.PathLike | None = None,
    optimizer: Callable[[str, int], optax.GradientTransformation] = adam,
    evaluate: Callable[[Any], float] | None = None,
    stateful: bool = False,
    key: jax.Array | None = None,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 1000,
    progress: bool = True,
) -> Compressed:
    """Trains, prunes, shares weights, tunes them and codes: Deep Compression.

    Stages: dense training; gradual pruning to the sparsities of the recipe, and
    retraining; :func:`compress` by the recipe; training of what the codes point to; an
    entropy-coded file. Each can be left out by its number of steps, or by ``path=None``.

    Args:
      params: dense parameters, trained or fresh.
      loss_fn: ``(params, batch) -> loss``; see ``stateful``.
      batches: function of the step that gives its batch (always the same one), or an
        iterable that can be iterated again and again, always in the same order.
      recipe: rules such as ``Rule(".*/kernel", chain(Magnitude(...), KMeans(...)))``.
      steps: length of the stages.
      path: where to write the artifact.
      optimizer: ``(stage, steps) -> optax transformation``.
      evaluate: ``params -> error``, called after each stage on dense parameters.
      stateful: ``loss_fn`` returns ``(loss, params)``; what is no parameter (batch
        statistics, counters) is taken over from there.
      key: random key, for encoders that draw.
      checkpoint: folder for Orbax checkpoints. If it holds one of this very run, the work
        goes on from there and ends in the same file, bit for bit; one with other parameters,
        recipe, steps or key is refused. Functions cannot be compared: that loss, batches and
        optimizer are the same is up to the caller.
      save_every: steps between two checkpoints; another is made on Ctrl-C.
      progress: show a bar for each stage.

    Returns:
      Dense parameters, compressed tree, table of stages and path.

    Raises:
      ValueError: if the recipe does not fit, prunes nothing although there are steps for
        it, or the checkpoint is of another run.
      TypeError: for steps that are no :class:`Steps`, or an optimizer that is no function of
        stage and steps.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] - x) ** 2)
      >>> recipe = [jom.Rule("w", jom.chain(
      ...     jom.prune.Magnitude(sparsity=0.75), jom.codebook.KMeans(bits=2)))]
      >>> out = jom.deep_compression(params, loss, lambda step: jnp.eye(8), recipe=recipe,
      ...                            steps=jom.Steps(prune=20, tune=10), progress=False)
      >>> out.small["w"].kind(), int((out.small["w"].materialize() != 0).sum())
      ('Masked(Clustered)', 16)

    References:
      Han et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016
    """
    recipe = check_recipe(recipe, who="deep_compression")
    if not callable(optimizer):
        raise TypeError(
            "deep_compression: optimizer= is a function of stage and steps, for instance "
            f"lambda stage, steps: optax.adam(1e-3); got {type(optimizer).__name__}"
        )
    if not isinstance(steps, Steps):
        raise TypeError(
            f"deep_compression: steps={steps!r:.80}; write Steps(train=..., prune=..., tune=...)"
        )
    save_every = whole(save_every, "deep_compression: save_every", least=1)
    leaves, _ = flatten(params)
    decisions = decide(leaves, recipe, who="deep_compression")
    if steps.prune and not any(find_magnitude(d.encoder) for d in decisions):
        raise ValueError(
            f"deep_compression: {steps.prune} steps of pruning, but no rule of the recipe prunes; "
            "use chain(prune.Magnitude(sparsity=...), ...), or Steps(prune=0)"
        )
    run = Run(
        loss_fn=loss_fn,
        batches=batches if callable(batches) else Replay(batches, "deep_compression"),
        optimizer=optimizer,
        stateful=stateful,
        save_every=save_every,
        progress=progress,
        checkpoints=Checkpoints(
            checkpoint,
            {
                "recipe": recipe_to_json(recipe),
                "steps": repr(steps),
                "params": digest(params),
                "key": digest(key),
                "stateful": repr(stateful),
            },
        ),
        evaluate=evaluate,
        parameters=sum(p.value.size for p in leaves if _is_floating(p.value)),
        recipe=recipe,
    )
    # What a file of the pruned parameters takes: the recipe without its other encoders.
    pruning = [Rule(rule.path, find_magnitude(rule.encoder), rule.axes) for rule in recipe]
    with run.checkpoints:
        dense = run.stage("train", params, steps.train, offset=0)
        if steps.prune:
            end = max(1, int(steps.ramp * steps.prune))
            schedule = cubic_schedule(1.0, begin=0, end=end)
            tail = gradual(schedule, recipe=recipe, every=steps.every)
            dense = run.stage(
                "prune", dense, steps.prune, offset=steps.train, tail=tail, counted=pruning
            )
        small = compress(dense, recipe, key=key)
        run.record("share", 0, small)
        small = run.stage("tune", small, steps.tune, offset=steps.train + steps.prune)
        if path is not None:
            artifact.save(path, small, recipe=recipe)
            run.record("code", 0, artifact.load(path), file_bytes=os.path.getsize(path))
    columns = ("stage", "steps", "bytes", "ratio", "error")
    table = Table(columns, run.rows, title="deep compression")
    return Compressed(dense, small, table, None if path is None else os.fspath(path))


def _is_floating(x: Any) -> bool:
    # As in a file: counters and random keys are stored, but are no parameters.
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
