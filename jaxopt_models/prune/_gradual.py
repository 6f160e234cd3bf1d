"""Pruning while training, as the last transformation of an optax chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._axes import Axes
from .._chain import Chain
from .._encoded import is_encoded
from .._encoder import Encoder
from .._options import pattern, portion, whole
from .._partition import check_trainable
from .._paths import Parameter, flatten
from .._recipe import Rule, decide
from ._magnitude import Magnitude
from ._select import keep_largest


class GradualState(NamedTuple):
    """State of :func:`gradual`.

    Args:
      step: `int32`, updates so far.
      masks: booleans, a tree like the parameters, ``None`` where nothing is pruned.
    """

    step: jax.Array
    masks: Any


def cubic_schedule(
    sparsity: float, *, begin: int, end: int, initial: float = 0.0
) -> Callable[[jax.Array], jax.Array]:
    r"""Returns the sparsity schedule of Zhu and Gupta.

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Args:
      sparsity: final sparsity `s_f`, in [0, 1]; 1 where a recipe holds the real ones.
      begin: step `t_0`, before which the sparsity is ``initial``.
      end: step `t_1`, from which on it is final.
      initial: sparsity `s_i` at the start.

    Returns:
      A function of the step.

    Raises:
      TypeError: for sparsities that are no numbers, or steps that are not whole.
      ValueError: for sparsities outside [0, 1] or falling, or steps that do not rise.

    Example:
      >>> schedule = cubic_schedule(0.8, begin=0, end=100)
      >>> [round(float(schedule(t)), 3) for t in (0, 50, 100, 200)]
      [0.0, 0.7, 0.8, 0.8]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    sparsity = portion(sparsity, "cubic_schedule: sparsity", closed=True)
    initial = portion(initial, "cubic_schedule: initial", closed=True)
    begin, end = whole(begin, "cubic_schedule: begin"), whole(end, "cubic_schedule: end")
    if initial > sparsity or not 0 <= begin < end:
        raise ValueError(
            f"cubic_schedule: need initial <= sparsity and 0 <= begin < end, got "
            f"initial={initial}, sparsity={sparsity}, begin={begin}, end={end}"
        )

    def schedule(step: jax.Array) -> jax.Array:
        left = 1 - jnp.clip((jnp.asarray(step) - begin) / (end - begin), 0, 1)
        return sparsity + (initial - sparsity) * left**3

    return schedule


