import lzma
from importlib import resources

import numpy as np
import pytest

from jaxopt_models import data
from jaxopt_models.data import _bundle, _small


@pytest.fixture(scope="module")
def small():
    return data.fashion_mnist_small()


def test_has_each_class_equally_often(small):
    assert small.train_images.shape == (10_000, 28, 28)
    assert small.test_images.shape == (5_000, 28, 28)
    assert small.train_images.dtype == small.train_labels.dtype == np.uint8
    split = small.split()
    for examples, each in zip(split, (800, 200, 500), strict=True):
        assert np.bincount(examples.labels).tolist() == [each] * 10
    assert small.classes[7] == "Sneaker"


def test_arrays_are_read_only(small):
    with pytest.raises(ValueError, match="read-only"):
        small.train_images[0, 0, 0] = 1


def test_images_are_upright_and_the_labels_fit(small):
    # Trousers are narrow and tall, sneakers wide and low: a transposed image, or labels out of
    # step with the images, would turn this round.
    def extent(label):
        drawn = small.train_images[small.train_labels == label] > 64
        return drawn.any(2).sum(1).mean(), drawn.any(1).sum(1).mean()

    trouser, sneaker = extent(1), extent(7)
    assert trouser[0] > 1.5 * trouser[1]
    assert sneaker[1] > 1.5 * sneaker[0]


def test_nearest_class_mean_classifies_the_test_part(small):
    train = small.train_images.reshape(-1, 784).astype(np.float32)
    means = np.stack([train[small.train_labels == label].mean(0) for label in range(10)])
    test = small.test_images.reshape(-1, 784).astype(np.float32)
    guess = (2 * test @ means.T - (means**2).sum(1)).argmax(1)
    assert 0.65 < (guess == small.test_labels).mean() < 0.72


def test_is_small_and_licensed():
    folder = resources.files("jaxopt_models.data")
    assert len(folder.joinpath(_small.FILE).read_bytes()) <= 6_000_000
    text = folder.joinpath("LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "Zalando SE" in text and "Permission is hereby granted" in text


def test_damage_is_found():
    packed = resources.files("jaxopt_models.data").joinpath(_small.FILE).read_bytes()
    with pytest.raises(ValueError, match=r"damaged .* install the package again"):
        _small.unpack(packed[:1000] + b"\0" + packed[1001:])
    with pytest.raises(ValueError, match=f"expected {_small.SHA256}"):
        _small.unpack(lzma.compress(b"other", preset=0))


def test_bundle_inverts_unpack_and_replaces_in_one_step(small, tmp_path):
    # The filters of the real file take ten seconds and do not change the layout.
    quick = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    packed = _bundle.pack(small, filters=quick)
    out = tmp_path / "subset.xz"
    out.write_bytes(b"old")
    with pytest.raises(ValueError, match="sha256"):
        _bundle.write(lzma.compress(b"other", preset=0), out)
    assert out.read_bytes() == b"old"
    _bundle.write(packed, out)
    assert out.read_bytes() == packed
    assert [path.name for path in tmp_path.iterdir()] == ["subset.xz"]
    again = _small.unpack(packed)
    np.testing.assert_array_equal(again.train_images, small.train_images)
    np.testing.assert_array_equal(again.test_images, small.test_images)


def test_bundle_refuses_a_folder_without_the_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        _bundle.main([str(tmp_path), "--out", str(tmp_path / "subset.xz")])
    assert not list(tmp_path.iterdir())
