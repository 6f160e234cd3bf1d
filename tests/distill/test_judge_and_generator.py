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

    value, grads = jax.jit(jax.value_and_grad(of_judge))(JUDGE)
    judge = jax.tree.map(lambda p, g: np.asarray(p) - 0.2 * np.asarray(g), JUDGE, grads)

    def of_student(params):
        z = FN(params, x)
        fooled = jnp.mean(jax.nn.softplus(-distill.judged(judge, z, y)))
        return distill.kd(z, real, temperature=1.0) + 0.5 * fooled

    grads = jax.jit(jax.grad(of_student))(PARAMS)
    student = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), PARAMS, grads)
    near(state.memory["judge"], judge)
    near(state.student, student)
    np.testing.assert_allclose(metrics["judge"], value, rtol=1e-5)


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
    assert same(state.student, PARAMS) and float(state.memory["loss"]) == 60


def test_a_judge_that_is_wrongly_asked_for_is_named():
    with pytest.raises(ValueError, match="kind='wasserstein'"):
        distill.adversarial(FN, FN, LOSS, optax.sgd(0.1), kind="wasserstein")
    with pytest.raises(TypeError, match="judge_params hold int32"):
        scheme = distill.adversarial(FN, FN, LOSS, optax.sgd(0.1))
        scheme.init(PARAMS, PARAMS, {"w": jnp.arange(3)})
    with pytest.raises(ValueError, match="named 'fool'"):
        loss = lambda s, t, b: (s.out.mean(), {"fool": s.out.mean()})  # noqa: E731
        scheme = distill.adversarial(FN, FN, loss, optax.sgd(0.1), condition=None)
        judge = distill.judge(jax.random.key(0), CLASSES)
        scheme.step(scheme.init(PARAMS, PARAMS, judge), batch())
    with pytest.raises(ValueError, match="weight=-1"):
        distill.adversarial(FN, FN, LOSS, optax.sgd(0.1), weight=-1)
    scheme = distill.adversarial(FN, FN, LOSS, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"made without classes=.*condition=None"):
        scheme.step(scheme.init(PARAMS, PARAMS, judge), batch())
    with pytest.raises(TypeError, match="condition="):
        scheme.step(scheme.init(PARAMS, PARAMS, judge), batch()[0])
    scheme = distill.adversarial(FN, [FN], LOSS, optax.sgd(0.1), condition=None)
    with pytest.raises(TypeError, match=r"several teachers.*give view="):
        scheme.step(scheme.init(PARAMS, [PARAMS], judge), batch())


def test_a_student_of_another_width_is_projected_for_the_judge():
    def view(seen):
        return seen.out if seen.heads is None else distill.project(seen.heads, seen.out)

    def loss(student, teacher, batch):
        return distill.hint(view(student), teacher.out)

    keys = jax.random.split(jax.random.key(0), 2)
    wide = jax.random.normal(keys[0], (6, 5))
    scheme = distill.adversarial(
        lambda w, x: x @ w, FN, loss, optax.sgd(0.1), view=view, condition=None
    )
    head = distill.projection(keys[1], 5, CLASSES)
    state = scheme.init(wide, PARAMS, distill.judge(keys[0], CLASSES, hidden=(4,)), heads=head)
    state, metrics = scheme.step(state, batch())
    assert np.isfinite(metrics["loss"]) and np.any(state.heads["kernel"] != head["kernel"])


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
        wrong = jnp.sum((own != y) | (jnp.abs(x).sum(1) == 0))
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
        inversions=40,
        student_steps=3,
        generator_steps=2,
    )
    state = scheme.init(PARAMS, TEACHER[1], {"classes": GENERATOR["classes"]})
    for _ in range(4):
        state, metrics = scheme.step(state)
        seen.append(float(metrics["wrong"]))
    assert seen == [0.0] * 4
    rings = state.kept["inversions"]
    assert int(rings["images"].filled) == int(rings["labels"].filled) == 40


def test_without_data_on_a_mesh_as_on_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
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
    with pytest.raises(ValueError, match="inversions=3 are less than a batch of 16"):
        free(inversions=3)
    with pytest.raises(ValueError, match="the generator was made for 5"):
        made = distill.generator(jax.random.key(0), 4, (6,), hidden=(8,), classes=5)
        free(generator=distill.generated, classes=3).init(PARAMS, TEACHER[1], made)
    with pytest.raises(ValueError, match="classes=1"):
        free(classes=1)
    with pytest.raises(TypeError, match="generator_params are ArrayImpl; give those that"):
        free(generator=distill.generated).init(PARAMS, TEACHER[1], jnp.eye(4))
    with pytest.raises(ValueError, match="named 'generator'"):
        named = lambda s, t, b: (apart(s, t, b), {"generator": 1.0})  # noqa: E731
        told = distill.data_free(
            FN, TEACHER[0], named, farther, optax.sgd(0.1), optax.sgd(0.1), generator=imagine
        )
        told.step(told.init(PARAMS, TEACHER[1], {"w": jnp.ones((100, 6))}))
    done = distill.fit(scheme.step, state, None, steps=4, progress=False)
    assert done.history.columns == ("step", "loss", "generator")