def gradual(
    schedule: Callable[[jax.Array], Any],
    *,
    scope: Literal["leaf", "global"] = "leaf",
    only: str | None = None,
    recipe: Sequence[Rule] | None = None,
    every: int = 50,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training: the last transformation of an optax chain.

    Every ``every`` steps the smallest entries of ``params + updates`` are cut; between
    those steps the masks stay. The updates are rewritten so that ``params + updates`` is
    exactly zero off the mask, whatever moments or weight decay say: there is nothing to
    call after ``optax.apply_updates`` and nothing to remember.

    Args:
      schedule: step -> sparsity in [0, 1), for instance :func:`cubic_schedule`.
      scope: ``"leaf"``, that sparsity in each parameter; ``"global"``, over all of them.
      only: regular expression on whole paths of what is pruned; default: every parameter
        with two or more axes.
      recipe: rules whose :class:`Magnitude` gives each parameter its own final sparsity
        and structure; the schedule then goes from 0 to 1 and says which share of it. What
        the recipe does not prune stays dense; takes the place of ``only``.
      every: steps between two updates of the masks.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: for options that contradict each other, if nothing is selected, or if
        ``update`` is called without ``params``.
      TypeError: if the parameters hold codes that no optimizer can train.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_models import prune
      >>> tx = optax.chain(optax.sgd(0.1), prune.gradual(lambda step: 0.5, only="w", every=1))
      >>> params = {"w": jnp.array([3.0, 0.1, -2.0, 0.2])}
      >>> updates, _ = tx.update({"w": jnp.zeros(4)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([ 3.,  0., -2.,  0.], dtype=float32)

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    if scope not in ("leaf", "global"):
        raise ValueError(f"gradual: scope={scope!r} is neither 'leaf' nor 'global'")
    if recipe is not None and (only is not None or scope == "global"):
        raise ValueError(
            "gradual: recipe= says what is pruned and how much; leave out only=, scope="
        )
    every = whole(every, "gradual: every", least=1)

    def init(params: Any) -> GradualState:
        check_trainable(params, who="gradual")
        leaves, unflatten = flatten(params)
        pruned = select(leaves, only=only, recipe=recipe, who="gradual")
        masks = [
            None if s is None else jnp.ones(p.value.shape, bool)
            for p, s in zip(leaves, pruned, strict=True)
        ]
        return GradualState(jnp.zeros((), jnp.int32), unflatten(masks))

    def update(updates: Any, state: GradualState, params: Any = None, **extra: Any):
        del extra
        if params is None:
            raise ValueError("gradual: update needs params, tx.update(grads, state, params)")
        leaves, unflatten = flatten(params)
        steps, unflatten_steps = flatten(updates)
        pruned = select(leaves, only=only, recipe=recipe, who="gradual")
        at = [i for i, s in enumerate(pruned) if s is not None]
        old = jax.tree.leaves(state.masks)
        new = {i: optax.apply_updates(leaves[i].value, steps[i].value) for i in at}

        def choose(masks: list[jax.Array]) -> list[jax.Array]:
            sparsity = jnp.asarray(schedule(state.step), jnp.float32)
            if scope == "global":
                scores = [jnp.abs(new[i]).astype(jnp.float32) for i in at]
                size = sum(s.size for s in scores)
                kept = size - jnp.floor(sparsity * size + 0.5).astype(jnp.int32)
                return keep_largest(scores, kept, keep=[None] * len(scores))
            return [pruned[i].mask(new[i], sparsity) for i in at]

        masks = jax.lax.cond(state.step % every == 0, choose, lambda m: m, old)
        kept = dict(zip(at, masks, strict=True))
        rewritten = [
            u.value if i not in kept else keep_step(kept[i], u.value, p.value)
            for i, (u, p) in enumerate(zip(steps, leaves, strict=True))
        ]
        tree = unflatten([kept.get(i) for i in range(len(leaves))])
        return unflatten_steps(rewritten), GradualState(state.step + 1, tree)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_step(mask: jax.Array, update: jax.Array, w: jax.Array) -> jax.Array:
    """Rewrites an update so that ``w + update`` is exactly zero off the mask."""
    return jnp.where(mask, update, -w.astype(update.dtype))


class Pruned(NamedTuple):
    """How one parameter is pruned: by an encoder of a recipe, or by the schedule alone."""

    encoder: Magnitude | None
    axes: Axes

    def mask(self, w: jax.Array, value: jax.Array) -> jax.Array:
        """Marks what is kept of ``w`` at a value of the schedule."""
        if self.encoder is None:
            kept = w.size - jnp.floor(value * w.size + 0.5).astype(jnp.int32)
            return keep_largest([jnp.abs(w)], kept, keep=[None])[0]
        encoder, axes = self.encoder, Axes(self.axes.out)

        def one(w: jax.Array) -> jax.Array:
            return encoder.mask(w, axes, None, value)

        if not encoder.across_stack:
            for _ in range(self.axes.stack):
                one = jax.vmap(one)
        return one(w)


def select(
    leaves: Sequence[Parameter], *, only: str | None, recipe: Sequence[Rule] | None, who: str
) -> list[Pruned | None]:
    """Says of each leaf how it is pruned, or ``None``; raises if none is.

    Leaves encoded before keep the masks they have.
    """
    if recipe is not None:
        chosen = [
            None
            if is_encoded(p.value)
            else _pruned(find_magnitude(d.encoder), d.rule.axes if d.rule else None, p)
            for d, p in zip(decide(leaves, recipe, who=who), leaves, strict=True)
        ]
    else:
        selected = pattern(".*" if only is None else only, f"{who}: only")
        least = 2 if only is None else 1
        chosen = [
            Pruned(None, Axes().resolve(len(p.value.shape)))
            if not p.reason
            and not is_encoded(p.value)
            and selected.fullmatch(p.path)
            and len(p.value.shape) >= least
            else None
            for p in leaves
        ]
    if not any(chosen):
        paths = ", ".join(p.path for p in leaves)
        raise ValueError(f"{who}: nothing is pruned; paths are: {paths}")
    return chosen


def _pruned(encoder: Magnitude | None, axes: Axes | None, p: Parameter) -> Pruned | None:
    return encoder and Pruned(encoder, (axes or Axes()).resolve(len(p.value.shape)))


def find_magnitude(encoder: Encoder | None) -> Magnitude | None:
    """Returns the pruning step of an encoder, if it has one."""
    steps = encoder.encoders if isinstance(encoder, Chain) else (encoder,)
    return next((e for e in steps if isinstance(e, Magnitude)), None)
