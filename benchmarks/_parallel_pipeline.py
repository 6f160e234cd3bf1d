"""Pipelines, and knowledge on devices of its own, on eight devices of this CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import data, distill, models, parallel, quant
from jaxopt_models._bits import array_bits

from ._rows import Row

BATCH = 256
CLASSES = 10


def rows(*, quick: bool) -> list[Row]:
    """Compares pipelines and knowledge apart with one device, and reads their programs."""
    return [*_pipelines(quick), *_knowledge(quick)]


def _images(n: int) -> tuple[Any, Any]:
    images = data.fashion_mnist_small()
    return data.normalize(images.train_images[:n]), images.train_labels[:n]


def _lenet() -> tuple[list[Any], list[Any]]:
    """Returns LeNet-5 in four stages and their parameters, the largest one in 4 bits.

    Smooth, as LeCun's was (means for pooling, tanh): beside a kink of `max` or ReLU the last bit
    of a sum decides on a derivative, and steps drift apart whatever computes them.
    """
    params = models.LeNet5().init(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    sides = ("NHWC", "HWIO", "NHWC")

    def convolve(p: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=sides)
        b, h, w, c = y.shape
        return jnp.tanh((y + p["bias"]).reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)))

    def first(p: Any, x: Any) -> Any:
        return convolve(p, x.reshape(-1, 28, 28, 1))

    def third(p: Any, x: Any) -> Any:
        return jnp.tanh(x.reshape(-1, 800) @ p["kernel"] + p["bias"])

    def fourth(p: Any, x: Any) -> Any:
        return x @ p["kernel"] + p["bias"]

    parts = [params[name] for name in ("conv1", "conv2", "ip1", "ip2")]
    parts[2] = jom.compress(parts[2], [jom.Rule("kernel", quant.Int(bits=4, group=32))])
    return [first, convolve, third, fourth], parts


def _cross_entropy(out: Any, labels: Any) -> Any:
    return distill.cross_entropy(out, labels)


def _gap(a: Any, b: Any) -> float:
    """Returns the largest difference between two trees over the largest entry of each array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    arrays = [[np.asarray(v, np.float64) for v in pair] for pair in pairs]
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) for x, y in arrays)


