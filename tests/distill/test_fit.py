"""The loop: evaluation, early stop, checkpoints, exact resume."""

import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, plain, same, student

from jaxopt_models import distill

TEACHER = plain((6, 16, CLASSES))
SCHEME = distill.teacher_student(
    student("plain")[0], TEACHER[0], distill.classification(), optax.adam(0.02)
)


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


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        fit(checkpoint=tmp_path, steps=24)
    other = SCHEME.init(student("plain")[1], plain((6, 16, CLASSES), seed=5)[1])
    with pytest.raises(ValueError, match="another run"):
        distill.fit(
            SCHEME.step, other, batch, steps=23, every=4, progress=False, checkpoint=tmp_path
        )


def test_what_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path):
    def bad(step):
        x, y = batch(step)
        return x * (np.nan if step == 11 else 1), y

    with pytest.raises(FloatingPointError, match="loss was not finite before step 12"):
        fit(bad, checkpoint=tmp_path, save_every=5)
    assert same(fit(checkpoint=tmp_path, save_every=5).state, fit().state)


def test_the_best_is_kept_and_patience_ends():
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9, 0.9])
    done = fit(evaluate=lambda state: next(scores), patience=2)
    assert done.stopped and int(done.state.step) == 16 and int(done.best.step) == 8
    assert done.history.column("score") == [0.1, 0.5, 0.4, 0.3]
    assert same(done.best, fit(steps=8).state)
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
    assert fit(steps=6).plot().get_xlabel() == "step"


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
