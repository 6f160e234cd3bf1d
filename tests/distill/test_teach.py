"""Students and teachers: every scheme beside a loop written by hand."""

import distill_networks as networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, near, plain, same, student
from jax.sharding import AxisType

import jaxopt_models as jom
from jaxopt_models import distill, quant
from jaxopt_models.distill._place import Place

TEACHER = plain((6, 16, CLASSES))
LOSS = distill.classification(hard=0.3, soft=0.7, temperature=2.0)


def by_hand(fn, params, targets, tx, steps, hard=0.3, soft=0.7, t=2.0):
    """The textbook loop; ``targets`` are functions from a batch to logits."""

    @jax.jit
    def step(params, opt, x, y):
        def loss(params):
            z = fn(params, x)
            ce = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))
            kl = 0.0
            for target in targets:
                p = jax.nn.softmax(target(x) / t)
                kl += jnp.mean(jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(z / t)), 1)) * t**2
            return hard * ce + soft * kl / max(len(targets), 1)

        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    for i in range(steps):
        params, opt = step(params, opt, *batch(i))
    return params


def run(scheme, state, steps, at=batch):
    found = None
    for i in range(steps):
        state, found = scheme.step(state, at(i))
    return state, found


@pytest.mark.parametrize("form", ["plain", "linen", "nnx"])
def test_a_teacher_and_a_student_equal_the_loop_by_hand(form):
    fn, params = student(form)
    before = jax.tree.map(np.array, params)
    scheme = distill.teacher_student(fn, TEACHER[0], LOSS, optax.adam(0.01))
    state, metrics = run(scheme, scheme.init(params, TEACHER[1]), 5)
    expected = by_hand(fn, params, [lambda x: TEACHER[0](TEACHER[1], x)], optax.adam(0.01), 5)
    near(state.student, expected)
    assert jax.tree.structure(state.student) == jax.tree.structure(params)
    assert set(metrics) == {"loss", "hard", "soft"}
    assert same(params, before), "the caller's parameters were given up"
    assert scheme.step.program._cache_size() == 1, "the step was compiled more than once"


def test_several_teachers_are_averaged():
    fn, params = student("plain")
    others = [plain((6, 16, CLASSES), seed=s) for s in (3, 4)]
    scheme = distill.teacher_student(fn, [f for f, _ in others], LOSS, optax.sgd(0.1))
    state, _ = run(scheme, scheme.init(params, [p for _, p in others]), 3)
    targets = [lambda x, f=f, p=p: f(p, x) for f, p in others]
    near(state.student, by_hand(fn, params, targets, optax.sgd(0.1), 3))


def test_batch_statistics_are_taken_over():
    model = networks.Linen(norm=True)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 6)))
    fn, params = jom.functional((model, variables), mutable=True)
    net = distill.Network(lambda p, x: fn(p, x, train=True), stateful=True)
    scheme = distill.teacher_student(net, TEACHER[0], LOSS, optax.sgd(0.1))
    state, _ = run(scheme, scheme.init(params, TEACHER[1]), 1)
    x = batch(0)[0]
    layer = jax.tree.map(np.asarray, variables["params"]["layer0"])
    inner = x @ layer["kernel"] + layer["bias"]
    got = state.student["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(got, 0.01 * inner.mean(0), atol=1e-6)
    # New statistics leave the scope of the norm, too, but are no value that anyone looks at.
    look = distill.Network(net.fn, stateful=True, taps=["norm"]).look
    assert jax.eval_shape(look, params, batch(0)).taps["norm"].shape == (8, 5)
    plain_state = {"w": jnp.ones((6, 3)), "mean": jnp.zeros(3)}

    def moving(p, x):
        return x @ p["w"], p | {"mean": p["mean"] + 1}

    net = distill.Network(moving, stateful=True, fixed="mean")
    scheme = distill.teacher_student(net, TEACHER[0], LOSS, optax.adamw(0.1))
    state, _ = run(scheme, scheme.init(plain_state, TEACHER[1]), 2)
    assert state.student["mean"].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"fixed='.\*/mean'"):
        scheme = distill.teacher_student(
            distill.Network(moving, stateful=True), TEACHER[0], LOSS, optax.sgd(0.1)
        )
        scheme.init(plain_state, TEACHER[1])
    with pytest.raises(ValueError, match="no pair"):
        distill.Network(TEACHER[0], stateful=True).look(TEACHER[1], batch())