def _pipelines(quick: bool) -> list[Row]:
    from jaxopt_models import parallel

    stages, parts = _lenet()
    mesh = jax.make_mesh((4, 2), ("stage", "data"))
    x, y = _images(BATCH)
    trained, rest = map(list, zip(*map(jom.partition, parts), strict=True))
    tx, steps = optax.sgd(0.05, momentum=0.9), 3 if quick else 10

    def loss(trained: Any) -> Any:
        h = x
        for stage, t, r in zip(stages, trained, rest, strict=True):
            h = jom.simulate(stage)(jom.combine(t, r), h)
        return _cross_entropy(h, y)

    @jax.jit
    def by_hand(trained: Any, opt: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt = tx.update(grads, opt, trained)
        return value, grads, optax.apply_updates(trained, updates), opt

    found, end, opt = [], trained, tx.init(trained)
    value, grads, *_ = by_hand(end, opt)
    for _ in range(steps):
        *_, end, opt = by_hand(end, opt)
    for schedule in ("gpipe", "1f1b"):
        pipe = parallel.pipeline(stages, mesh, microbatches=8, data="data", schedule=schedule)
        got, ours = pipe.value_and_grad(_cross_entropy)(pipe.place(parts), x, y)
        init, step = pipe.training(_cross_entropy, tx)
        state = init(parts)
        for _ in range(steps):
            state, _ = step(state, x, y)
        name = f"LeNet-5 in 4 stages (ip1 in 4 bits) x 2 data, 8 micro-batches, {schedule}"
        found += [
            Row(
                f"{name}: loss, relative difference from the sequence", _gap(got, value), "<= 1e-5"
            ),
            Row(f"{name}: gradients, the same", _gap(ours.members(), grads), "<= 1e-5"),
            Row(
                f"{name}: parameters after {steps} steps, the same",
                _gap(state.trained.members(), end),
                "<= 1e-5",
            ),
        ]
    return found + _programs(stages, parts)


def _programs(stages: Sequence[Any], parts: Sequence[Any]) -> list[Row]:
    """Returns bubbles and memory of programs of 8 and 32 micro-batches of 32 images."""
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    found, memory = [], {}
    for count in (8, 32):
        for schedule in ("gpipe", "1f1b"):
            pipe = parallel.pipeline(stages, mesh, microbatches=count, schedule=schedule)
            x = jax.ShapeDtypeStruct((32 * count, 28, 28), "float32")
            y = jax.ShapeDtypeStruct((32 * count,), "int32")
            step = jax.jit(pipe.value_and_grad(_cross_entropy))
            program = step.lower(pipe.place(parts), x, y).compile()
            memory[schedule, count] = program.memory_analysis().temp_size_in_bytes
            ticks = parallel.ticks(program)
            phases = pipe.timetable.phases
            slots = sum(t * (p.forward + p.backward) for t, p in zip(ticks, phases, strict=True))
            bubble = 1 - 2 * count / slots
            claim = f"{schedule}, 4 stages, {count} micro-batches: bubble in the compiled program"
            note = f"loops of {', '.join(map(str, ticks))} ticks"
            found.append(Row(claim, bubble, f"<= {3 / (count + 3) + 1e-9:.9f}", note=note))
        both = [memory[schedule, count] for schedule in ("1f1b", "gpipe")]
        claim = f"1f1b over gpipe, temporaries of the program, {count} micro-batches"
        note = f"{both[0]:,} and {both[1]:,} bytes, XLA's memory_analysis"
        found.append(Row(claim, both[0] / both[1], "<= 0.999", note=note))
    return found


def _mlp(params: Any, x: Any) -> Any:
    x = x.reshape(-1, 784)
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def _mlp_params(sizes: Sequence[int], seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"layer{i}": {"kernel": jax.random.normal(k, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def _knowledge(quick: bool) -> list[Row]:
    from jaxopt_models import distill, parallel

    loss = distill.classification(hard=0.1, soft=0.9, temperature=4.0)
    batch, steps = _images(128), 3 if quick else 20
    sizes = [(784, 300, 10), (784, 500, 300, 10), (784, 200, 10), (784, 500, 300, 10)]
    teachers = [_mlp_params(s, i) for i, s in enumerate(sizes)]
    small = jom.compress(teachers[1], [jom.Rule(".*/kernel", quant.Int(bits=8))])
    student = _mlp_params((784, 64, 10), 9)
    mesh = jax.make_mesh((4,), ("member",), devices=jax.devices()[:4])
    plain = distill.teacher_student(_mlp, [_mlp] * 4, loss, optax.adam(1e-3))
    apart = parallel.teacher_student(_mlp, _mlp, loss, optax.adam(1e-3), mesh=mesh, axis="member")
    states = [scheme.init(student, teachers) for scheme in (plain, apart)]
    for _ in range(steps):
        states = [s.step(state, batch)[0] for s, state in zip((plain, apart), states, strict=True)]
    ends = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.student)]) for s in states]
    bits = [x.view(np.uint32) for x in ends]
    mixed = parallel.Apart.of([*teachers[:1], small, *teachers[2:]], mesh, axis="member")
    program = apart.step.program.lower(states[1].moving(), states[1].teachers, batch).compile()
    given, alone = _given(program), _given(_alone(states[1], batch))
    largest = max(_bytes(t) for t in teachers)
    claim = "four teachers on four devices, one student"
    name = "three mutual peers on three devices"
    return [
        Row(
            f"{claim}: parameters of the student that differ in any bit after {steps} steps",
            float(np.sum(bits[0] != bits[1])),
            "<= 0",
        ),
        Row(
            f"{claim}: teachers' bytes that the program gives each device, over the largest's",
            (given - alone) / largest,
            "<= 1.001",
            note=f"{given - alone:,.0f} of {sum(map(_bytes, teachers)):,} bytes in all",
        ),
        Row(
            "the same with one of them in 8 bits: bytes on each device over the largest's",
            mixed.bytes_each / max(map(_bytes, [*teachers[:1], small, *teachers[2:]])),
            note="a vector for each data type, as long as the longest member's",
        ),
        Row(
            f"{claim}: bytes that travel a step besides logits",
            _moved(program) - 4 * 128 * CLASSES * 4,
            "<= 0",
        ),
        *_mutual(name, loss, batch, steps),
    ]


def _mutual(name: str, loss: Any, batch: Any, steps: int) -> list[Row]:
    sizes = [(784, 300, 10), (784, 64, 10), (784, 200, 100, 10)]
    peers = [_mlp_params(s, i) for i, s in enumerate(sizes)]
    mesh = jax.make_mesh((3,), ("peer",), devices=jax.devices()[:3])
    plain = distill.mutual([_mlp] * 3, loss, optax.sgd(0.05, momentum=0.9))
    apart = parallel.mutual(_mlp, loss, optax.sgd(0.05, momentum=0.9), mesh=mesh)
    states = [plain.init(peers), apart.init(peers)]
    for _ in range(steps):
        states = [s.step(state, batch)[0] for s, state in zip((plain, apart), states, strict=True)]
    moved = _moved(apart.step.program.lower(states[1], batch).compile())
    logits = 3 * 128 * CLASSES * 4
    return [
        Row(
            f"{name}: relative difference from one device after {steps} steps",
            _gap(states[1].students, states[0].students),
            "<= 1e-6",
        ),
        Row(
            f"{name}: bytes that travel a step besides logits",
            moved - logits,
            "<= 0",
            note=f"{logits:,} bytes of logits; parameters are {sum(map(_bytes, peers)):,}",
        ),
    ]


def _alone(state: Any, batch: Any) -> Any:
    """Returns a program without teachers: what else each device is given."""

    def rest(moving: Any, batch: Any) -> Any:
        return jax.tree.map(lambda x: x, (moving, batch))

    return jax.jit(rest, keep_unused=True).lower(state.moving(), batch).compile()


def _bytes(tree: Any) -> int:
    return sum(array_bits(x) for x in jax.tree.leaves(tree)) // 8


def _given(program: Any) -> int:
    """Returns the bytes of arguments on each device."""
    return program.memory_analysis().argument_size_in_bytes


def _moved(program: Any) -> int:
    """Returns the bytes of all arrays that devices send to each other."""
    return sum(c.times * c.bytes for c in parallel.collectives(program))
