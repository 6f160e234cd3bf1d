"""Teachers, peers, ensembles and towers on devices of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parallel_programs import collectives, gap, mesh, parameters, same

import jaxopt_models as jom
from jaxopt_models import distill, parallel, quant

RNG = np.random.default_rng(0)
CLASSES = 3
LOSS = distill.classification(hard=0.3, soft=0.7, temperature=2.0)


def normal(*shape, scale=0.3):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)


def one(params, x):
    return x @ params["w"] + params["b"][None]


def two(params, x):
    return jnp.tanh(x @ params["u"]) @ params["v"]


def scanned(params, x):
    # A loop that begins with zeros, as any recurrent network.
    def body(h, w):
        return jnp.tanh(h @ w + x), None

    h, _ = jax.lax.scan(body, jnp.zeros_like(x), params["stack"])
    return h @ params["out"]


def linear(width=6):
    return {"w": normal(width, CLASSES), "b": normal(CLASSES)}


def deep(hidden):
    return {"u": normal(6, hidden), "v": normal(hidden, CLASSES)}


def batch(i=0, rows=8):
    rng = np.random.default_rng(i)
    return jnp.asarray(rng.normal(size=(rows, 6)), jnp.float32), rng.integers(0, CLASSES, rows)


def four_teachers():
    recipe = [jom.Rule("[uv]", quant.Int(bits=4, group=2))]
    loops = {"stack": normal(2, 6, 6), "out": normal(6, CLASSES)}
    params = [deep(8), jom.compress(deep(16), recipe), loops, linear()]
    return [two, two, scanned, one], params


def stepped(scheme, state, steps=2, at=batch):
    for i in range(steps):
        state, metrics = scheme.step(state, at(i))
    return state, metrics


def test_four_teachers_on_four_devices_change_no_bit_of_the_student():
    fns, params = four_teachers()
    student = deep(5)
    plain = distill.teacher_student(two, fns, LOSS, optax.adam(0.01))
    expected, told = stepped(plain, plain.init(student, params))
    where = mesh(teacher=4)
    scheme = parallel.teacher_student(two, fns, LOSS, optax.adam(0.01), mesh=where)
    state = scheme.init(student, params)
    state, metrics = stepped(scheme, state)
    assert same(state.student, expected.student)
    assert same(metrics, told)
    assert scheme.step.program._cache_size() == 1
    [teachers] = state.teachers
    assert all(same(a, b) for a, b in zip(teachers.members(), params, strict=True))
    arguments = state.moving(), state.teachers, batch()
    text = scheme.step.program.lower(*arguments).compile().as_text()
    # On each device: one row of each buffer, the student's state and the batch; and logits travel.
    held = [b.nbytes // 4 for b in teachers.buffers if b.dtype != jnp.int4]
    assert all(parameters(text).count(n) >= held.count(n) for n in held)
    whole = sum(x.nbytes for x in jax.tree.leaves(params) if x.dtype == jnp.float32)
    assert max(parameters(text)) < whole / 2
    assert collectives(text) == [("all-gather", 4 * 4 * 8 * CLASSES)]


@pytest.mark.full
@pytest.mark.parametrize("data", ["teacher", "data"])
def test_the_students_batches_may_be_divided_too(data):
    fns, params = four_teachers()
    student = deep(5)
    plain = distill.teacher_student(two, fns, LOSS, optax.adam(0.01))
    expected, told = stepped(plain, plain.init(student, params))
    where = mesh(teacher=4, data=2)
    scheme = parallel.teacher_student(two, fns, LOSS, optax.adam(0.01), mesh=where, data=data)
    state, metrics = stepped(scheme, scheme.init(student, params))
    assert gap(state.student, expected.student) < 1e-6 and gap(metrics, told) < 1e-6


def test_an_ensemble_apart_is_one_teacher_of_any_scheme():
    params = [linear() for _ in range(2)]
    where = mesh(teacher=2)
    ensemble = parallel.teachers(one, where, combine=parallel.mean)
    apart = parallel.Apart.of(params, where, axis="teacher")
    expected = (one(params[0], batch()[0]) + one(params[1], batch()[0])) / 2
    scheme = distill.teacher_student(one, ensemble, LOSS, optax.sgd(0.1))
    _, metrics = scheme.step(scheme.init(linear(), apart), (*batch(),))
    assert set(metrics) == {"loss", "hard", "soft"}
    assert gap(ensemble.look(apart, batch()).out, expected) < 1e-6


@pytest.mark.parametrize("alike", [False, pytest.param(True, marks=pytest.mark.full)])
def test_peers_apart_equal_mutual_learning_and_only_logits_cross(alike):
    networks = [one] * 3 if alike else [one, two, one]
    params = [linear(), linear() if alike else deep(64), linear()]
    plain = distill.mutual(networks, LOSS, optax.adam(0.01))
    expected, told = stepped(plain, plain.init(params))
    scheme = parallel.mutual(networks, LOSS, optax.adam(0.01), mesh=mesh(peer=3))
    state, metrics = stepped(scheme, scheme.init(params))
    assert gap(state.students, expected.students) < 1e-6
    assert gap(metrics, told) < 1e-6
    assert scheme.step.program._cache_size() == 1
    text = scheme.step.program.lower(state, batch()).compile().as_text()
    assert collectives(text) == [("all-gather", 3 * 4 * 8 * CLASSES)]
    assert ("conditional" in text) != alike
    # What is trained, the optimizer's two moments, and little else.
    largest = 4 * (6 * 64 + 64 * CLASSES) if not alike else 0
    assert sum(parameters(text)) < 3 * largest + 4 * 6 * 8 + 1000


@pytest.mark.full
def test_peers_keep_heads_memories_and_statistics():
    def counted(params, x):
        return one(params, x), params | {"mean": params["mean"] + x.mean()}

    def loss(peer, others, batch):
        noise = jax.random.normal(peer.key, ())
        value = jnp.mean((peer.out @ peer.heads - others[0].out) ** 2) + noise * jnp.sum(peer.heads)
        return value, {"told": noise}, peer.memory + 1

    network = distill.Network(counted, stateful=True, fixed="mean")
    params = [linear() | {"mean": jnp.float32(i)} for i in range(2)]
    options = {"heads": [normal(3, 3), normal(3, 3)], "memory": [jnp.int32(0), jnp.int32(5)]}
    plain = distill.mutual([network, network], loss, optax.sgd(0.1))
    expected, told = stepped(plain, plain.init(params, **options))
    scheme = parallel.mutual(network, loss, optax.sgd(0.1), mesh=mesh(peer=2))
    state, metrics = stepped(scheme, scheme.init(params, **options))
    assert gap(state.students, expected.students) < 1e-6 and gap(metrics, told) < 1e-6
    assert state.memories.members() == [2, 7]
    heads = [heads for _, heads in state.trained.members()]
    assert gap(heads, [heads for _, heads in expected.trained]) < 1e-6


def test_towers_of_their_own_compression_are_trained_together():
    def image(params, pixels, words):
        return jnp.tanh(pixels @ params["conv"]) @ params["out"]

    def text(params, pixels, words):
        return params["table"][words].mean(1) @ params["out"]

    def loss(outs, *batch):
        return distill.image_text(*outs, temperature=0.5)

    towers, whole = [image, text], [jom.Rule(".*", quant.Int(bits=8))]
    pictures = {"conv": normal(6, 8), "out": normal(8, 4)}
    words = {"table": normal(10, 8), "out": normal(8, 4)}
    parts = [jom.Rule("out", quant.Int(bits=4, group=4))]
    params = [jom.compress(pictures, whole), jom.compress(words, parts)]
    given = normal(8, 6), jnp.asarray(RNG.integers(0, 10, (8, 3)))
    where = mesh(tower=2, data=2)
    init, step = parallel.towers(towers, loss, optax.sgd(0.1), mesh=where, data="data")
    state, metrics = step(init(params), *given)
    halves = [jom.partition(p) for p in params]

    def plain(trained):
        pairs = zip(towers, trained, halves, strict=True)
        return loss([jom.simulate(fn)(jom.combine(t, r), *given) for fn, t, (_, r) in pairs])

    trained = [t for t, _ in halves]
    value, grads = jax.jit(jax.value_and_grad(plain))(trained)
    expected = jax.tree.map(lambda t, g: t - 0.1 * g, trained, grads)
    assert gap(metrics["loss"], value) < 1e-5
    assert gap(state.trained.members(), expected) < 1e-5


def test_a_teacher_ahead_works_on_its_own_devices():
    there = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[4:8])
    here = mesh(data=4)
    params = {"w": normal(6, 4).astype(jnp.bfloat16), "b": jnp.zeros(4, jnp.bfloat16)}
    split = NamedSharding(there, PartitionSpec(None, "model"))
    params["w"] = jax.device_put(params["w"], split)
    taken = []

    def batches():
        for i in range(3):
            taken.append(i)
            yield batch(i)

    seen = []
    found = parallel.ahead(one, params, batches(), mesh=there, to=here)
    assert taken == []
    for i, ((x, y), logits) in enumerate(found):
        seen.append(i)
        # When a batch is given, the teacher works on the next one already.
        assert taken == list(range(min(i + 2, 3)))
        for value in (x, y, logits):
            assert value.sharding.device_set == set(jax.devices()[:4])
            assert value.sharding.spec == PartitionSpec("data")
        assert gap(logits, one(jax.device_get(params), batch(i)[0])) < 1e-2
        np.testing.assert_array_equal(y, batch(i)[1])
    assert seen == [0, 1, 2]


def test_what_is_wrong_is_named():
    where = mesh(teacher=2)
    fns, params = [one, one], [linear(), linear()]
    options = {"mesh": where, "axis": "teacher"}
    student = parallel.teacher_student
    cases = [
        (
            ValueError,
            "teacher_student: 3 teachers for the 2 devices",
            lambda: student(one, [one] * 3, LOSS, optax.sgd(1), **options),
        ),
        (
            TypeError,
            "teacher_student: teacher 1 is int",
            lambda: student(one, [one, 3], LOSS, optax.sgd(1), **options),
        ),
        (TypeError, "loss is int", lambda: student(one, fns, 3, optax.sgd(1), **options)),
        (
            ValueError,
            "1 teachers' parameters for the 2 devices",
            lambda: student(one, fns, LOSS, optax.sgd(1), **options).init(linear(), params[:1]),
        ),
        (
            TypeError,
            "teachers: parameters are list; put them",
            lambda: parallel.teachers(fns, where).look(params, batch()),
        ),
        (
            ValueError,
            "has one device; give a peer and a device to two",
            lambda: parallel.mutual([one], LOSS, optax.sgd(1), mesh=mesh(peer=1)),
        ),
        (
            ValueError,
            "axis='peer' is none of",
            lambda: parallel.mutual(fns, LOSS, optax.sgd(1), mesh=where),
        ),
        (
            ValueError,
            "3 optimizers for 2",
            lambda: parallel.mutual(fns, LOSS, [optax.sgd(1)] * 3, **options),
        ),
        (
            TypeError,
            "towers: loss is None",
            lambda: parallel.towers(fns, None, optax.sgd(1), **options),
        ),
        (
            TypeError,
            "mesh=None",
            lambda: parallel.ahead(one, params[0], [], mesh=None, to=where, to_axis=None),
        ),
        (
            ValueError,
            "count=0",
            lambda: parallel.ahead(
                one, params[0], [], mesh=where, to=where, axis=None, to_axis=None, count=0
            ),
        ),
        (
            TypeError,
            "no member has a floating parameter",
            lambda: parallel.towers(fns, LOSS, optax.sgd(1), **options).init([jnp.int32(1)] * 2),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
