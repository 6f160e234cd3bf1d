"""Distillation without data: a generator learns what the student does not know yet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .._options import whole
from .._partition import combine
from ._core import Loss, compiled, descend, pairs, split_loss
from ._generators import generated
from ._inversion import Inversions
from ._network import as_network
from ._place import Place
from ._state import Scheme, State, begin, taken_over


def data_free(
    student: Any,
    teacher: Any,
    loss: Loss,
    generator_loss: Loss,
    optimizer: optax.GradientTransformation,
    generator_optimizer: optax.GradientTransformation,
    *,
    generator: Callable[..., jax.Array] = generated,
    batch: int = 256,
    noise: int = 100,
    classes: int | None = None,
    student_steps: int = 5,
    generator_steps: int = 1,
    memory: int = 0,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains a student by a teacher on what a generator makes; no example is ever seen.

    In one step, one program:

    * ``generator_steps`` times the generator `G` descends ``generator_loss`` on
      `x = G(z, y)` with fresh noise `z` and, where ``classes`` are given, labels `y`;
    * ``student_steps`` times the student descends ``loss`` on fresh `G(z, y)`, the generator
      fixed. With a memory, half of each batch are images from earlier steps.

    Both losses are of `(student, teacher, batch)`, the batch being `(x, y)` or `(x, None)`. With
    :func:`disagreement` for the loss and minus that for the generator this is DFAD; with
    :func:`one_hot`, :func:`information_entropy` and :func:`activation` for the generator DAFL;
    :func:`batchnorm_statistics` on the teacher's taps and the memory are those of CMI.

    Args:
      student: function `(params, x) -> out`, or a :class:`Network`.
      teacher: the same, in evaluation mode.
      loss: of the student.
      generator_loss: of the generator; its derivative goes through both networks.
      optimizer: any optax transformation, of the student.
      generator_optimizer: of the generator.
      generator: `(generator_params, z, y) -> x`, `y` being ``None`` without classes; default:
        the network whose parameters :func:`generator` makes.
      batch: images in each batch.
      noise: length of `z`, standard normal.
      classes: number of classes, drawn uniformly; ``None`` for no labels.
      student_steps: of the student in each step; the program grows with it.
      generator_steps: of the generator in each step.
      memory: number of generated images that are kept; 0 for none.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which generated batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(student_params, teacher_params, generator_params, *, heads=None,
      memory=None, key=None)``, and ``step(state)``: there is no batch. Metrics are the means over
      the inner steps, ``loss`` the student's, ``generator`` the generator's. The generator's
      parameters are ``state.kept["generator"]``, its memory ``state.kept["inversions"]``.

    Raises:
      TypeError, ValueError: as :func:`teacher_student`; for numbers out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> apart = lambda student, teacher, batch: distill.disagreement(student.out, teacher.out)
      >>> scheme = distill.data_free(
      ...     fn, fn, apart, lambda *seen: -apart(*seen), optax.sgd(0.02), optax.adam(1e-3),
      ...     generator=lambda params, z, y: jnp.tanh(z @ params["w"]), noise=8, batch=64)
      >>> w = jax.random.normal(jax.random.key(0), (8, 2))
      >>> state = scheme.init({"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}, {"w": w})
      >>> for _ in range(60):
      ...     state, metrics = scheme.step(state)
      >>> bool(jnp.abs(state.student["w"] - 1).max() < 0.1)
      True

    References:
      Fang et al., `Data-Free Adversarial Distillation <https://arxiv.org/abs/1912.11006>`_, 2019
      Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_,
      2019
      Fang et al., `Contrastive Model Inversion for Data-Free Knowledge Distillation
      <https://arxiv.org/abs/2105.08584>`_, 2021
    """
    who = "data_free"
    network, master = as_network(student, who, "student"), as_network(teacher, who, "teacher")
    batch, noise = whole(batch, f"{who}: batch", least=2), whole(noise, f"{who}: noise", least=1)
    student_steps = whole(student_steps, f"{who}: student_steps", least=1)
    generator_steps = whole(generator_steps, f"{who}: generator_steps", least=0)
    room = whole(memory, f"{who}: memory", least=0)
    if room and room < batch:
        raise ValueError(f"{who}: memory={room} holds less than a batch of {batch}; or give 0")
    if classes is not None:
        classes = whole(classes, f"{who}: classes", least=2)
    place = Place(mesh, axis, who)
    optimizers = pairs(optimizer, heads_optimizer, 1, who)
    generator_txs = pairs(generator_optimizer, None, 1, who)[0]

    def imagine(params: Any, key: jax.Array, count: int = batch) -> tuple[jax.Array, Any]:
        a, b = jax.random.split(key)
        z = jax.random.normal(a, (count, noise))
        y = None if classes is None else jax.random.randint(b, (count,), 0, classes)
        return place.inside(generator(params, z, y)), y

    def both(
        state: State, masters: Any, trained: Any, batch: Any, key: jax.Array, *, learn: bool
    ) -> Any:
        t, heads = trained
        seen = network.look(combine(t, state.rest[0]), batch, learn=True)
        seen = dataclasses.replace(seen, heads=heads, memory=state.memory, step=state.step, key=key)
        return seen, master.look(masters[0], batch, learn=learn)

    def imagine_better(masters: Any, state: State, key: jax.Array) -> tuple[State, Any]:
        def of(params: Any) -> Any:
            made = imagine(params, key)
            seen, shown = both(state, masters, state.trained[0], made, key, learn=True)
            value, metrics, _ = split_loss(generator_loss(seen, shown, made), who)
            return value, {"generator": value, **metrics}

        params, opt = state.kept["generator"], state.kept["generator_opt"]
        grads, metrics = jax.grad(of, has_aux=True)(params)
        new, opt = descend(generator_txs[:1], (grads,), (opt,), (params,))
        kept = state.kept | {"generator": new[0], "generator_opt": opt[0]}
        return dataclasses.replace(state, kept=kept), metrics

    def learn(masters: Any, state: State, key: jax.Array) -> tuple[State, Any]:
        keys = jax.random.split(key, 3)
        kept = state.kept
        x, y = imagine(kept["generator"], keys[0], batch - batch // 2 if room else batch)
        if room:
            new = {"images": x} if y is None else {"images": x, "labels": y}
            # Filled together, so that one key draws the same places of both rings.
            rings = {name: kept["inversions"][name].put(v) for name, v in new.items()}
            old = {name: ring.draw(keys[1], batch // 2) for name, ring in rings.items()}
            x = jnp.concatenate([x, old["images"]])
            y = None if y is None else jnp.concatenate([y, old["labels"]])
            kept = kept | {"inversions": rings}
        made = jax.lax.stop_gradient((x, y))

        def of(trained: Any) -> Any:
            seen, shown = both(state, masters, trained, made, keys[2], learn=False)
            value, metrics, memory = split_loss(loss(seen, shown, made), who)
            memory = state.memory if memory is None else memory
            return value, ({"loss": value, **metrics}, seen.new, memory)

        grads, (metrics, new, memory) = jax.grad(of, has_aux=True)(state.trained[0])
        trained, opt = descend(optimizers[0], grads, state.opt[0], state.trained[0])
        after = dataclasses.replace(
            state,
            trained=(trained,),
            rest=(taken_over(trained[0], state.rest[0], new),),
            opt=(opt,),
            memories=(memory,),
            kept=kept,
        )
        return after, metrics

    def advance(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        if batch is not None:
            raise TypeError("data_free: step(state) takes no batch; the generator makes them")
        key = jax.random.fold_in(state.key, state.step)
        # Apart from the state, so that no loop carries them.
        masters, moving = state.teachers, state.moving()
        metrics: dict[str, jax.Array] = {}
        for i, (times, inner) in enumerate(
            ((generator_steps, imagine_better), (student_steps, learn))
        ):
            if times:
                keys = jax.random.split(jax.random.fold_in(key, i), times)
                # Unrolled: in a loop XLA computes convolutions on a CPU twenty times slower.
                one = functools.partial(inner, masters)
                moving, found = jax.lax.scan(one, moving, keys, unroll=True)
                metrics |= {name: jnp.mean(v) for name, v in found.items()}
        return dataclasses.replace(moving, teachers=masters, step=state.step + 1), metrics

    def init(
        student: Any,
        teacher: Any,
        generator: Any,
        *,
        heads: Any = None,
        memory: Any = None,
        key: Any = None,
    ) -> State:
        kept = {"generator": generator, "generator_opt": generator_txs[0].init(generator)}
        if room:
            x, y = jax.eval_shape(imagine, generator, jax.random.key(0))
            kept["inversions"] = {"images": Inversions.empty(room, x.shape[1:], dtype=x.dtype)}
            if y is not None:
                kept["inversions"]["labels"] = Inversions.empty(room, (), dtype=y.dtype)
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