def test_collections_alone_are_state_and_what_is_missing_is_named():
    model = networks.Linen(norm=True)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 6)))

    def scheme(fn):
        net = distill.Network(fn, stateful=True)
        return distill.teacher_student(net, TEACHER[0], LOSS, optax.sgd(0.1))

    alone = scheme(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    state, _ = run(alone, alone.init(variables, TEACHER[1]), 1)
    assert np.all(state.student["batch_stats"]["norm"]["mean"] != 0)
    half = {"batch_stats": {"norm": {"mean": jnp.ones(5)}}}
    for new, match in (({"zzz": jnp.ones(3)}, "zzz"), (half, "value for .*norm/var")):
        wrong = scheme(lambda v, x, new=new: (model.apply(v, x), new))
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(wrong.step, wrong.init(variables, TEACHER[1]), batch())


def test_students_taught_jointly_equal_students_taught_apart():
    pairs = [plain((6, width, CLASSES), seed=width) for width in (4, 5, 7)]
    scheme = distill.joint([f for f, _ in pairs], TEACHER[0], LOSS, optax.adam(0.01))
    state, metrics = run(scheme, scheme.init([p for _, p in pairs], TEACHER[1]), 4)
    assert metrics["loss"].shape == metrics["soft"].shape == (3,)
    for (fn, params), got in zip(pairs, state.students, strict=True):
        target = [lambda x: TEACHER[0](TEACHER[1], x)]
        near(got, by_hand(fn, params, target, optax.adam(0.01), 4))


def test_a_teacher_that_is_trained_with_its_students_learns_from_labels_only():
    fn, params = student("plain")
    alone = distill.classification(hard=0.3, soft=0)
    scheme = distill.joint([fn], TEACHER[0], LOSS, optax.sgd(0.1), teacher_loss=alone)
    state, metrics = run(scheme, scheme.init([params], TEACHER[1]), 3)
    near(state.students[1], by_hand(*TEACHER, [], optax.sgd(0.1), 3))
    assert metrics["loss"].shape == (2,) and metrics["soft/0"].shape == ()


def test_peers_teach_each_other_without_derivatives_between_them():
    pairs = [plain((6, width, CLASSES), seed=width) for width in (4, 5)]
    loss = distill.classification(hard=1, soft=1, temperature=1)
    scheme = distill.mutual([f for f, _ in pairs], loss, [optax.sgd(0.1), optax.sgd(0.2)])
    state, _ = run(scheme, scheme.init([p for _, p in pairs]), 1)
    for i, rate in enumerate((0.1, 0.2)):
        (fn, params), (other, theirs) = pairs[i], pairs[1 - i]
        target = [lambda x, f=other, p=theirs: f(p, x)]
        near(state.students[i], by_hand(fn, params, target, optax.sgd(rate), 1, 1, 1, 1))


def test_heads_and_memory_are_carried():
    fn, params = student("plain")
    net = distill.Network(fn, taps=["layer0"])
    master = distill.Network(TEACHER[0], taps=["layer0"])

    def loss(student, teacher, batch):
        seen = distill.project(student.heads, student.taps["layer0"])
        value = distill.hint(seen, teacher.taps["layer0"])
        return value, {"count": student.memory}, student.memory + 1

    scheme = distill.teacher_student(net, master, loss, optax.sgd(0.1))
    head = distill.projection(jax.random.key(0), 5, 16)
    state = scheme.init(params, TEACHER[1], heads=head, memory=jnp.float32(3))
    first = scheme.step(state, batch(0))
    state, metrics = run(scheme, first[0], 20, at=lambda i: batch(0))
    assert metrics["loss"] < first[1]["loss"]
    assert float(state.memory) == 24.0 and not same(state.heads, head)
    x, _ = batch(0)
    got = net.look(params, (x, None)).taps["layer0"]
    np.testing.assert_allclose(got, x @ np.asarray(params["layer0"]["kernel"]), atol=1e-6)


def test_a_compressed_student_keeps_its_codes_and_masks():
    fn, params = student("plain")
    recipe = [
        jom.Rule("layer0/kernel", jom.chain(jom.prune.Magnitude(sparsity=0.5), quant.Int(bits=4))),
        jom.Rule("layer1/kernel", jom.codebook.KMeans(bits=2)),
    ]
    small = jom.compress(params, recipe)
    scheme = distill.teacher_student(fn, TEACHER[0], LOSS, optax.adamw(0.01, weight_decay=0.1))
    state, first = run(scheme, scheme.init(small, TEACHER[1]), 1, at=lambda i: batch(0))
    state, last = run(scheme, state, 30, at=lambda i: batch(0))
    trained = state.student
    assert last["loss"] < first["loss"]
    old, new = small["layer0"]["kernel"], trained["layer0"]["kernel"]
    assert type(new) is type(old) and not same(old, new)
    assert bool(((new.materialize() == 0) >= (old.materialize() == 0)).all())
    fixed = [jom.partition(t)[1] for t in (small, trained)]
    assert same(*fixed), "codes or masks changed"


def test_learned_quantizers_are_trained_by_a_compressed_teacher():
    fn, params = student("plain")
    recipe = [jom.Rule(".*/kernel", jom.chain(quant.LSQ(bits=3), quant.Input(bits=8)))]
    master = jom.compress(TEACHER[1], [jom.Rule(".*/kernel", quant.Int(bits=8))])
    scheme = distill.teacher_student(fn, TEACHER[0], LOSS, optax.adam(0.01))
    state = scheme.init(jom.prepare(params, recipe), master)
    state, first = run(scheme, state, 1, at=lambda i: batch(0))
    state, last = run(scheme, state, 30, at=lambda i: batch(0))
    assert last["loss"] < first["loss"]
    small = jom.compress(state.student, recipe)
    x = batch(0)[0]
    got, want = jom.simulate(fn)(small, x), jom.simulate(fn)(state.student, x)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_outputs_in_the_batch_take_the_teachers_place():
    fn, params = student("plain")
    run_teacher = jax.jit(TEACHER[0])

    def with_logits(step):
        x, y = batch(step)
        return x, y, distill.top_k(run_teacher(TEACHER[1], x), CLASSES)

    scheme = distill.teacher_student(fn, distill.stored(), LOSS, optax.sgd(0.1))
    state, _ = run(scheme, scheme.init(params, ()), 3, at=with_logits)
    target = [lambda x: TEACHER[0](TEACHER[1], x)]
    near(state.student, by_hand(fn, params, target, optax.sgd(0.1), 3), atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_as_on_one_device(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    fn, params = student("plain")
    states = []

    def loss(student, teacher, batch):
        # Examples are compared with one another, across devices.
        value, metrics = LOSS(student, teacher, batch)
        pair = student.out, teacher.out
        return value + distill.similarity(*pair) + distill.dist(*pair), metrics

    for where in (None, mesh):
        scheme = distill.teacher_student(fn, TEACHER[0], loss, optax.sgd(0.1), mesh=where)
        state, _ = run(scheme, scheme.init(params, TEACHER[1]), 3)
        states.append(state)
    x = Place(mesh, "data", "who").batch(batch())[0]
    assert x.sharding.spec == jax.sharding.PartitionSpec("data")
    near(states[0].student, states[1].student, atol=1e-5)
    assert len(jax.tree.leaves(states[1].student)[0].sharding.device_set) == 8
    with pytest.raises(ValueError, match="7 rows"):
        scheme.step(states[1], batch(0, size=7))
    with pytest.raises(ValueError, match="none of the mesh's"):
        distill.mutual([fn, fn], LOSS, optax.sgd(0.1), mesh=mesh, axis="model")


def test_steps_may_be_scanned_and_mapped():
    fn, params = student("plain")
    scheme = distill.teacher_student(fn, TEACHER[0], LOSS, optax.sgd(0.1))
    state, _ = run(scheme, scheme.init(params, TEACHER[1]), 3)
    batches = jax.tree.map(lambda *parts: np.stack(parts), *map(batch, range(3)))
    scanned, metrics = jax.lax.scan(scheme.step, scheme.init(params, TEACHER[1]), batches)
    near(scanned.student, state.student)
    assert metrics["loss"].shape == (3,)
    stacked = jax.tree.map(lambda *p: jnp.stack(p), params, plain((6, 5, CLASSES), seed=9)[1])

    def three(params):
        state = scheme.init(params, TEACHER[1])
        return jax.lax.scan(scheme.step, state, batches)[0].student

    near(jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(three))(stacked)), state.student)


def test_wrong_arguments_are_named():
    fn, params = student("plain")
    with pytest.raises(TypeError, match="teacher is NoneType"):
        distill.teacher_student(fn, None, LOSS, optax.sgd(0.1))
    with pytest.raises(TypeError, match="optimizer is float"):
        distill.teacher_student(fn, fn, LOSS, 0.1)
    with pytest.raises(ValueError, match="2 optimizers for 3"):
        distill.mutual([fn] * 3, LOSS, [optax.sgd(0.1)] * 2)
    with pytest.raises(ValueError, match="1 peers"):
        distill.mutual([fn], LOSS, optax.sgd(0.1))
    with pytest.raises(ValueError, match="no students"):
        distill.joint([], fn, LOSS, optax.sgd(0.1))
    scheme = distill.joint([fn, fn], fn, LOSS, optax.sgd(0.1))
    with pytest.raises(ValueError, match="student_params must be a list of 2; got dict"):
        scheme.init(params, params)
    for wrong, match in (
        (lambda s, t, b: s.out, "loss returned"),
        (lambda s, t, b: (s.out.sum(), s.out), "for metrics"),
        (lambda s, t, b: (s.out.sum(), {"score": s.out.sum()}), "named 'score'"),
        (lambda s, t, b: b[1].sum(), "one floating number"),
        (lambda s, t, b: (s.out.sum(), {}, jnp.ones(3)), r"init\(memory=\)"),
        (lambda s, t, b: (s.out.sum(),), "a tuple of 1"),
    ):
        scheme = distill.teacher_student(fn, fn, wrong, optax.sgd(0.1))
        state = scheme.init(params, params)
        with pytest.raises((TypeError, ValueError), match=match):
            scheme.step(state, batch())
    scheme = distill.teacher_student(fn, fn, LOSS, optax.sgd(0.1))
    with pytest.raises(TypeError, match="inputs=lambda batch"):
        scheme.step(scheme.init(params, params), {"x": batch()[0]})
    with pytest.raises(TypeError, match="labels=lambda batch"):
        scheme.step(scheme.init(params, params), batch()[0])
    with pytest.raises(TypeError, match="no floating parameter"):
        scheme.init({"w": jnp.arange(3)}, params)
    with pytest.raises(TypeError, match="no random key"):
        scheme.init(params, params, key=0)
    with pytest.raises(TypeError, match="is a State"):
        scheme.init(scheme.init(params, params), params)
    with pytest.raises(TypeError, match="state is dict"):
        scheme.step(params, batch())
    with pytest.raises(TypeError, match=r"the module Linen; make a function of it"):
        distill.teacher_student(networks.Linen(), fn, LOSS, optax.sgd(0.1))
    with pytest.raises(TypeError, match="loss is NoneType"):
        distill.teacher_student(fn, fn, None, optax.sgd(0.1))
    with pytest.raises(ValueError, match="empty list"):
        distill.teacher_student(fn, [], LOSS, optax.sgd(0.1))
    with pytest.raises(TypeError, match="mesh is int"):
        distill.teacher_student(fn, fn, LOSS, optax.sgd(0.1), mesh=8)
    with pytest.raises(TypeError, match="no tuple that ends in"):
        distill.stored().look((), {"x": batch()[0]})
    with pytest.raises(TypeError, match="heads hold int32"):
        scheme.init(params, params, heads={"w": jnp.arange(3)})
    with pytest.raises(TypeError, match="is no function"):
        distill.Network(fn, inputs=3)
    with pytest.raises(ValueError, match="above 0"):
        distill.classification(hard=0, soft=0)
    for option in ({"temperature": 0}, {"smoothing": 1}, {"divergence": "x"}, {"labels": 1}):
        with pytest.raises((TypeError, ValueError), match=f"classification: {next(iter(option))}"):
            distill.classification(**option)
    for option in ({"hard": -1}, {"soft": -1}, {"temperature": 0}, {"labels": 1}):
        with pytest.raises(
            (TypeError, ValueError), match=f"deep_supervision: {next(iter(option))}"
        ):
            distill.deep_supervision(**option)


def test_parameters_are_arrays_and_what_a_function_returns_is_not_lost():
    scheme = distill.teacher_student(*[TEACHER[0]] * 2, LOSS, optax.sgd(0.1))
    kernel = {"kernel": jnp.ones((6, 3))}
    for value in (2, True, "relu", 0.5):
        with pytest.raises(TypeError, match=f"student 0: a/gain is {type(value).__name__}.*close"):
            scheme.init({"a": kernel | {"gain": value}}, TEACHER[1])
        if not isinstance(value, float):
            with pytest.raises(TypeError, match="teacher 0: a/gain is"):
                scheme.init(TEACHER[1], {"a": kernel | {"gain": value}})
    module = networks.Nnx(networks.nnx.Rngs(0))
    for params in (module, {"a": module}, networks.Linen()):
        with pytest.raises(TypeError, match=r"holds the module .*functional"):
            scheme.init(params, TEACHER[1])
    look = distill.Network(lambda p, x: (x @ p["w"], p | {"mean": p["mean"] + 1})).look
    with pytest.raises(ValueError, match="give stateful=True"):
        look({"w": jnp.ones((6, 3)), "mean": jnp.zeros(3)}, batch())
    pair = distill.Network(lambda w, x: (x @ w, w)).look(jnp.ones((6, 3)), batch()).out
    assert len(pair) == 2


def test_numbers_of_python_are_metrics_and_memories():
    fn, params = student("plain")

    def loss(student, teacher, batch):
        metrics = {"heat": 4.0, "late": student.step > 1, "fixed": True}
        return student.out.mean(), metrics, 0.5 * student.memory + student.out.max()

    scheme = distill.teacher_student(fn, TEACHER[0], loss, optax.sgd(0.1))
    _, metrics = run(scheme, scheme.init(params, TEACHER[1], memory=0.0), 3)
    assert [float(metrics[n]) for n in ("heat", "late", "fixed")] == [4, 1, 1]
    assert scheme.step.program._cache_size() == 1


def test_the_step_the_key_and_masks_reach_the_loss():
    fn, params = student("plain")
    seen = []

    def loss(student, teacher, batch):
        value = distill.classification(soft=0.5, where=lambda b: b[2])(student, teacher, batch)[0]
        noise = jax.random.uniform(student.key)
        return value, {"noise": noise, "count": student.step}

    def masked(step, size=8):
        x, y = batch(step, size)
        x[4:] += 100 * step  # what is left out makes no difference
        return x, y, np.arange(size) < 4

    scheme = distill.mutual([fn, fn], loss, optax.sgd(0.1))
    state = scheme.init([params, params], key=jax.random.key(3))
    for i in range(3):
        state, metrics = scheme.step(state, masked(i))
        seen.append(metrics["noise"])
        assert metrics["count"].tolist() == [i, i]
    assert len(set(np.ravel(seen).tolist())) == 6, "a key was used twice"
    whole = distill.mutual([fn, fn], distill.classification(soft=0.5), optax.sgd(0.1))
    expected, _ = run(whole, whole.init([params, params]), 3, lambda i: [a[:4] for a in batch(i)])
    near(state.students, expected.students)


def test_heads_have_an_optimizer_and_contrast_a_memory():
    fn, params = student("plain")
    nets = [distill.Network(f, taps=["layer0"]) for f in (fn, TEACHER[0])]

    def loss(student, teacher, batch):
        pair = (
            distill.project(student.heads[side], x)
            for side, x in (("s", student.taps["layer0"]), ("t", teacher.taps["layer0"]))
        )
        value, memory = distill.contrast(*pair, batch[1], student.memory, student.key, negatives=4)
        return value, {}, memory

    head = {"s": distill.projection(jax.random.key(0), 5, 4)}
    head["t"] = distill.projection(jax.random.key(1), 16, 4)
    memory = distill.contrast_memory(jax.random.key(2), 8, 4)
    scheme = distill.joint([nets[0]], nets[1], loss, optax.sgd(0.1), heads_optimizer=optax.sgd(0.0))
    state = scheme.init([params], TEACHER[1], heads=[head], memory=[memory])
    state, _ = run(scheme, state, 2, at=lambda i: (batch(i)[0], np.arange(8)))
    assert same(state.heads, head) and not same(state.student, params)
    assert not same(state.memory.student, memory.student)


def test_optimizers_may_look_at_the_loss():
    fn, params = student("plain")
    scheme = distill.teacher_student(fn, TEACHER[0], LOSS, optax.polyak_sgd(1.0))
    state, first = run(scheme, scheme.init(params, TEACHER[1]), 1, at=lambda i: batch(0))
    _, last = run(scheme, state, 10, at=lambda i: batch(0))
    assert last["loss"] < first["loss"]
