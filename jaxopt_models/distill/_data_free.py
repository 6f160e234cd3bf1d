"""Distillation without data: a generator learns what the student does not know yet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .._options import whole
from .._partition import combine
from ._core import RESERVED, Loss, check_loss, compiled, descend, pairs, side_by_side, split_loss
from ._generators import generated
from ._inversion import Inversions
from ._network import as_network
from ._place import Place
from ._state import Scheme, State, check_floating


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
    inversions: int = 0,
    heads_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains a student by a teacher on what a generator makes; no example is ever seen.

    In one step, one program:

    * ``generator_steps`` times the generator `G` descends ``generator_loss`` on
      `x = G(z, y)` with fresh noise `z` and, where ``classes`` are given, labels `y`;
    * ``student_steps`` times the student descends ``loss`` on fresh `G(z, y)`, the generator
      fixed. With ``inversions`` half of each batch is drawn from the images that were made last.

    Both losses are of `(student, teacher, batch)`, the batch being `(x, y)` or `(x, None)`. With
    :func:`disagreement` for the loss and minus that for the generator this is DFAD; with
    :func:`one_hot`, :func:`information_entropy` and :func:`activation` for the generator DAFL;
    :func:`batchnorm_statistics` on the teacher's taps and ``inversions`` are those of CMI.

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
      inversions: number of generated images that are kept; 0 for none.
      heads_optimizer: another one for heads; default: the same.
      mesh: devices over which generated batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(student_params, teacher_params, generator_params, *, heads=None,
      memory=None, key=None)``, and ``step(state)``: there is no batch. Metrics are the means over
      the inner steps: ``loss`` and those of it are the student's, ``generator`` and
      ``generator/...`` the generator's. The generator's parameters are
      ``state.kept["generator"]``, the images ``state.kept["inversions"]``. The student's optimizer
      makes ``student_steps`` updates a step, which its schedules count.

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
    check_loss(generator_loss, who, "generator_loss")
    network, master = as_network(student, who, "student"), as_network(teacher, who, "teacher")
    batch, noise = whole(batch, f"{who}: batch", least=2), whole(noise, f"{who}: noise", least=1)
    student_steps = whole(student_steps, f"{who}: student_steps", least=1)
    generator_steps = whole(generator_steps, f"{who}: generator_steps", least=0)
    room = whole(inversions, f"{who}: inversions", least=0)
    if room and room < batch:
        raise ValueError(f"{who}: inversions={room} are less than a batch of {batch}; or give 0")
    if classes is not None:
        classes = whole(classes, f"{who}: classes", least=2)
    place = Place(mesh, axis, who)
    generator_txs = pairs(generator_optimizer, None, 1, who)[0][:1]
    start, taught = side_by_side(
        [network],
        [master],
        [loss],
        lambda i, students, fixed: fixed[0],
        pairs(optimizer, heads_optimizer, 1, who),
        place=place,
        reserved=(*RESERVED, "generator"),
    )

    def imagine(params: Any, key: jax.Array, count: int = batch) -> tuple[jax.Array, Any]:
        a, b = jax.random.split(key)
        z = jax.random.normal(a, (count, noise))
        y = None if classes is None else jax.random.randint(b, (count,), 0, classes)
        return place.inside(generator(params, z, y)), y

    def imagine_better(masters: Any, state: State, key: jax.Array) -> tuple[State, Any]:
        a, b = jax.random.split(key)

        def of(params: Any) -> Any:
            made = imagine(params, a)
            t, heads = state.trained[0]
            seen = network.look(combine(t, state.rest[0]), made, learn=True)
            more = {"heads": heads, "memory": state.memory, "step": state.step, "key": b}
            shown = master.look(masters[0], made, learn=True)
            found = generator_loss(dataclasses.replace(seen, **more), shown, made)
            value, metrics, _ = split_loss(found, who, state.memory)
            return value, {f"generator/{name}": m for name, m in metrics.items()}

        params, opt = state.kept["generator"], state.kept["generator_opt"]
        (value, metrics), grads = jax.value_and_grad(of, has_aux=True)(params)
        new, opt = descend(generator_txs, (grads,), (opt,), (params,), value)
        kept = state.kept | {"generator": new[0], "generator_opt": opt[0]}
        return dataclasses.replace(state, kept=kept), {"generator": value, **metrics}

    def learn(masters: Any, state: State, key: jax.Array) -> tuple[State, Any]:
        keys, kept = jax.random.split(key, 3), state.kept
        x, y = imagine(kept["generator"], keys[0], batch - batch // 2 if room else batch)
        if room:
            new = {"images": x} if y is None else {"images": x, "labels": y}
            # Filled together, so that one key draws the same places of both rings.
            rings = {name: kept["inversions"][name].put(v) for name, v in new.items()}
            old = {name: ring.draw(keys[1], batch // 2) for name, ring in rings.items()}
            x = jnp.concatenate([x, old["images"]])
            y = None if y is None else jnp.concatenate([y, old["labels"]])
            kept = kept | {"inversions": rings}
        now = dataclasses.replace(state, teachers=masters, kept=kept, key=keys[2])
        done, metrics = taught(now, jax.lax.stop_gradient((x, y)))
        return dataclasses.replace(done.moving(), key=state.key, step=state.step), metrics

    def advance(state: State, given: Any) -> tuple[State, dict[str, jax.Array]]:
        if given is not None:
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
        generator_params: Any,
        *,
        heads: Any = None,
        memory: Any = None,
        key: Any = None,
    ) -> State:
        check_floating(generator_params, f"{who}: generator_params")
        if generator is generated and not isinstance(generator_params, Mapping):
            raise TypeError(
                f"{who}: generator_params are {type(generator_params).__name__}; give those that "
                "distill.generator makes, or generator= the function they belong to"
            )
        told = generator_params.get("classes") if generator is generated else None
        if told is not None and classes is not None and len(told) != classes:
            raise ValueError(
                f"{who}: classes={classes}, but the generator was made for {len(told)}"
            )
        kept = {"generator": generator_params}
        kept["generator_opt"] = generator_txs[0].init(generator_params)
        if room:
            x, y = jax.eval_shape(imagine, generator_params, jax.random.key(0))
            kept["inversions"] = {"images": Inversions.empty(room, x.shape[1:], dtype=x.dtype)}
            if y is not None:
                kept["inversions"]["labels"] = Inversions.empty(room, (), dtype=y.dtype)
        return start([student], [teacher], heads=[heads], memories=[memory], kept=kept, key=key)

    return Scheme(init, compiled(advance, place))
