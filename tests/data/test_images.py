import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_models import data


def numbered(total, test=7):
    images = np.zeros((total, 28, 28), np.uint8)
    labels = np.arange(total, dtype=np.uint8)
    return data.Images(images, labels, images[:test], labels[:test], ("a", "b"))


def test_split_takes_validation_from_the_end():
    split = numbered(50).split(validation=8)
    np.testing.assert_array_equal(split.train.labels, np.arange(42))
    np.testing.assert_array_equal(split.validation.labels, np.arange(42, 50))
    np.testing.assert_array_equal(split.test.labels, np.arange(7))
    assert split.validation.images.shape == (8, 28, 28)


def test_split_default_is_a_fifth_up_to_ten_thousand():
    assert len(numbered(50).split().validation.labels) == 10
    many = np.broadcast_to(np.uint8(0), (60_000,))
    images = data.Images(many, many, many, many, ())
    assert len(images.split().validation.labels) == 10_000


@pytest.mark.parametrize("validation", [0, -1, 50])
def test_split_refuses_an_empty_side(validation):
    with pytest.raises(ValueError, match=f"validation={validation} of 50"):
        numbered(50).split(validation=validation)


def test_images_show_their_sizes():
    assert repr(numbered(50)) == "Images(50 train, 7 test, 2 classes)"


@given(
    total=st.integers(1, 40),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_each_example_at_most_once(total, size, seed, epoch):
    size = min(size, total)
    batch_at = data.shuffled(np.arange(total), np.arange(total) + 100, size=size, seed=seed)
    assert batch_at.steps_per_epoch == total // size
    steps = range(epoch * batch_at.steps_per_epoch, (epoch + 1) * batch_at.steps_per_epoch)
    seen = []
    for step in steps:
        images, labels = batch_at(step)
        assert images.shape == (size,)
        np.testing.assert_array_equal(labels, images + 100)
        seen.extend(images.tolist())
    assert len(set(seen)) == len(seen) == size * (total // size)


def test_batches_depend_on_step_and_seed_only():
    def make(seed=3):
        return data.shuffled(np.arange(100), np.arange(100), size=30, seed=seed)

    forward, resumed = make(), make()
    ahead = [forward(step)[0] for step in range(12)]
    for step in (11, 4, 0, 7, 5):  # In any order, as after a resume.
        np.testing.assert_array_equal(resumed(step)[0], ahead[step])
    assert (ahead[0] != ahead[3]).any()  # Shuffled again in the second epoch.
    assert (ahead[0] != make(seed=4)(0)[0]).any()


def test_batches_do_not_change_between_releases():
    images, labels = data.shuffled(np.arange(10), np.arange(10), size=4, seed=0)(3)
    order = np.random.default_rng((0, 1)).permutation(10)
    np.testing.assert_array_equal(images, order[4:8])
    np.testing.assert_array_equal(labels, order[4:8])


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (9, {"size": 2, "seed": 0}, "10 images but 9 labels"),
        (10, {"size": 0, "seed": 0}, "size=0"),
        (10, {"size": 11, "seed": 0}, "size=11"),
        (10, {"size": 2, "seed": -1}, "seed=-1"),
    ],
)
def test_shuffled_refuses(labels, options, says):
    with pytest.raises(ValueError, match=says):
        data.shuffled(np.arange(10), np.arange(labels), **options)


def test_shuffled_refuses_a_negative_step():
    with pytest.raises(ValueError, match="step=-1"):
        data.shuffled(np.arange(10), np.arange(10), size=2, seed=0)(-1)


def test_normalize_is_the_same_in_numpy_and_compiled():
    every = np.arange(256, dtype=np.uint8)
    scaled = data.normalize(every)
    assert isinstance(scaled, np.ndarray) and scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, np.arange(256) / 255, rtol=1e-7)
    assert scaled[0] == 0 and scaled[255] == 1
    compiled = jax.jit(data.normalize)(jnp.asarray(every))
    assert compiled.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(compiled).view(np.uint32), scaled.view(np.uint32))


def test_normalize_refuses_floats():
    with pytest.raises(TypeError, match="float32; give uint8"):
        data.normalize(np.zeros(3, np.float32))
