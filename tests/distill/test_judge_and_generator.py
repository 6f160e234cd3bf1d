"""A judge against a student, and a generator against both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, near, plain, same
from jax.sharding import AxisType

from jaxopt_models import distill

FN, PARAMS = plain((6, 5, CLASSES), seed=1)
TEACHER = plain((6, 16, CLASSES))
LOSS = distill.classification(hard=0, soft=1, temperature=1.0)
JUDGE = distill.judge(jax.random.key(5), CLASSES, hidden=(8,), classes=CLASSES)


def test_judge_and_student_step_as_by_hand():
    scheme = distill.adversarial(
        FN, TEACHER[0], LOSS, optax.sgd(0.1), judge_optimizer=optax.sgd(0.2), weight=0.5
    )
    state, metrics = scheme.step(scheme.init(PARAMS, TEACHER[1], JUDGE), batch())
    x, y = batch()
    real = TEACHER[0](TEACHER[1], x)

    def of_judge(judge):
        scores = [distill.judged(judge, z, y) for z in (real, FN(PARAMS, x))]
        return jnp.mean(jax.nn.softplus(-scores[0])) + jnp.mean(jax.nn.softplus(scores[1]))

    judge = jax.tree.map(lambda p, g: p - 0.2 * g, JUDGE, jax.grad(of_judge)(JUDGE))

    def of_student(params):
        z = FN(params, x)
        fooled = jnp.mean(jax.nn.softplus(-distill.judged(judge, z, y)))
        return distill.kd(z, real, temperature=1.0) + 0.5 * fooled

    student = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, jax.grad(of_student)(PARAMS))
    near(state.kept["judge"], judge)
    near(state.student, student)
    np.testing.assert_allclose(metrics["judge"], of_judge(JUDGE), rtol=1e-5)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "squares"])
def test_a_judge_tells_a_student_that_does_not_learn(kind):
    # On the inputs as condition, and on features of another width through a head.
    net = distill.Network(FN, taps=["layer0"])
    master = distill.Network(TEACHER[0], taps=["layer0"])

    def view(seen):
        x = seen.taps["layer0"]
        return x if seen.heads is None else distill.project(seen.heads, x)

    scheme = distill.adversarial(
        net,
        master,
        lambda s, t, b: (jnp.float32(0), {}, s.memory + 1),
        optax.sgd(0.0),
        judge_optimizer=optax.adam(0.02),
        kind=kind,
        view=view,
        condition=lambda batch: batch[0],
    )
    judge = distill.judge(jax.random.key(0), 16, hidden=(16,), conditions=6)
    head = distill.projection(jax.random.key(1), 5, 16)
    state = scheme.init(PARAMS, TEACHER[1], judge, heads=head, memory=jnp.float32(0))
    for i in range(60):
        state, metrics = scheme.step(state, batch(i, size=32))
    assert metrics["judge_accuracy"] > 0.9
    assert same(state.student, PARAMS) and float(state.memory) == 60


def test_a_judge_that_is_wrongly_asked_for_is_named():
    with pytest.raises(ValueError, match="kind='wasserstein'"):
        distill.adversarial(FN, FN, LOSS, optax.sgd(0.1), kind="wasserstein")
    with pytest.raises(ValueError, match="weight=-1"):
        distill.adversarial(FN, FN, LOSS, optax.sgd(0.1), weight=-1)


def imagine(params, noise, labels):
    x = noise @ params["w"]
    return x if labels is None else x + params["classes"][labels]


GENERATOR = {
    "w": jax.random.normal(jax.random.key(3), (4, 6)),
    "classes": jax.random.normal(jax.random.key(4), (CLASSES, 6)),
}


def apart(student, teacher, batch):
    return distill.disagreement(student.out, teacher.out)


def farther(student, teacher, batch):
    return -apart(student, teacher, batch)


def free(**options):
    options = {"generator": imagine, "batch": 16, "noise": 4} | options
    rates = options.pop("rates", (0.05, 0.05))
    return distill.data_free(FN, TEACHER[0], apart, farther, *map(optax.sgd, rates), **options)


def test_the_generator_climbs_where_the_student_descends():
    # With a rate of zero on one side the other side's mean loss moves its way.
    for rates, name, sign in (((0.1, 0.0), "loss", -1), ((0.0, 0.1), "generator", -1)):
        scheme = free(rates=rates, student_steps=2)
        state = scheme.init(PARAMS, TEACHER[1], GENERATOR)
        means = []
        for _ in range(40):
            state, metrics = scheme.step(state)
            means.append(float(metrics[name]))
        assert sign * (np.mean(means[-10:]) - np.mean(means[:10])) > 0
        still = state.student if rates[0] == 0 else state.kept["generator"]
        assert same(still, PARAMS if rates[0] == 0 else GENERATOR)


def test_labels_and_a_memory_are_drawn_together():
    seen = []

    def labelled(student, teacher, batch):
        x, y = batch
        # Without noise an image tells the label it was made of.
        own = jnp.argmin(jnp.sum((x[:, None] - GENERATOR["classes"][None]) ** 2, -1), axis=1)
        wrong = jnp.sum((own != y) & (jnp.abs(x).sum(1) > 0))
        return apart(student, teacher, batch), {"wrong": wrong.astype(jnp.float32)}

    scheme = distill.data_free(
        FN,
        TEACHER[0],
        labelled,
        farther,
        optax.sgd(0.05),
        optax.sgd(0.0),
        generator=lambda params, z, y: 0 * z[:, :1] + params["classes"][y],
        batch=16,
        noise=4,
        classes=CLASSES,
        memory=40,
        student_steps=3,
    )
    state = scheme.init(PARAMS, TEACHER[1], {"classes": GENERATOR["classes"]})
    for _ in range(4):
        state, metrics = scheme.step(state)
        seen.append(float(metrics["wrong"]))
    assert seen == [0.0] * 4
    rings = state.kept["inversions"]
    assert int(rings["images"].filled) == int(rings["labels"].filled) == 40


def test_without_data_on_a_mesh_as_on_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    states = []
    for where in (None, mesh):
        scheme = free(mesh=where, student_steps=2)
        state = scheme.init(PARAMS, TEACHER[1], {"w": GENERATOR["w"]})
        for _ in range(2):
            state, _ = scheme.step(state)
        states.append(state)
    near(states[0].student, states[1].student, atol=1e-5)
    near(states[0].kept["generator"], states[1].kept["generator"], atol=1e-5)


def test_what_makes_no_sense_without_data_is_named():
    scheme = free()
    state = scheme.init(PARAMS, TEACHER[1], {"w": GENERATOR["w"]})
    with pytest.raises(TypeError, match="takes no batch"):
        scheme.step(state, batch())
    with pytest.raises(ValueError, match="memory=3 holds less than a batch of 16"):
        free(memory=3)
    with pytest.raises(ValueError, match="classes=1"):
        free(classes=1)
    done = distill.fit(scheme.step, state, None, steps=4, progress=False)
    assert done.history.columns == ("step", "loss", "generator")
