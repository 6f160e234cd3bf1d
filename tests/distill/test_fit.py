"""The loop: evaluation, early stop, checkpoints, exact resume."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, plain, same, student

from jaxopt_models import distill

TEACHER = plain((6, 16, CLASSES))
SCHEME_FN, LOSS = student("plain")[0], distill.classification()
SCHEME = distill.teacher_student(SCHEME_FN, TEACHER[0], LOSS, optax.adam(0.02))


def start():
    return SCHEME.init(student("plain")[1], TEACHER[1])


def score(state):
    return -float(np.abs(np.asarray(state.student["layer0"]["kernel"]) - 0.3).mean())


def fit(batches=batch, **options):
    options = {"steps": 23, "every": 4, "progress": False} | options
    return distill.fit(SCHEME.step, start(), batches, **options)


@pytest.mark.parametrize("at", [1, 9, 14, 22])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, at):
    whole = fit(evaluate=score)

    def stops(step):
        if step == at and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return batch(step)

    options = {"evaluate": score, "checkpoint": tmp_path / "run", "save_every": 5}
    with pytest.raises(KeyboardInterrupt):
        fit(stops, **options)
    resumed = fit(stops, **options)
    for name in ("state", "best"):
        assert same(getattr(resumed, name), getattr(whole, name)), name
    assert resumed.history.rows == whole.history.rows
    again = fit(stops, **options)
    assert same(again.state, whole.state) and again.history.rows == whole.history.rows


def test_a_run_that_dies_goes_on_from_its_last_checkpoint(tmp_path):
    seen = []

    def dies(step):
        seen.append(step)
        if step == 17 and seen.count(17) == 1:
            raise OSError("the disk is gone")
        return batch(step)

    options = {"checkpoint": tmp_path, "save_every": 5}
    with pytest.raises(OSError):
        fit(dies, **options)
    del seen[:-1]
    resumed = fit(dies, **options)
    assert seen[2] == 15, "15 steps were kept"
    assert same(resumed.state, fit().state)


@pytest.mark.parametrize("at", [8, 23])
def test_an_interrupt_in_an_evaluation_loses_no_row(tmp_path, at):
    whole = fit(evaluate=score)
    seen = []

    def stops(state):
        seen.append(int(state.step))
        if seen.count(at) == 1 and seen[-1] == at:
            raise KeyboardInterrupt
        return score(state)

    options = {"evaluate": stops, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(**options)
    resumed = fit(**options)
    assert resumed.history.rows == whole.history.rows and same(resumed.best, whole.best)
    assert seen.count(at) == 2 and seen.count(4) == 1


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def loss(student, teacher, batch):
        x = jnp.min(batch[0])
        # Its value is finite where its derivative is not.
        edge = jnp.sqrt(jnp.where(x < -90, 0 * student.out, 1 + student.out**2)).mean()
        return edge, {}

    scheme = distill.teacher_student(SCHEME_FN, TEACHER[0], loss, optax.sgd(0.01))

    def run(at, **options):
        def bad(step):
            x, y = batch(step)
            return x - 100 * (step == at), y

        state = scheme.init(student("plain")[1], TEACHER[1])
        return distill.fit(scheme.step, state, bad, steps=12, progress=False, **options)

    with pytest.raises(FloatingPointError, match="a trained parameter was not finite in step 10"):
        run(9, checkpoint=tmp_path, save_every=5)
    again = run(-1, checkpoint=tmp_path, save_every=5)
    assert same(again.state, run(-1).state), "the good checkpoint is lost"
    with pytest.raises(FloatingPointError, match="in step 12"):
        run(11)


def test_fit_leaves_the_state_to_the_caller_and_takes_each_batch_once():
    state, seen = start(), []
    source = iter(batch(i) for i in range(9))

    def take(step):
        seen.append(step)
        return next(source)

    done = distill.fit(SCHEME.step, state, take, steps=4, progress=False)
    assert seen == [0, 1, 2, 3]
    again = distill.fit(SCHEME.step, state, batch, steps=4, progress=False)
    assert same(done.state, again.state)
    SCHEME.step(state, batch())
    with pytest.raises(ValueError, match="given up to an earlier step"):
        distill.fit(SCHEME.step, state, batch, steps=4, progress=False)
    with pytest.raises(TypeError, match="step is Scheme"):
        distill.fit(SCHEME, start(), batch, steps=4)
    with pytest.raises(TypeError, match="state is dict"):
        distill.fit(SCHEME.step, {}, batch, steps=4)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(checkpoint=tmp_path)
    faster = distill.teacher_student(SCHEME_FN, TEACHER[0], LOSS, optax.adam(0.03))
    with pytest.raises(ValueError, match="program: "):
        distill.fit(
            faster.step, start(), batch, steps=23, every=4, progress=False, checkpoint=tmp_path
        )
    with pytest.raises(ValueError, match="evaluate: False there, True here"):
        fit(checkpoint=tmp_path, evaluate=score)
    with pytest.raises(ValueError, match="another run"):
        fit(checkpoint=tmp_path, steps=24)
    other = SCHEME.init(student("plain")[1], plain((6, 16, CLASSES), seed=5)[1])
    with pytest.raises(ValueError, match="another run"):
        distill.fit(
            SCHEME.step, other, batch, steps=23, every=4, progress=False, checkpoint=tmp_path
        )


def test_a_checkpoint_of_a_run_with_other_numbers_in_closures_is_refused(tmp_path):
    def run(weights):
        def loss(student, teacher, batch):
            return jnp.mean(weights * (student.out - teacher.out) ** 2)

        scheme = distill.teacher_student(SCHEME_FN, TEACHER[0], loss, optax.sgd(0.1))
        state = scheme.init(student("plain")[1], TEACHER[1])
        distill.fit(scheme.step, state, batch, steps=2, progress=False, checkpoint=tmp_path)

    run(jnp.arange(3.0)[None])
    run(jnp.arange(3.0)[None])
    with pytest.raises(ValueError, match="constants: "):
        run(jnp.ones((1, 3)))


def test_what_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path):
    def bad(step):
        x, y = batch(step)
        return x * (np.nan if step == 11 else 1), y

    with pytest.raises(FloatingPointError, match="hard was not finite in step 12"):
        fit(bad, checkpoint=tmp_path, save_every=5)
    assert same(fit(checkpoint=tmp_path, save_every=5).state, fit().state)


def test_the_best_is_kept_and_patience_ends():
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9, 0.9])
    done = fit(evaluate=lambda state: next(scores), patience=2)
    assert done.stopped and int(done.state.step) == 16 and int(done.best.step) == 8
    assert done.history.column("score") == [0.1, 0.5, 0.4, 0.3]
    assert same(done.best, fit(steps=8).state)
    # Nothing is left to stop at the last step.
    assert not fit(evaluate=lambda state: 0.0, steps=8, patience=1).stopped
    with pytest.raises(FloatingPointError, match="evaluate returned nan after step 4"):
        fit(evaluate=lambda state: float("nan"))
    with pytest.raises(ValueError, match="patience= without evaluate="):
        fit(patience=2)


def test_history_holds_means():
    state, values = start(), []
    for i in range(6):
        state, found = SCHEME.step(state, batch(i))
        values.append(float(found["loss"]))
    table = fit(steps=6).history
    assert table.columns == ("step", "loss", "hard", "soft") and table.column("step") == [4, 6]
    np.testing.assert_allclose(
        table.column("loss"), [np.mean(values[:4]), np.mean(values[4:])], rtol=1e-6
    )
    drawn = fit(steps=6, evaluate=lambda state: 1.0).plot()
    assert drawn.get_xlabel() == "step"
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["loss", "score"]


def test_batches_from_any_iterable():
    class Loader:
        def __iter__(self):
            return map(batch, range(3))

    expected = fit(lambda step: batch(step % 3), steps=7).state
    for batches in (Loader(), [batch(i) for i in range(3)]):
        assert same(fit(batches, steps=7).state, expected)
    with pytest.raises(ValueError, match="fit: batches ended at step 3"):
        fit(iter(Loader()), steps=7)
    with pytest.raises(ValueError, match="steps=0"):
        fit(steps=0)


@pytest.mark.parametrize("kind", ["tuple", "array", "dict"])
def test_one_batch_is_no_batches(kind, tmp_path):
    x, y = batch()
    one = {"tuple": (x, y), "array": x, "dict": {"image": x}}[kind]
    with pytest.raises(TypeError, match=f"fit: batches are one batch, of type {kind}; give"):
        fit(one)
    with pytest.raises(TypeError, match="store: batches are one batch"):
        distill.store(tmp_path / "teacher.jom", *TEACHER, one, progress=False)
    distill.store(tmp_path / "teacher.jom", *TEACHER, (x, x[:3]), progress=False)


def test_what_was_done_before_batches_end_is_kept(tmp_path):
    with pytest.raises(ValueError, match="ended at step 7"):
        fit((batch(i) for i in range(7)), checkpoint=tmp_path)
    seen = []

    def take(step):
        seen.append(step)
        return batch(step)

    assert same(fit(take, checkpoint=tmp_path).state, fit().state)
    assert seen == [0, *range(7, 23)], "the first for its shapes"


def test_what_cannot_be_run_is_named(tmp_path):
    with pytest.raises(TypeError, match="fit: evaluate is float"):
        fit(evaluate=0.5)
    with pytest.raises(TypeError, match="evaluate returned NoneType; return one number"):
        fit(evaluate=lambda state: None, steps=1)
    with pytest.raises(TypeError, match="there is no batch"):
        fit(None)
    file = tmp_path / "run.json"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match="is a file, or below one; give a folder"):
            fit(checkpoint=folder)
    with pytest.raises(ValueError, match="is damaged"):
        fit(checkpoint=tmp_path)


def test_a_step_may_tell_no_loss():
    def step(state, batch):
        state, found = SCHEME.step(state, batch)
        return state, {"hard": found["hard"]}

    done = distill.fit(step, start(), batch, steps=50, progress=False)
    assert done.history.columns == ("step", "hard")
